# SPDX-License-Identifier: Apache-2.0
"""Cross entropy of a vocabulary projection, without ever holding the logits of all tokens.

The tokens are cut into tiles along T. One tile's logits exist at a time, in the forward pass, where the gradients of
hidden and head are formed as well (they are linear in the two output cotangents), so the backward pass is a scaling:
three matrix products per tile in all, as many as the untiled computation needs.
"""

import functools

import jax
import jax.numpy as jnp

from maxkit import mesh
from maxkit.ops.head_tiles import check_num_tiles, cut, hits, instantiate, join, picked, project, soft_capped


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    num_tiles: int = 1,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sums over tokens of negative log-likelihood and of z-loss, in nats.

        nll = sum_i mask_i (lse_i - logits_i[target_i]),    z = z_loss * sum_i mask_i lse_i^2

    with logits = hidden head^T in float32, soft-capped if asked for, and lse their logsumexp. Neither sum is divided.

    Args:
        hidden: [B, T, D], any float type; its gradient has the same type.
        head: [V, D]; its gradient is accumulated in float32 and returned in the head's type.
        targets: [B, T] int ids below V.
        mask: [B, T] float weights, not differentiated; 0 leaves a token out.
        num_tiles: how many tiles the T tokens of a row are cut into (the last may be shorter).
        z_loss: coefficient of the second output (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
        soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2, arXiv 2408.00118, section 2).

    Returns:
        (nll, z), float32 scalars; z is exactly 0 when `z_loss` is 0.

    Checked against the untiled computation with autodiff, 1e-5 in float32 (tests/unit/test_cross_entropy.py).
    """
    num_tiles = check_num_tiles(num_tiles, hidden.shape[1])
    return _tiled(hidden, head, targets, mask.astype(jnp.float32), num_tiles, z_loss, soft_cap, mesh.layout(head))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _tiled(hidden, head, targets, mask, num_tiles, z_loss, soft_cap, head_layout):
    head = mesh.constrain(head.astype(hidden.dtype), "VD")

    def body(_, tile):
        h, y, m = tile
        logits, lse = _logits(h, head, soft_cap)
        return None, _losses(logits, lse, y, m, z_loss)

    _, losses = jax.lax.scan(body, None, cut((hidden, targets, mask), num_tiles))
    return _sums(losses, hidden.shape[1])


def _forward(hidden, head, targets, mask, num_tiles, z_loss, soft_cap, head_layout):
    # A frozen head (LoRA) needs no gradient: that is one matrix product in three saved.
    train_head = head.perturbed
    hidden, head, targets, mask = hidden.value, head.value, targets.value, mask.value
    table = mesh.constrain(head.astype(hidden.dtype), "VD")
    outputs = 2 if z_loss else 1

    def body(d_heads, tile):
        h, y, m = tile
        logits, lse = _logits(h, table, soft_cap)
        losses = _losses(logits, lse, y, m, z_loss)
        p = jnp.exp(logits - lse[..., None])
        d_logits = [jnp.where(hits(logits, y), p - 1.0, p) * m[..., None]]
        if z_loss:
            d_logits.append(p * (2.0 * z_loss * lse * m)[..., None])
        if soft_cap is not None:
            d_logits = [d * (1.0 - jnp.square(logits / soft_cap)) for d in d_logits]
        d_logits = [d.astype(h.dtype) for d in d_logits]
        d_hiddens = [mesh.einsum("BTV,VD->BTD", d, table) for d in d_logits]
        if train_head:
            d_heads = [
                acc + mesh.einsum("BTV,BTD->VD", d, h, preferred_element_type=jnp.float32, like=head_layout)
                for acc, d in zip(d_heads, d_logits, strict=True)
            ]
        return d_heads, (losses, d_hiddens)

    start = [mesh.zeros(head.shape, jnp.float32, "VD", like=head_layout) for _ in range(outputs if train_head else 0)]
    d_heads, (losses, d_hiddens) = jax.lax.scan(body, start, cut((hidden, targets, mask), num_tiles))
    d_hiddens = [join(d, hidden.shape[1]) for d in d_hiddens]
    types = jnp.zeros((), head.dtype)
    return _sums(losses, hidden.shape[1]), (d_hiddens, d_heads, types)


def _backward(num_tiles, z_loss, soft_cap, head_layout, residuals, cotangents):
    d_hiddens, d_heads, types = residuals
    scales = [instantiate(c) for c in cotangents][: len(d_hiddens)]
    d_hidden = sum(s * d.astype(jnp.float32) for s, d in zip(scales, d_hiddens, strict=True))
    d_head = sum(s * d for s, d in zip(scales, d_heads, strict=True)).astype(types.dtype) if d_heads else None
    return d_hidden.astype(d_hiddens[0].dtype), d_head, None, None


_tiled.defvjp(_forward, _backward, symbolic_zeros=True)


def _logits(h, table, soft_cap):
    """[B, t, V] float32 logits of one tile and their logsumexp [B, t]."""
    logits = soft_capped(project(h, table), soft_cap)
    return logits, jax.nn.logsumexp(logits, axis=-1)


def _losses(logits, lse, y, m, z_loss):
    """Per token [B, t]; padding tokens have m = 0."""
    return (lse - picked(logits, y)) * m, z_loss * lse * lse * m


def _sums(losses, length):
    # Over [B, T] as it was before it was cut, and not fused with the undoing of the cut: then the order of the
    # sum, hence its rounding, does not depend on the number of tiles.
    nll, z = (jnp.sum(jax.lax.optimization_barrier(join(x, length))) for x in losses)
    return nll, z
