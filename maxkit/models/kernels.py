# SPDX-License-Identifier: Apache-2.0
"""Which attention kernels a model runs on, and why, without running it: for the plan and the hardware card."""

from collections import Counter

from maxkit import mesh, ops
from maxkit.models.config import BlockSpec, Execution, ModelConfig


def attention_kernels(config: ModelConfig, execution: Execution, length: int, *, segments: bool = True) -> list[str]:
    """One line per kernel and reason: "splash in 30 layers (platform tpu)".

    For whole rows of `length` tokens on the devices of the mesh in force, with segment ids (packing) or without; a call
    with a cache or an attention_mask of its own may choose otherwise.

    Raises:
        UserError: the kernel that `execution` names cannot compute one of the layers.
    """
    layers = Counter(_choice(config, execution, block, length, segments) for block in _attending(config))
    return [
        f"{choice.kernel} in {count} layer{'s' if count > 1 else ''} ({choice.reason})"
        for choice, count in layers.most_common()
    ]


def _attending(config: ModelConfig) -> list[BlockSpec]:
    return [block for block in config.blocks if block.mixer == "attention"]


def _choice(
    config: ModelConfig, execution: Execution, block: BlockSpec, length: int, segments: bool
) -> ops.KernelChoice:
    call = ops.AttentionCall(
        length=length,
        dtype=execution.dtype,
        widths=(config.head_dim, config.mla.v_head_dim if config.mla else config.head_dim),
        devices=mesh.devices_in_force(),
        segments=segments,
        span=ops.Span(block.sliding_window, block.chunk_size),
        soft_cap=config.attention_soft_cap is not None,
        sinks=config.attention_sinks,
    )
    return ops.choose_kernel(execution.attention_kernel, call)
