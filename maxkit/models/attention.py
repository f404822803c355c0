# SPDX-License-Identifier: Apache-2.0
"""The attention layer: projections, rotation, cache, and the call of `ops.attention`."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from maxkit import ops
from maxkit.models.config import BlockSpec, ModelConfig
from maxkit.models.layers import Make, Projection
from maxkit.models.rope import rotate


@dataclasses.dataclass(frozen=True)
class Context:
    """What all blocks of one call share, computed once: rotations per RoPE base, masks per window, where to write.

    layer: while layers are scanned, which one of the stacked caches is the block's, else None.
    """

    rotations: dict[float, tuple[jax.Array, jax.Array]]
    masks: dict[int | None, jax.Array]
    end_index: jax.Array | None
    layer: jax.Array | None = None


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, spec: BlockSpec, make: Make):
        sizes = {"D": config.embed_dim, "N": config.num_heads, "K": config.num_kv_heads, "H": config.head_dim}
        bias = config.attention_bias
        self.query = Projection("BTD,DNH->BTNH", sizes, make.at("query"), bias=bias)
        self.key = Projection("BTD,DKH->BTKH", sizes, make.at("key"), bias=bias)
        self.value = Projection("BTD,DKH->BTKH", sizes, make.at("value"), bias=bias)
        scale = (2 * config.num_layers) ** -0.5
        self.out = Projection("BTNH,NHD->BTD", sizes, make.at("out"), bias=config.attention_out_bias, scale=scale)
        self.scale = config.head_dim**-0.5
        self.theta = spec.rope_theta or config.rope_theta
        self.window = spec.sliding_window

    def __call__(
        self, x: jax.Array, context: Context, cache: dict[str, jax.Array] | None
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """From x [B, T, D] and this layer's {"k", "v": [B, S, K, H]}: the output, and the cache with T more tokens."""
        cos, sin = context.rotations[self.theta]
        query, key, value = rotate(self.query(x), cos, sin), rotate(self.key(x), cos, sin), self.value(x)
        if cache is not None:
            cache = {
                "k": write(cache["k"], key, context.end_index, context.layer),
                "v": write(cache["v"], value, context.end_index, context.layer),
            }
            key, value = (read(cache[name], context.layer).astype(x.dtype) for name in ("k", "v"))
        return self.out(ops.reference_attention(query, key, value, context.masks[self.window], scale=self.scale)), cache


def write(slots: jax.Array, new: jax.Array, start: jax.Array, layer: jax.Array | None = None) -> jax.Array:
    """Slots [B, S, ...] with new [B, T, ...] written from slot start [B] on, row by row.

    With `layer`, slots are [L, B, S, ...] and that layer's are written: T tokens move, not the cache of a layer.
    """
    new = new.astype(slots.dtype)
    if layer is None:
        update = jax.vmap(lambda row, fresh, at: jax.lax.dynamic_update_slice_in_dim(row, fresh, at, axis=0))
        return update(slots, new, start)
    # What the vmap would make of it, but with rows on axis 1: vmap itself would transpose the whole stack.
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, new.ndim)),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    where = jnp.stack([jnp.zeros_like(start) + layer, start], axis=-1)  # (B, 2)
    return jax.lax.scatter(slots, where, new, numbers, unique_indices=True, mode=jax.lax.GatherScatterMode.CLIP)


def read(slots: jax.Array, layer: jax.Array | None) -> jax.Array:
    """The slots [B, S, ...] of one layer."""
    return slots if layer is None else jax.lax.dynamic_index_in_dim(slots, layer, keepdims=False)
