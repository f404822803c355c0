# SPDX-License-Identifier: Apache-2.0
"""Attention over keys and values that may be shared by groups of query heads, by one of several kernels.

`reference_attention` is the definition; it runs everywhere and keeps one weight per query and key. The kernels keep
none: `attention_splash` on TPU, `attention_cudnn` on NVIDIA GPUs. `attention` calls the one that `choose_kernel` names
(docs/design/008-attention-kernels.md).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maxkit import mesh
from maxkit.errors import UserError, nearest
from maxkit.ops import attention_cudnn, attention_splash
from maxkit.ops.visibility import WHOLE_ROW, Span, Visibility

KERNELS = ("auto", "reference", "cudnn", "splash")
FASTEST = {"tpu": "splash", "gpu": "cudnn"}  # by platform
MASKED = -1e30  # finite: a padding query that sees nothing must not become NaN


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """What decides between kernels: known before anything is traced.

    length: query tokens. own_keys: no cache. widths: of a key head and of a value head. devices: what is compiled for.
    """

    length: int
    dtype: str
    widths: tuple[int, int]
    devices: mesh.Devices
    own_keys: bool = True
    segments: bool = True
    extra_mask: bool = False
    span: Span = WHOLE_ROW
    soft_cap: bool = False
    sinks: bool = False


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """The kernel that computes a call, and why that one."""

    kernel: str
    reason: str


def choose_kernel(kernel: str, call: AttentionCall) -> KernelChoice:
    """The kernel that `attention(kernel=kernel)` runs for such a call.

    A call with a cache is a reference one whatever the name: kernels are for whole rows.

    Raises:
        UserError: no such kernel, or it is named and cannot compute this.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention_kernel={kernel!r}: {nearest(kernel, KERNELS)}")
    if kernel == "reference":
        return KernelChoice(kernel, "named")
    if not call.own_keys:
        return KernelChoice("reference", "keys from a cache")
    name = FASTEST.get(call.devices.platform) if kernel == "auto" else kernel
    if name is None:
        return KernelChoice("reference", f"no kernel for platform {call.devices.platform}")
    refusal = _WHY_NOT[name](call)
    if refusal is None:
        return KernelChoice(name, f"platform {call.devices.platform}" if kernel == "auto" else "named")
    if kernel == "auto":
        return KernelChoice("reference", f"not {name}: {refusal}")
    raise UserError(
        f"attention_kernel={kernel!r} cannot be used here: {refusal}; attention_kernel=auto takes the best that can"
    )


_WHY_NOT: dict[str, Any] = {"splash": attention_splash.why_not, "cudnn": attention_cudnn.why_not}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    span: Span = WHOLE_ROW,
    mask: jax.Array | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    kernel: str = "reference",
) -> jax.Array:
    """Attention by the kernel that `choose_kernel` names; the other arguments and the result as `reference_attention`.

    The kernels equal it up to rounding, except that a row which is not `Visibility.in_order` becomes NaN, where they
    would otherwise compute something else in silence.

    Args:
        visibility, span: who may see whom.
        mask: `visibility.mask(span)`, where it was computed before for many layers.

    Raises:
        UserError: as `choose_kernel`.
    """
    call = AttentionCall(
        length=query.shape[1],
        dtype=query.dtype.name,
        widths=(query.shape[-1], value.shape[-1]),
        devices=mesh.devices_in_force(),
        own_keys=visibility.own_keys,
        segments=visibility.query_segments is not None,
        extra_mask=visibility.extra is not None,
        span=span,
        soft_cap=soft_cap is not None,
        sinks=sinks is not None,
    )
    chosen = choose_kernel(kernel, call).kernel
    if chosen == "reference":
        mask = visibility.mask(span) if mask is None else mask
        return reference_attention(query, key, value, mask, scale=scale, soft_cap=soft_cap, sinks=sinks)
    key, value = _as_split(query, key, value)
    if chosen == "splash":
        return attention_splash.splash_attention(
            query, key, value, visibility, scale=scale, span=span, soft_cap=soft_cap, sinks=sinks
        )
    return attention_cudnn.cudnn_attention(query, key, value, visibility, scale=scale, span=span, mask=mask)


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
    key, value = _as_split(query, key, value)
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


def _as_split(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values, one copy per query head where the mesh divides the query heads but not the kv heads."""
    heads, kv_heads = query.shape[2], key.shape[2]
    if mesh.is_sharded("N", heads) and not mesh.is_sharded("K", kv_heads):
        return _repeat(key, heads // kv_heads), _repeat(value, heads // kv_heads)
    return key, value


def _repeat(x: jax.Array, groups: int) -> jax.Array:
    rows, length, kv_heads, width = x.shape
    x = jnp.broadcast_to(x[:, :, :, None], (rows, length, kv_heads, groups, width))
    return mesh.constrain(x.reshape(rows, length, kv_heads * groups, width), "BTNH")  # (B, S, N, H)
