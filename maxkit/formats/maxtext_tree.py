# SPDX-License-Identifier: Apache-2.0
"""What the names and shapes in a MaxText or Tunix checkpoint say about it. Reads no tensor; imports no JAX.

MaxText stores no version, no architecture and often no `scan_layers`, so all of this is evidence, not fact;
`Guess.evidence` says what each answer rests on. A checkpoint's own metadata wins over it
(`checkpoint/inspect.py`).
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]  # "params/params/decoder/.../kernel" -> shape

_NUMBERED = re.compile(r"^(.*layers?)_(\d+)$")
# (part of a path, family): the first that occurs decides
_FAMILY_MARKS = (
    ("wkv_a", "deepseek"),
    ("GptOssMlp", "gpt-oss"),
    ("moe_block", "qwen3-moe"),
    ("Llama4MoEBlock_0", "llama4"),
    ("in_proj_qkvz", "qwen3-next"),
    ("MoeBlock_0", "mixtral"),
    ("position_embedder", "gpt3"),
)


class Guess(NamedTuple):
    """format: "maxtext-linen" | "maxtext-nnx" | "maxtext-diloco" | "tunix" | "orbax"; the rest as `inspect`
    shows it.

    weights: the paths that are weights. groups: [{"name", "pattern_length", "repeats", "layer_axis"}];
    layer_axis is None when unrolled, and with repeats None when the shapes do not decide.
    """

    format: str
    family: str | None
    scan_layers: bool | None
    groups: list[dict[str, Any]]
    optimizer: str | None
    weights: list[str]
    evidence: list[str]


def recognise(shapes: Shapes, item: str | None = None) -> Guess:
    """Name the layout of a tree from its paths, and what they tell about the model."""
    layout, why = _layout(shapes, item)
    weights = [path for path in shapes if _is_weight(path)]
    inside = {path: _below_decoder(path) for path in weights}
    family, mark = _family(weights)
    scan_layers, groups, structure = _structure({p: shapes[p] for p in weights}, inside)
    evidence = [
        why,
        *([f"family: {mark}"] if mark else []),
        *([f"scan_layers: {structure}"] if structure else []),
    ]
    return Guess(layout, family, scan_layers, groups, _optimizer(shapes), weights, evidence)


def _layout(shapes: Shapes, item: str | None) -> tuple[str, str]:
    roots = {path.split("/")[0] for path in shapes}
    if "inner_state" in roots:
        return "maxtext-diloco", "format: has inner_state"
    if item in ("model_params", "optimizer_state") or "base" in roots:
        return "tunix", f"format: item {item}" if item else "format: has base"
    if "model" in roots and any(path.startswith("model/decoder/") for path in shapes):
        return "maxtext-nnx", "format: weights under model/"
    if any(path.startswith("params/params/") for path in shapes):
        # An NNX run saves what a Linen run saves, and the state of its random numbers.
        if "nnx_aux" in roots:
            return "maxtext-nnx", "format: weights under params/params/, and nnx_aux"
        return "maxtext-linen", "format: weights under params/params/"
    if any(path.startswith("params/decoder/") for path in shapes):
        return "maxtext-linen", "format: weights under params/, params only"
    if "decoder" in roots:
        values = all(path.endswith("/value") for path in shapes if path.startswith("decoder/"))
        return ("maxtext-nnx" if values else "maxtext-linen"), "format: decoder/ at the root, params only"
    return "orbax", "format: no names of MaxText or Tunix"


def _is_weight(path: str) -> bool:
    parts = path.split("/")
    return parts[0] in ("params", "model", "base", "decoder", "token_embedder") and "rngs" not in parts


def _below_decoder(path: str) -> list[str]:
    parts = path.split("/")
    return parts[parts.index("decoder") + 1 :] if "decoder" in parts else []


def _family(weights: list[str]) -> tuple[str | None, str]:
    parts = {part for path in weights for part in path.split("/")}
    for mark, family in _FAMILY_MARKS:
        if mark in parts:
            return family, f"it has {mark}"
    if "pre_ffw_norm" in parts:
        return ("gemma3", "pre_ffw_norm and query_norm") if "query_norm" in parts else ("gemma2", "pre_ffw_norm")
    if "query_norm" in parts:
        return "qwen3", "it has query_norm"
    if "self_attention" in parts:
        return "llama", "grouped attention and a gated MLP without marks of another family"
    return None, ""


def _structure(shapes: Shapes, inside: Mapping[str, list[str]]) -> tuple[bool | None, list[dict], str]:
    """scan_layers, the groups and why, from the names below the decoder."""
    numbered: dict[str, set[int]] = {}
    stacked: dict[str, list[str]] = {}
    for path, parts in inside.items():
        if not parts:
            continue
        match = _NUMBERED.match(parts[0])
        if match:
            numbered.setdefault(match.group(1), set()).add(int(match.group(2)))
        elif len(parts) > 1 and parts[0].endswith(("layers", "layers_remainder", "blocks")):
            if parts[1].isdecimal():
                numbered.setdefault(parts[0], set()).add(int(parts[1]))
            else:
                stacked.setdefault(parts[0], []).append(path)
    groups = [_group(name, 1, len(found), None) for name, found in sorted(numbered.items())]
    groups += [_stacked_group(name, paths, shapes) for name, paths in sorted(stacked.items())]
    if numbered and not stacked:
        name = next(iter(numbered))
        return False, groups, f"the layers are named one by one ({name}, {len(numbered[name])} of them)"
    if stacked:
        return True, groups, f"{', '.join(sorted(stacked))} hold stacked layers"
    return None, groups, ""


def _stacked_group(name: str, paths: list[str], shapes: Shapes) -> dict[str, Any]:
    """The layer axis is where a norm scale, which has one dimension, gained a second.

    Not decided (None) where that scale is as long as there are layers. `layers/layers_0..5` is a pattern of
    six blocks.
    """
    pattern = {part for path in paths for part in _below_decoder(path)[1:2] if _NUMBERED.match(part)}
    final = next((s for p, s in shapes.items() if "decoder_norm/scale" in p and len(s) == 1), None)
    scales = {p: shapes[p] for p in sorted(paths) if "norm/scale" in p}
    scale = next((s for s in scales.values() if final and final[0] in s), None)
    local = next((s for p, s in scales.items() if "/local_layers/" in p and len(s) == 3), None)
    if scale and local:  # a cycle's last layer alone, the others on a second layer axis
        axis = 1 - scale.index(final[0])
        return _group(name, 1 + local[axis + 1], scale[axis], axis)
    if final is None or scale is None or scale == (final[0], final[0]) or final[0] not in scale:
        return _group(name, max(1, len(pattern)), None, None)
    if len(scale) == 1:
        return _group(name, max(1, len(pattern)), 1, None)
    axis = 1 - scale.index(final[0])
    return _group(name, max(1, len(pattern)), scale[axis], axis)


def _group(name: str, pattern_length: int, repeats: int | None, layer_axis: int | None) -> dict[str, Any]:
    return {"name": name, "pattern_length": pattern_length, "repeats": repeats, "layer_axis": layer_axis}


def _optimizer(shapes: Shapes) -> str | None:
    """The kind of optimizer state, by its form: AdamW's is a chain, Paxml's Adam has its moments at the top."""
    paths = [p.removeprefix("optimizer/") for p in shapes if p.split("/")[0] in ("opt_state", "optimizer")]
    parts = {part for path in paths for part in path.split("/")}
    if "muon" in parts:
        return "muon"
    if {"mu", "nu"} <= parts:
        return "adam_pax" if any(path.startswith("opt_state/mu/") for path in paths) else "adamw"
    if parts & {"trace"}:
        return "sgd with momentum"
    return "sgd" if "count" in parts else None


def count_elements(shapes: Shapes, paths: list[str]) -> int:
    """Elements of the arrays with these paths."""
    return sum(math.prod(shapes[path]) for path in paths)
