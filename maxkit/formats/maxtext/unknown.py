# SPDX-License-Identifier: Apache-2.0
"""What a MaxText checkpoint says about itself and what it cannot: the refusal of one opened without `config=`."""

import math
import re
from typing import Any

from maxkit.formats import presets
from maxkit.formats.maxtext.layout import Sorted

Shapes = dict[str, tuple[int, ...]]

UNKNOWN = (
    "family",
    "norm_eps",
    "rope_theta",
    "rope scaling and the order of turned dimensions",
    "attention scale",
    "activation",
    "sliding windows",
    "soft caps",
    "max_seq_len",
)
_OF_EXPERTS = ("experts_per_token", "how experts are scored and weighed")
_PARTS = {
    "query": r".*/query/kernel",
    "key": r".*/key/kernel",
    "mlp": r".*/mlp(_local)?/wi_0/kernel",
    "experts": r".*/(MoeBlock_0|moe_block|GptOssMlp)/wi_0",
    "latent": r".*/wkv_a/kernel",
}


def known_sizes(shapes: Shapes) -> dict[str, int]:
    """The sizes that the shapes of the weights decide."""
    table = shapes.get("token_embedder/embedding")
    found: dict[str, int] = {}
    if table and len(table) == 2:
        found |= {"vocab_size": table[0], "embed_dim": table[1]}
    first = {name: _first(shapes, pattern) for name, pattern in _PARTS.items()}
    if first["query"]:
        found |= {"num_heads": first["query"][-2], "head_dim": first["query"][-1]}
    if first["key"]:
        found["num_kv_heads"] = first["key"][-2]
    if first["mlp"]:
        found["mlp_dim"] = first["mlp"][-1]
    if first["experts"]:
        found |= {"num_experts": first["experts"][0], "moe.mlp_dim": first["experts"][-1]}
    numbered = {int(match[1]) for path in shapes if (match := re.match(r"decoder/layers[_/](\d+)/", path))}
    norm = _first(shapes, r"decoder/layers/[^/]*norm/scale")
    if numbered:
        found["num_layers"] = max(numbered) + 1
    elif norm and len(norm) == 2 and found.get("embed_dim") in norm:
        found["num_layers"] = math.prod(norm) // found["embed_dim"]
    return found


def _first(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    return next((shape for path, shape in sorted(shapes.items()) if re.fullmatch(pattern, path)), ())


def closest_preset(sizes: dict[str, int]) -> str | None:
    """The preset whose sizes are nearest: the sum of |log ratio| over what is known."""
    best: tuple[float, str] | None = None
    for name in presets.PRESETS:
        config = presets.preset_config(name)
        pairs = [(size, getattr(config, field, None)) for field, size in sizes.items() if "." not in field]
        if config.moe:
            pairs += [(sizes.get("num_experts"), config.moe.num_experts)]
        both = [(ours, theirs) for ours, theirs in pairs if ours and theirs]
        if both and (bool(sizes.get("num_experts")) == bool(config.moe)):
            distance = sum(abs(math.log(ours / theirs)) for ours, theirs in both) / len(both)
            best = min(best, (distance, name)) if best else (distance, name)
    return best[1] if best else None


def refusal(path: Any, found: Sorted, shapes: Shapes) -> str:
    """One line: what is known, what is not, which preset comes nearest, what to give."""
    sizes = known_sizes(shapes)
    missing = (*UNKNOWN, *(_OF_EXPERTS if "num_experts" in sizes else ()))
    known = ", ".join(f"{name}={size}" for name, size in sizes.items())
    nearest = closest_preset(sizes)
    return (
        f"{path}: a {found.format} checkpoint does not record what its model computes. Known from its tensors: "
        f"{known}. Not known: {', '.join(missing)}. Give config=: the log of MaxText's settings, its YAML, a "
        f"config.json, or a preset{f' (the closest is {nearest})' if nearest else ''}"
    )
