# SPDX-License-Identifier: Apache-2.0
"""A model in words and numbers: its layer groups, what its blocks are, its sizes. No JAX.

What `maxkit inspect` and the tables of the docs show.
"""

from typing import Any

from maxkit.models.config import BlockSpec, ModelConfig


def block_text(block: BlockSpec) -> str:
    """One block, for example "attention (window 4096), experts"."""
    notes = [
        f"window {block.sliding_window}" if block.sliding_window else "",
        f"chunks of {block.chunk_size}" if block.chunk_size else "",
        "" if block.rope else "no RoPE",
        f"RoPE base {block.rope_theta:g}" if block.rope_theta else "",
    ]
    given = ", ".join(note for note in notes if note)
    mixer = "gated delta rule" if block.mixer == "gated_delta" else "attention"
    return f"{mixer}{f' ({given})' if given else ''}, {'experts' if block.mlp == 'moe' else 'dense'}"


def groups(config: ModelConfig) -> list[dict[str, Any]]:
    """The layer groups: name, length of the pattern, how often it repeats, and its blocks in words."""
    return [
        {
            "name": group.name,
            "pattern_length": len(group.pattern),
            "repeats": group.repeats,
            "layer_axis": None,
            "pattern": [block_text(block) for block in group.pattern],
        }
        for group in config.layer_groups()
    ]


def sizes(config: ModelConfig) -> dict[str, Any]:
    """The sizes of a model: the usual ones, and those of its experts, latents and windows where it has them."""
    names = "vocab_size num_layers embed_dim mlp_dim num_heads num_kv_heads head_dim max_seq_len".split()
    found: dict[str, Any] = {name: getattr(config, name) for name in names}
    windows = sorted({block.sliding_window for block in config.blocks if block.sliding_window})
    chunks = sorted({block.chunk_size for block in config.blocks if block.chunk_size})
    if windows:
        found["sliding_windows"] = windows
    if chunks:
        found["chunk_sizes"] = chunks
    for part in ("moe", "mla", "gated_delta"):
        nested = getattr(config, part)
        if nested is not None:
            counted = {k: v for k, v in nested if isinstance(v, int) and not isinstance(v, bool) and v}
            found[part] = counted
    return found
