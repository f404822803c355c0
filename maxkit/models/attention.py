# SPDX-License-Identifier: Apache-2.0
"""The attention layer: projections, rotation, cache, and the call of `ops.attention`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxkit import ops
from maxkit.models.config import BlockSpec, ModelConfig
from maxkit.models.layers import Make, Norm, Projection, unit_rms, zeros
from maxkit.models.rope import rotate, rotations

LayerCache = dict[str, jax.Array]
CacheShapes = dict[str, tuple[tuple[int, ...], str, str | None]]  # name: (shape, letters, dtype or None = activations')
Rope = tuple[float, bool]  # (base, whether the model's scaling applies)


@dataclasses.dataclass(frozen=True)
class Context:
    """What all blocks of one call share, computed once.

    positions, segments [B, T]: of the tokens (segments None: one document and no padding). visibility: who may see
    whom; masks: what follows from it, per span. rotations: (cos, sin) per base. temperature [B, T]: factor on queries
    without RoPE. end_index [B]: where to write into the cache, None without one. kernel: name of the attention kernel.
    layer: while layers are scanned, which one of the stacked caches is the block's, else None.
    """

    positions: jax.Array
    segments: jax.Array | None
    visibility: ops.Visibility
    masks: dict[ops.Span, jax.Array]
    rotations: dict[Rope, tuple[jax.Array, jax.Array]]
    temperature: jax.Array | None = None
    end_index: jax.Array | None = None
    kernel: str = "auto"
    layer: jax.Array | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        positions: jax.Array,
        segments: jax.Array | None,
        visibility: ops.Visibility,
        **rest: Any,
    ):
        """With the masks, rotations and temperature that the blocks of `config` need."""
        attending = [block for block in config.blocks if block.mixer == "attention"]
        turning = config.position == "rope" and {rope(config, block) for block in attending if block.rope}
        return cls(
            positions=positions,
            segments=segments,
            visibility=visibility,
            masks={s: visibility.mask(s) for s in sorted({span(block) for block in attending}, key=repr)},
            rotations={
                (theta, scaled): rotations(
                    positions, config.rotated_dim, theta, config.rope_scaling if scaled else None, config.max_seq_len
                )
                for theta, scaled in sorted(turning or ())
            },
            temperature=_temperature(config, positions),
            **rest,
        )

    @property
    def real(self) -> jax.Array | None:
        """[B, T] bool: which tokens are not padding; None when all are."""
        return None if self.segments is None else self.segments != 0


def _temperature(config: ModelConfig, positions: jax.Array) -> jax.Array | None:
    if config.attention_temperature is None:
        return None
    chunks = jnp.floor((positions.astype(jnp.float32) + 1.0) / config.attention_temperature.floor_scale)
    return 1.0 + config.attention_temperature.coefficient * jnp.log1p(chunks)


def rope(config: ModelConfig, spec: BlockSpec) -> Rope:
    """Which rotations a block uses."""
    return (spec.rope_theta or config.rope_theta, spec.rope_scaled and config.rope_scaling is not None)


def span(spec: BlockSpec) -> ops.Span:
    """How far back a block looks."""
    return ops.Span(spec.sliding_window, spec.chunk_size)


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, spec: BlockSpec, make: Make):
        self.config, self.spec, bias = config, spec, config.attention_bias
        sizes = {"D": config.embed_dim, "N": config.num_heads, "K": config.num_kv_heads, "H": config.head_dim}
        self.query = Projection("BTD,DNH->BTNH", sizes, make.at("query"), bias=bias)
        self.key = Projection("BTD,DKH->BTKH", sizes, make.at("key"), bias=bias)
        self.value = Projection("BTD,DKH->BTKH", sizes, make.at("value"), bias=bias)
        self.gate = Projection("BTD,DNH->BTNH", sizes, make.at("gate"), bias=bias) if config.attention_gate else None
        out_scale = (2 * config.num_layers) ** -0.5
        self.out = Projection("BTNH,NHD->BTD", sizes, make.at("out"), bias=config.attention_out_bias, scale=out_scale)
        self.query_norm = self._norm(config.num_heads, "N", make.at("query_norm"))
        self.key_norm = self._norm(config.num_kv_heads, "K", make.at("key_norm"))
        self.sinks = make("sinks", (config.num_heads,), "N", zeros) if config.attention_sinks else None

    def _norm(self, heads: int, letter: str, make: Make) -> Norm | None:
        width, kind = self.config.head_dim, self.config.qk_norm
        if kind == "projection":
            return Norm(self.config, (heads, width), letter + "H", make)
        return Norm(self.config, (width,), "H", make) if kind == "head" else None

    def __call__(self, x: jax.Array, context: Context, cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        """From x [B, T, D] and this layer's {"k", "v": [B, S, K, H]}: the output, and the cache with T more tokens."""
        query, key = self._placed(self.query(x), self.key(x), context)
        value = self.value(x)
        if cache is not None:
            cache = {
                "k": write(cache["k"], key, context.end_index, context.layer),
                "v": write(cache["v"], value, context.end_index, context.layer),
            }
            key, value = (read(cache[name], context.layer).astype(x.dtype) for name in ("k", "v"))
        attended = attend(self.config, self.spec, context, query, key, value, self.sinks)
        if self.gate is not None:
            attended = attended * jax.nn.sigmoid(self.gate(x))
        return self.out(attended), cache

    def _placed(self, query: jax.Array, key: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, N, H] and keys [B, T, K, H], normalised and given their positions."""
        config = self.config
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.spec.rope and config.position == "rope":
            cos, sin = context.rotations[rope(config, self.spec)]
            query, key = (rotate(x, cos, sin, interleaved=config.rope_interleaved) for x in (query, key))
            if config.qk_norm == "unit":
                query, key = (unit_rms(x, config.norm_eps) for x in (query, key))
        elif context.temperature is not None:
            query = (query * context.temperature[:, :, None, None]).astype(query.dtype)
        return query, key

    @staticmethod
    def cache_shapes(config: ModelConfig, rows: int, size: int) -> CacheShapes:
        """Keys and values of `size` tokens."""
        shape = (rows, size, config.num_kv_heads, config.head_dim)
        return {"k": (shape, "BSKH", None), "v": (shape, "BSKH", None)}


def attend(
    config: ModelConfig,
    spec: BlockSpec,
    context: Context,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: nnx.Param | None = None,
) -> jax.Array:
    """`ops.attention` with what the config and the block say."""
    return ops.attention(
        query,
        key,
        value,
        context.visibility,
        span=span(spec),
        mask=context.masks[span(spec)],
        scale=config.attention_scale or config.head_dim**-0.5,
        soft_cap=config.attention_soft_cap,
        sinks=None if sinks is None else sinks[...],
        kernel=context.kernel,
    )


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
