# SPDX-License-Identifier: Apache-2.0
"""Attention on NVIDIA GPUs by cuDNN's flash kernel, through `jax.nn.dot_product_attention`.

A row without segments is described to cuDNN as causal, with its window. Segments and chunks it knows only as a dense
mask, one value per query and key for all heads together: still a small part of what the reference keeps per head.
"""

import typing

import jax
import jax.numpy as jnp

from maxkit import mesh
from maxkit.ops.visibility import WHOLE_ROW, Span, Visibility

if typing.TYPE_CHECKING:
    from maxkit.ops.attention import AttentionCall


def why_not(call: "AttentionCall") -> str | None:
    """What hinders cuDNN here, None if nothing does."""
    if call.devices.platform != "gpu" or (call.devices.compute_capability or 0) < 8:
        return "cuDNN's flash attention runs on NVIDIA GPUs of compute capability 8.0 or higher, and this is none"
    if not call.devices.divisible:
        return "it divides its work over Explicit mesh axes, and these are not"
    if call.dtype not in ("bfloat16", "float16"):
        return f"cuDNN computes in bfloat16 or float16, not in {call.dtype}"
    if call.soft_cap:
        return "cuDNN has no soft cap on the logits"
    if call.sinks:
        return "cuDNN has no attention sinks"
    width, value_width = call.widths
    widest = 128 if call.devices.compute_capability < 9 else 256
    if width != value_width:
        return f"cuDNN wants heads of keys and values equally wide, not {width} and {value_width}"
    if width % 8 or width > widest:
        return f"cuDNN wants a head_dim that is a multiple of 8 up to {widest}, not {width}"
    if call.length % 2 and _needs_mask(call.segments, call.extra_mask, call.span):
        return f"cuDNN takes a mask only for an even number of tokens, not {call.length}"
    return None


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    span: Span = WHOLE_ROW,
    mask: jax.Array | None = None,
    implementation: typing.Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """As `reference_attention`; a row without segments that is not `in_order` becomes NaN.

    Args:
        visibility: of queries and their own keys.
        mask: `visibility.mask(span)`, where it was computed before.
        implementation: xla takes the same arguments on any platform: so the tests see that they say the same.
    """
    given = {"query": ("BTNH", query), "key": ("BSKH", key), "value": ("BSKH", value)}
    options: dict[str, typing.Any] = {}
    if _needs_mask(visibility.query_segments is not None, visibility.extra is not None, span):
        given["mask"] = ("BTS", visibility.mask(span) if mask is None else mask)
    else:
        options["is_causal"] = True
        if span.sliding_window is not None:
            options["local_window_size"] = (span.sliding_window - 1, 0)
        guard = jnp.where(visibility.in_order(), 1, jnp.nan)[:, None, None, None]
        given["query"] = ("BTNH", query * guard.astype(query.dtype))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, *mask: jax.Array) -> jax.Array:
        dense = mask[0][:, None] if mask else None
        return jax.nn.dot_product_attention(
            query, key, value, mask=dense, scale=scale, implementation=implementation, **options
        )

    letters, arrays = zip(*given.values(), strict=True)
    return mesh.shard_map(attend, letters, "BTNH")(*arrays)


def _needs_mask(segments: bool, extra_mask: bool, span: Span) -> bool:
    """Whether more hides a key than being later or beyond the window."""
    return segments or extra_mask or span.chunk_size is not None
