# SPDX-License-Identifier: Apache-2.0
"""Attention over keys and values that may be shared by groups of query heads.

Who may see whom is a `Visibility`: positions and segments of queries and keys, from which the dense mask of a block
follows. Kernels that build their own masks read the same record.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maxkit import mesh

MASKED = -1e30  # finite: a padding query that sees nothing must not become NaN


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

    def mask(self, sliding_window: int | None = None) -> jax.Array:
        """[B, T, S] bool: causal, inside the segment, at most `sliding_window - 1` tokens back."""
        query, key = self.query_positions[:, :, None], self.key_positions[:, None, :]
        allowed = (key <= query) & (key >= 0)
        if sliding_window is not None:
            allowed &= key > query - sliding_window
        if self.query_segments is not None:
            allowed &= self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.extra is not None:
            allowed &= self.extra
        return allowed


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, scale: float) -> jax.Array:
    """softmax(scale q k^T + mask) v, the softmax in float32 (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    Args:
        query: [B, T, N, H]; key, value: [B, S, K, H] with N a multiple of K (GQA, arXiv 2305.13245).
        mask: [B, T, S] bool, True where attention is allowed.
        scale: usually H ** -0.5.

    Returns:
        [B, T, N, H] in the query's type. A query that may see nothing gets the mean of the values (finite, unused).
    """
    rows, length, heads, width = query.shape
    if _heads_split_differently(heads, key.shape[2]):
        key, value = (_repeat(x, heads // key.shape[2]) for x in (key, value))
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    query = query.reshape(rows, length, kv_heads, groups, width)  # (B, T, K, G, H)
    logits = mesh.einsum("BTKGH,BSKH->BKGTS", query, key, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(mask[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    # In the order a batched product comes in: asking for BTKGH swaps its operands, 7 % of attention's time on a CPU.
    out = mesh.einsum("BKGTS,BSKH->BKGTH", weights, value).transpose(0, 3, 1, 2, 4)  # (B, T, K, G, H)
    return mesh.constrain(out.reshape(rows, length, heads, width), "BTNH")


def _heads_split_differently(heads: int, kv_heads: int) -> bool:
    """True when the mesh divides the query heads but not the kv heads: then each query head gets its own copy."""
    return mesh.is_sharded("N", heads) and not mesh.is_sharded("K", kv_heads)


def _repeat(x: jax.Array, groups: int) -> jax.Array:
    rows, length, kv_heads, width = x.shape
    x = jnp.broadcast_to(x[:, :, :, None], (rows, length, kv_heads, groups, width))
    return mesh.constrain(x.reshape(rows, length, kv_heads * groups, width), "BTNH")  # (B, S, N, H)
