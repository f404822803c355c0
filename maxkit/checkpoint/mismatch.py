# SPDX-License-Identifier: Apache-2.0
"""Why a checkpoint does not fit a state: every difference at once, with the setting that is likely behind it.
No JAX.

Next to read: `store.py`.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from maxkit.errors import UserError

Leaf = tuple[tuple[int, ...], str]  # shape, dtype

# The letters of a parameter's shape (docs/design/001-architecture.md), by the end of its path, unstacked.
_LETTERS = {
    "embed/table": "VD",
    "output/kernel": "VD",
    "norm/scale": "D",
    "query_norm/scale": "H",
    "key_norm/scale": "H",
    "query/kernel": "DNH",
    "key/kernel": "DKH",
    "value/kernel": "DKH",
    "out/kernel": "NHD",
    "query/bias": "NH",
    "key/bias": "KH",
    "value/bias": "KH",
    "out/bias": "D",
    "gate/kernel": "DF",
    "up/kernel": "DF",
    "down/kernel": "FD",
    "gate/bias": "F",
    "up/bias": "F",
    "down/bias": "D",
}
_FIELDS = {
    "V": "vocab_size",
    "D": "embed_dim",
    "F": "mlp_dim",
    "N": "num_heads",
    "K": "num_kv_heads",
    "H": "head_dim",
    "L": "num_layers",
    "R": "lora_rank",
    "E": "moe.num_experts",
    "Q": "mla.q_rank",
    "Z": "mla.kv_rank",
    "S": "max_seq_len",
}
_LAYER = re.compile(r"/(block|layer)_(\d+)/")
_NUMBER = re.compile(r"(?<=[./_])\d+(?=[./]|$)")  # of a layer, in a foreign name


def mismatches(expected: Mapping[str, Leaf], found: Mapping[str, Leaf], allowed: Collection[str] = ()) -> list[str]:
    """One line per leaf that differs: path, what the run expects, what the checkpoint has, and the setting to
    look at. Leaves in `allowed` may be on one side only.
    """
    lines = []
    other_layout = {_layout(path) for path in expected} - {None} != {_layout(path) for path in found} - {None}
    for path in sorted((expected.keys() | found.keys()) - set(allowed)):
        if path not in found:
            hint = _hint_of_presence(path, expected, found, other_layout)
            lines.append(f"{path}: expected {_text(expected[path])}, found nothing{hint}")
        elif path not in expected:
            hint = _hint_of_presence(path, expected, found, other_layout)
            lines.append(f"{path}: expected nothing, found {_text(found[path])}{hint}")
        elif expected[path] != found[path]:
            hint = _hint_of_leaf(path, expected[path], found[path])
            lines.append(f"{path}: expected {_text(expected[path])}, found {_text(found[path])}{hint}")
    return lines


def check(
    where: object, expected: Mapping[str, Leaf], found: Mapping[str, Leaf], allowed: Collection[str] = ()
) -> None:
    """Compare two trees of leaves; those in `allowed` may be on one side only.

    Raises:
        UserError: they differ; lists every difference.
    """
    lines = mismatches(expected, found, allowed)
    if lines:
        count = f"{len(lines)} difference{'s' if len(lines) > 1 else ''}"
        if _has_optimizer(expected) and not _has_optimizer(found):
            raise UserError(
                f"{where} holds weights alone, which no run can continue from: start a new run_dir with "
                f"load_parameters_path={where}"
            )
        raise UserError(
            f"{where} does not fit this run ({count}). Set the parameters as the checkpoint was made, "
            "or use another run_dir:\n  " + "\n  ".join(lines)
        )


def hint_of_address(path: str, layer: int | None, layers: Collection[int | None]) -> str:
    """The setting that makes a tensor appear on one side only; `layers` are those of which the other side has any."""
    name = path.rpartition("/")[2]
    if name in ("lora_a", "lora_b"):
        return _hint("lora_rank")
    if layer is not None and layer not in layers:
        return _hint("num_layers")
    return _hint("tie_embeddings", "model") if path == "output/kernel" else _hint("model")


def collapsed(names: Iterable[str]) -> list[str]:
    """Names that differ in their first number alone as one: model.layers.{0-3, 7}.mlp.weight."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = _NUMBER.search(name)
        stem, rest = (name[: match.start()], name[match.end() :]) if match else (name, "")
        numbers.setdefault((stem, rest), []).extend([int(match.group())] if match else [])
    return [
        f"{stem}{{{ranges(found)}}}{rest}" if len(found) > 1 else f"{stem}{found[0] if found else ''}{rest}"
        for (stem, rest), found in numbers.items()
    ]


def ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _has_optimizer(leaves: Mapping[str, Leaf]) -> bool:
    return any(path.startswith("opt_state/") for path in leaves)


def _text(leaf: Leaf) -> str:
    shape, dtype = leaf
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _layout(path: str) -> str | None:
    match = _LAYER.search(path)
    return match.group(1) if match else None


def _hint(*fields: str) -> str:
    return f" -> {', '.join(fields)}" if fields else ""


def _hint_of_presence(path: str, expected: Mapping, found: Mapping, other_layout: bool) -> str:
    """The setting that makes a leaf appear on one side only."""
    if path.rsplit("/", 1)[-1] in ("lora_a", "lora_b"):
        return _hint("lora_rank")
    if path.startswith("opt_state/"):
        # A moment that only one side has, of a weight that both have (or of none: a counter).
        weight = next((p for p in (*expected, *found) if p.startswith("params/") and path.endswith(p[6:])), None)
        if weight is None or (weight in expected and weight in found):
            return _hint("optimizer")
    if other_layout and _LAYER.search(path):
        return _hint("scan_layers")
    if _LAYER.search(path):
        return _hint("num_layers", "model")
    if path.endswith("output/kernel"):
        return _hint("tie_embeddings", "model")
    return _hint("model")


def _hint_of_leaf(path: str, expected: Leaf, found: Leaf) -> str:
    """The settings behind a dimension or dtype that differs."""
    shape, found_shape = expected[0], found[0]
    if shape == found_shape:
        return _hint("dtype of the weights")
    if path.endswith("lora_a") or path.endswith("lora_b"):
        return _hint("lora_rank", "model")
    letters = next((v for k, v in _LETTERS.items() if path.endswith(k)), None)
    if letters is not None and "/block_" in path and len(shape) == len(letters) + 1:
        letters = "L" + letters
    return hint_of_shape(letters, shape, found_shape)


def hint_of_shape(letters: str | None, expected: tuple[int, ...], found: tuple[int, ...]) -> str:
    """The settings behind the dimensions that differ; `letters` names them, one each, None where they are unknown."""
    if letters is None or len(expected) != len(found) or len(letters) != len(expected):
        return _hint("model")
    differing = [_FIELDS.get(x, "model") for x, a, b in zip(letters, expected, found, strict=True) if a != b]
    return _hint(*dict.fromkeys(differing))
