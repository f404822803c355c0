# SPDX-License-Identifier: Apache-2.0
"""Attention over keys and values that may be shared by groups of query heads.

Who may see whom is a `Visibility`: positions and segments of queries and keys, from which the dense mask of a block
follows. Kernels that build their own masks read the same record.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maxkit import mesh
from maxkit.errors import UserError, nearest

KERNELS = ("auto", "reference")
MASKED = -1e30  # finite: a padding query that sees nothing must not become NaN


@dataclasses.dataclass(frozen=True)
class Span:
    """How far back a layer looks: at most `sliding_window - 1` tokens, or not beyond its own `chunk_size` positions."""

    sliding_window: int | None = None
    chunk_size: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Positions of queries and keys.

    They are [B, T] and [B, S], segments likewise (0 is padding, equal segments see each other), and an optional
    extra mask [B, T, S], True where attention is allowed. An empty cache slot has position -1.
    """

    query_positions: jax.Array
    key_positions: jax.Array
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    extra: jax.Array | None = None

    def mask(self, span: Span = Span()) -> jax.Array:
        """[B, T, S] bool: causal, inside the segment, inside the span."""
        query, key = self.query_positions[:, :, None], self.key_positions[:, None, :]
        allowed = (key <= query) & (key >= 0)
        if span.sliding_window is not None:
            allowed &= key > query - span.sliding_window
        if span.chunk_size is not None:
            allowed &= key // span.chunk_size == query // span.chunk_size
        if self.query_segments is not None:
            allowed &= self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.extra is not None:
            allowed &= self.extra
        return allowed


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    span: Span = Span(),
    mask: jax.Array | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    kernel: str = "reference",
) -> jax.Array:
    """Attention by the kernel of that name; arguments and result as `reference_attention`, which all of them equal.

    visibility, span: who may see whom. mask: `visibility.mask(span)`, where it was computed before for many layers.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention_kernel={kernel!r}: {nearest(kernel, KERNELS)}")
    mask = visibility.mask(span) if mask is None else mask
    return reference_attention(query, key, value, mask, scale=scale, soft_cap=soft_cap, sinks=sinks)


def reference_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """softmax(cap(scale q k^T) + mask) v, the softmax in float32 (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    Args:
        query: [B, T, N, H]; key: [B, S, K, H] and value: [B, S, K, Hv] with N a multiple of K (GQA, arXiv 2305.13245).
        mask: [B, T, S] bool, True where attention is allowed.
        scale: usually H ** -0.5.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2, arXiv 2408.00118, section 2).
        sinks: [N] logits, one per head, of a key that takes weight and has no value (gpt-oss).

    Returns:
        [B, T, N, Hv] in the query's type. A query that may see nothing gets finite values, which nobody uses.
    """
    rows, length, heads, width = query.shape
    if _heads_split_differently(heads, key.shape[2]):
        key, value = (_repeat(x, heads // key.shape[2]) for x in (key, value))
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    query = query.reshape(rows, length, kv_heads, groups, width)  # (B, T, K, G, H)
    logits = mesh.einsum("BTKGH,BSKH->BKGTS", query, key, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(mask[:, None, None], logits, MASKED)
    weights = _softmax(logits, sinks, kv_heads, groups).astype(value.dtype)
    # In the order a batched product comes in: asking for BTKGH swaps its operands, 7 % of attention's time on a CPU.
    out = mesh.einsum("BKGTS,BSKH->BKGTH", weights, value).transpose(0, 3, 1, 2, 4)  # (B, T, K, G, Hv)
    return mesh.constrain(out.reshape(rows, length, heads, value.shape[-1]), "BTNH")


def _softmax(logits: jax.Array, sinks: jax.Array | None, kv_heads: int, groups: int) -> jax.Array:
    """Over the keys of logits [B, K, G, T, S], and the sink of each head where there are sinks."""
    if sinks is None:
        return jax.nn.softmax(logits, axis=-1)
    sinks = mesh.replicate(sinks).astype(jnp.float32).reshape(kv_heads, groups, 1, 1)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), sinks))
    weights = jnp.exp(logits - largest)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - largest))


def _heads_split_differently(heads: int, kv_heads: int) -> bool:
    """True when the mesh divides the query heads but not the kv heads: then each query head gets its own copy."""
    return mesh.is_sharded("N", heads) and not mesh.is_sharded("K", kv_heads)


def _repeat(x: jax.Array, groups: int) -> jax.Array:
    rows, length, kv_heads, width = x.shape
    x = jnp.broadcast_to(x[:, :, :, None], (rows, length, kv_heads, groups, width))
    return mesh.constrain(x.reshape(rows, length, kv_heads * groups, width), "BTNH")  # (B, S, N, H)
