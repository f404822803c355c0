# SPDX-License-Identifier: Apache-2.0
"""What the keys of a MaxText or Tunix checkpoint are: weights, statistics of an optimizer, counters, random numbers.

Every layout holds the same tree of weights (`decoder/...`, `token_embedder/...`) under different roots, with or without
a last part `value`, and trees of the same form for the optimizer. So one pass over the keys sorts them all:

| root | who writes it |
| --- | --- |
| `params/params/` | MaxText, Linen and NNX runs; `opt_state/...`, `step`, `nnx_aux/` beside it |
| `params/` | adapters for serving, old checkpoints |
| `model/` | NNX state saved as it is; `optimizer/{step, opt_state}` beside it |
| none | params-only of an NNX model; Tunix SFT (item `model_params`, the optimizer in an item `optimizer_state`) |
| `base/` | Tunix DPO and RL, as above |
| `inner_state/...` and all of the first | DiLoCo: replicas (one more axis in front), and the outer state |

Not here: which tensor of the model a key is (`reader.py`, `rows.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from maxkit.errors import UserError
from maxkit.formats.contents import WEIGHTS
from maxkit.formats.orbax_arrays import ArrayInfo

Parts = tuple[str, ...]

_ROOTS: tuple[Parts, ...] = (("params", "params"), ("model", "base"), ("params",), ("model",), ("base",), ())
_TREES = ("decoder", "token_embedder")
_OTHER_TREES = {
    "vision_encoder": "not part of the text model",
    "audio_encoder": "not part of the text model",
    "mtp_block": "layers that predict further tokens, not part of the model's own forward pass",
}
_RANDOM = ("rngs", "dropout")
_SLOTS = ("mu", "nu", "trace")
_OPTIMIZER = ("opt_state", "outer_opt_state")


@dataclass
class Sorted:
    """The keys of a checkpoint. trees: {slot: {path below the root: key}}; scalars: {name: key}.

    root: of the weights. value: whether a part `value` ends them. wrapped: whether `params` stands above the moments.
    """

    format: str
    root: Parts
    value: bool = False
    wrapped: bool = False
    optimizer: str | None = None
    trees: dict[str, dict[str, str]] = field(default_factory=dict)
    scalars: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def sort_keys(leaves: dict[str, ArrayInfo], item: str | None = None, replica: bool = False) -> Sorted:
    """Sort the keys of a tree.

    item: the name of the item that holds it. replica: of DiLoCo, the replicas' state instead of the outer one.

    Raises:
        UserError: no weights of a language model of MaxText, or quantised ones.
    """
    arrays = {path: leaf.parts for path, leaf in leaves.items() if leaf.is_array}
    _refuse_quantised(arrays.values())
    prefix: Parts = ("inner_state",) if replica else ()
    keys = {path: parts[len(prefix) :] for path, parts in arrays.items() if parts[: len(prefix)] == prefix}
    root = next((root for root in _ROOTS if any(_below(parts, root) for parts in keys.values())), None)
    if root is None:
        listed = sorted({"/".join(parts[:2]) for parts in keys.values()})[:6]
        raise UserError(f"no weights of a MaxText or Tunix model among its arrays ({', '.join(listed)}, ...)")
    found = Sorted(_format(root, keys.values(), item, arrays.values()), root)
    for path, parts in keys.items():
        _place(found, path, parts)
    for path in arrays.keys() - keys.keys():
        found.ignored[path] = "DiLoCo's outer state; leave replica out to read it"
    found.optimizer = _optimizer(found, keys.values())
    return found


def _refuse_quantised(keys: Iterable[Parts]) -> None:
    for parts in keys:
        if parts[:2] == ("params", "aqt") or "qrhs" in parts or "qvalue" in parts:
            raise UserError(
                f"quantised weights of AQT ({'/'.join(parts)}) are not read: convert the checkpoint that they were "
                "made from, which has the kernels (MaxText removes them when it quantises)"
            )


def _below(parts: Parts, root: Parts) -> bool:
    return parts[: len(root)] == root and len(parts) > len(root) and parts[len(root)] in _TREES


def _format(root: Parts, keys: Iterable[Parts], item: str | None, whole: Iterable[Parts]) -> str:
    keys = list(keys)
    if any(parts[0] == "inner_state" for parts in whole):
        return "maxtext-diloco"
    if item == "model_params" or "base" in root:
        return "tunix"
    valued = any(parts[-1] == "value" and _below(parts, root) for parts in keys)
    # An NNX run saves what a Linen run saves, and the state of its random numbers.
    if root[:1] == ("model",) or any(parts[0] == "nnx_aux" for parts in keys) or (root == () and valued):
        return "maxtext-nnx"
    return "maxtext-linen"


def _place(found: Sorted, path: str, parts: Parts) -> None:
    """Put one key where it belongs."""
    valued = parts[-1] == "value" and len(parts) > 1
    bare = parts[:-1] if valued else parts
    inside = bare[len(found.root) :] if bare[: len(found.root)] == found.root else ()
    if inside and inside[0] not in _TREES and inside[0] not in _OTHER_TREES:
        inside = ()
    if set(parts) & set(_RANDOM):
        found.ignored[path] = "state of random numbers"
    elif parts[0] == "inner_state":
        found.ignored[path] = "DiLoCo's replicas; give replica=NUMBER to read one of them"
    elif inside and inside[0] in _OTHER_TREES:
        found.ignored[path] = _OTHER_TREES[inside[0]]
    elif inside:
        found.value = found.value or valued
        found.trees.setdefault(WEIGHTS, {})["/".join(inside)] = path
    elif bare[0] in _OPTIMIZER or bare[:2] == ("optimizer", "opt_state"):
        _place_statistic(found, path, bare[1:] if bare[0] == "optimizer" else bare)
    elif bare in (("step",), ("optimizer", "step")):
        found.scalars["step"] = path
    else:
        found.unknown.append(path)


def _place_statistic(found: Sorted, path: str, parts: Parts) -> None:
    """A moment if its path ends in a place of the tree of weights, else a counter or another value."""
    at = next((number for number, part in enumerate(parts) if part in _SLOTS), None)
    rest = parts[at + 1 :] if at is not None else ()
    wrapped = rest[:1] in (("params",), ("base",))
    rest = rest[1:] if wrapped else rest
    if at is None or rest[:1] == () or rest[0] not in _TREES:
        found.scalars["/".join(parts)] = path
        return
    found.wrapped = found.wrapped or wrapped
    slot, tree = parts[at], "/".join(rest)
    if tree in found.trees.get(slot, {}):  # two states of one kind hold the same parameter
        slot = "/".join(parts[: at + 1])
    found.trees.setdefault(slot, {})[tree] = path


def _optimizer(found: Sorted, keys: Iterable[Parts]) -> str | None:
    """The kind of optimizer, by the form of its state."""
    states = [parts[1:] if parts[0] == "optimizer" else parts for parts in keys]
    below = [parts[1:] for parts in states if parts[0] in _OPTIMIZER]
    if not below:
        return None
    if any(parts[:2] == ("inner_states", "muon") for parts in below):
        return "muon"
    if "mu" in found.trees:
        return "adam_pax" if any(parts[0] == "mu" for parts in below) else "adamw"
    return "sgd"
