# SPDX-License-Identifier: Apache-2.0
"""Attention on TPU by JAX's splash kernel: softmax weights exist block by block, forward and backward.

What the kernel skips is decided from the window alone, before it runs: whole blocks above the diagonal or beyond the
window. Segments and chunks hide further keys inside the blocks that it visits. Online softmax: Dao et al. 2022,
arXiv 2205.14135, algorithm 1; equal to `reference_attention` within rounding (tests/unit/test_attention.py).
"""

import typing

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from maxkit import mesh
from maxkit.ops.visibility import WHOLE_ROW, Span, Visibility

if typing.TYPE_CHECKING:
    from maxkit.ops.attention import AttentionCall

BLOCKS = (512, 384, 256, 128)  # multiples of a TPU's 128 lanes; the first that pads least is taken


def why_not(call: "AttentionCall") -> str | None:
    """What hinders splash here, None if nothing does."""
    if call.devices.platform != "tpu":
        return f"splash runs on TPU, not on {call.devices.platform}"
    if not call.devices.divisible:
        return "splash divides its work over Explicit mesh axes, and these are not"
    if call.extra_mask:
        return "splash knows positions and segments, not an attention_mask"
    return None


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    span: Span = WHOLE_ROW,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `reference_attention` for `visibility.mask(span)`; a row that is not `in_order` becomes NaN.

    The scale is multiplied into the queries, in float32, before they are rounded to their own type again.

    Args:
        visibility: of queries and their own keys, without an extra mask.
        interpret: compute it with ordinary operations, slowly, on any platform.
    """
    length = query.shape[1]
    block = min(BLOCKS, key=lambda size: _padding(length, size))
    padding = _padding(length, block)
    factor = jnp.where(visibility.in_order(), scale, jnp.nan)[:, None, None, None]
    query = (query.astype(jnp.float32) * factor).astype(query.dtype)
    # Keys after the row's end are after every query, and so out of sight.
    shards = {
        name: (letters, jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3))
        for name, letters, x in (("query", "BNTH", query), ("key", "BKSH", key), ("value", "BKSH", value))
    }
    segments = visibility.segments(span)
    if segments is not None:
        shards["segments"] = ("BT", jnp.pad(segments, ((0, 0), (0, padding)), constant_values=-1))
    if sinks is not None:
        shards["sinks"] = ("N", sinks.astype(jnp.float32))

    def attend(*arrays: jax.Array) -> jax.Array:
        given = dict(zip(shards, arrays, strict=True))
        heads, padded = given["query"].shape[1:3]
        kernel = _kernel(heads, padded, block, span.reach, soft_cap, interpret)
        ids = splash.SegmentIds(given["segments"], given["segments"]) if "segments" in given else None
        per_row = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
        return per_row(given["query"], given["key"], given["value"], ids, given.get("sinks"))

    letters, arrays = zip(*shards.values(), strict=True)
    out = mesh.shard_map(attend, letters, "BNTH")(*arrays)
    return mesh.constrain(out.transpose(0, 2, 1, 3)[:, :length], "BTNH")


def _padding(length: int, block: int) -> int:
    """Tokens missing to a whole number of blocks."""
    return -length % block


def _kernel(heads: int, length: int, block: int, reach: int | None, soft_cap: float | None, interpret: bool):
    """The kernel for one row of q [N, T, H], k [K, T, H], v [K, T, Hv], segment ids [T] and sinks [N]."""
    window = None if reach is None else reach - 1  # how many keys before its own a query sees
    mask = masks.LocalMask((length, length), (window, 0), offset=0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
