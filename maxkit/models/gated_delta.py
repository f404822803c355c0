# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule as a mixer (Qwen3-Next): projections, short convolutions, decay, gated norm. Maths in `ops`.

The cache does not grow: a matrix per head, and the last tokens that the convolutions see.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from maxkit import mesh
from maxkit.models.attention import CacheShapes, Context, LayerCache, read
from maxkit.models.config import BlockSpec, ModelConfig
from maxkit.models.layers import Make, Projection, constant, normal, unit_rms
from maxkit.ops import gated_delta as ops


class GatedDelta(nnx.Module):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464, section 3 and figure 1) with value heads that share keys.

    q = unit(silu(conv(x Wq))) / sqrt(H), k = unit(silu(conv(x Wk))), v = silu(conv(x Wv)); value head n uses key head
    n // (N / K). beta = sigmoid(x Wb), g = -exp(log_decay) softplus(x Wa + dt_bias) in float32. What the rule gives is
    normalised per head, scaled, multiplied by silu(x Wg), and projected.

    Checked against transformers' Qwen3NextGatedDeltaNet, 1e-5 of the largest output (tests/oracle/test_gated_delta.py).
    """

    def __init__(self, config: ModelConfig, spec: BlockSpec, make: Make):
        """`spec` is what every mixer gets; nothing in it concerns this one."""
        sizes = config.gated_delta
        assert sizes is not None, "ModelConfig refuses a gated_delta block without its sizes"
        keys = {"D": config.embed_dim, "K": sizes.num_key_heads, "H": sizes.key_head_dim}
        values = {"D": config.embed_dim, "N": sizes.num_value_heads, "H": sizes.value_head_dim}
        self.config = config
        self.query = Projection("BTD,DKH->BTKH", keys, make.at("query"))
        self.key = Projection("BTD,DKH->BTKH", keys, make.at("key"))
        self.value = Projection("BTD,DNH->BTNH", values, make.at("value"))
        self.gate = Projection("BTD,DNH->BTNH", values, make.at("gate"))
        self.beta = Projection("BTD,DN->BTN", values, make.at("beta"))
        self.decay = Projection("BTD,DN->BTN", values, make.at("decay"))
        self.query_conv = Conv((keys["K"], keys["H"], sizes.conv_width), "KHW", make.at("query_conv"))
        self.key_conv = Conv((keys["K"], keys["H"], sizes.conv_width), "KHW", make.at("key_conv"))
        self.value_conv = Conv((values["N"], values["H"], sizes.conv_width), "NHW", make.at("value_conv"))
        self.dt_bias = make("dt_bias", (values["N"],), "N", time_step)
        self.log_decay = make("log_decay", (values["N"],), "N", log_uniform)
        self.norm = GatedNorm(values["H"], config.norm_eps, make.at("norm"))
        scale = (2 * config.num_layers) ** -0.5
        self.out = Projection("BTNH,NHD->BTD", values, make.at("out"), scale=scale)

    @staticmethod
    def cache_shapes(config: ModelConfig, rows: int, size: int) -> CacheShapes:
        """State of every head, what the convolutions begin with, and whose state it is; `size` does not matter."""
        sizes = config.gated_delta
        assert sizes is not None
        keys = (rows, sizes.conv_width - 1, sizes.num_key_heads, sizes.key_head_dim)
        values = (rows, sizes.conv_width - 1, sizes.num_value_heads, sizes.value_head_dim)
        state = (rows, sizes.num_value_heads, sizes.key_head_dim, sizes.value_head_dim)
        return {
            "conv_query": (keys, "BWKH", None),
            "conv_key": (keys, "BWKH", None),
            "conv_value": (values, "BWNH", None),
            "state": (state, "BNHH", "float32"),
            "segment": ((rows,), "B", "int32"),
        }

    def __call__(self, x: jax.Array, context: Context, cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        """From x [B, T, D] and this layer's cache (see `cache_shapes`): the output [B, T, D], and the cache after it.

        A segment begins with an empty state. Padding (segment 0) at either end of x changes no state; between tokens
        of one segment it would take a place in the convolution, which attention does not know: not supported.
        """
        segments = context.segments
        if segments is None:
            segments = mesh.zeros(x.shape[:2], jnp.int32, "BT") + 1
        real = segments != 0
        x = jnp.where(real[..., None], x, 0)
        held = self._held(x, context, cache)
        restarts = ops.count_restarts(segments, held["segment"])
        mixed, given = {}, {"query": self.query(x), "key": self.key(x), "value": self.value(x)}
        for name, conv in (("query", self.query_conv), ("key", self.key_conv), ("value", self.value_conv)):
            mixed[name] = jax.nn.silu(conv(given[name], held[f"conv_{name}"], restarts)).astype(x.dtype)
        log_decay, beta = (jnp.where(real[..., None], y, 0) for y in self._gates(x))
        groups = given["value"].shape[-2] // given["key"].shape[-2]
        output, state = ops.gated_delta(
            _repeat(ops.l2_normalize(mixed["query"]) * given["query"].shape[-1] ** -0.5, groups),
            _repeat(ops.l2_normalize(mixed["key"]), groups),
            mixed["value"],
            log_decay,
            beta,
            restarts,
            held["state"],
        )
        y = self.out(self.norm(output, self.gate(x)).astype(x.dtype))
        if cache is None:
            return y, None
        last = jnp.max(jnp.where(real, jax.lax.broadcasted_iota(jnp.int32, real.shape, 1) + 1, 0), axis=1)
        new = {f"conv_{n}": ops.next_tail(given[n], held[f"conv_{n}"], restarts, last) for n in given}
        new |= {"state": state, "segment": _last_segment(segments, held["segment"], last)}
        return y, {name: _replace(cache[name], new[name], context.layer) for name in cache}

    def _held(self, x: jax.Array, context: Context, cache: LayerCache | None) -> LayerCache:
        """What was read before x: this layer's part of the cache, or the empty start."""
        if cache is not None:
            return {name: read(value, context.layer) for name, value in cache.items()}
        shapes = self.cache_shapes(self.config, x.shape[0], 0)
        return {name: mesh.zeros(s, jnp.dtype(kind or x.dtype), letters) for name, (s, letters, kind) in shapes.items()}

    def _gates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log decay and beta, [B, T, N] float32."""
        bias, rate = (mesh.replicate(p[...]).astype(jnp.float32) for p in (self.dt_bias, self.log_decay))
        time = jax.nn.softplus(self.decay(x).astype(jnp.float32) + bias)
        return -jnp.exp(rate) * time, jax.nn.sigmoid(self.beta(x).astype(jnp.float32))


class Conv(nnx.Module):
    """A causal filter of W taps per channel, without bias."""

    def __init__(self, shape: tuple[int, int, int], letters: str, make: Make):
        self.kernel = make("kernel", shape, letters, normal(shape[-1] ** -0.5))

    def __call__(self, x: jax.Array, tail: jax.Array, restarts: jax.Array) -> jax.Array:
        """See `ops.gated_delta.causal_conv`."""
        return ops.causal_conv(x, self.kernel[...], tail, restarts)


class GatedNorm(nnx.Module):
    """Norm of a head and gate: x / rms(x) * scale * silu(gate), float32.

    Its scale is stored as it is, whatever `norm_scale_offset` says of the other norms.
    """

    def __init__(self, dim: int, eps: float, make: Make):
        self.scale = make("scale", (dim,), "H", constant(1.0))
        self.eps = eps

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """Of x and gate [B, T, N, H]."""
        x = unit_rms(x.astype(jnp.float32), self.eps)
        return x * mesh.replicate(self.scale[...]).astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))


def log_uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Logarithm of a rate uniform in (0.01, 16), as the authors' code draws it, away from log(0)."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 0.01, 16.0)).astype(dtype)


def time_step(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """What softplus makes a time step log-uniform in (0.001, 0.1) (Gu and Dao 2023, arXiv 2312.00752, section 3.6).

    With `log_uniform`, heads begin with memories of one token to tens of thousands.
    """
    low, high = jnp.log(0.001), jnp.log(0.1)
    time = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
    return (time + jnp.log(-jnp.expm1(-time))).astype(dtype)


def _repeat(x: jax.Array, groups: int) -> jax.Array:
    """[B, T, K, H] as [B, T, N, H]: each key head for the N / K value heads that follow one another."""
    rows, length, heads, width = x.shape
    x = jnp.broadcast_to(x[:, :, :, None], (rows, length, heads, groups, width))
    return mesh.constrain(x.reshape(rows, length, heads * groups, width), "BTNH")


def _last_segment(segments: jax.Array, before: jax.Array, last: jax.Array) -> jax.Array:
    """[B]: the segment of the last real token, the first `last` - 1 from the left; `before` if there is none."""
    here = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1) == last[:, None] - 1
    return jnp.where(last > 0, jnp.sum(jnp.where(here, segments, 0), axis=1, dtype=before.dtype), before)


def _replace(slots: jax.Array, new: jax.Array, layer: jax.Array | None) -> jax.Array:
    """The cache with one layer's part replaced: all of it, or entry `layer` of axis 0."""
    new = new.astype(slots.dtype)
    return new if layer is None else jax.lax.dynamic_update_index_in_dim(slots, new, layer, axis=0)
