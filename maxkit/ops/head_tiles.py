# SPDX-License-Identifier: Apache-2.0
"""Functions of the logits of a vocabulary projection, tile by tile: of cross entropy, log-probs and divergences.

The tokens are cut into tiles along T and one tile's logits exist at a time. `per_token` does it for any function that
gives one number a token; the backward pass computes a tile's logits again, because the head's gradient needs every
token's own cotangent. (`cross_entropy` sums over tokens, so it can form its gradients in the forward pass.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxkit import mesh


def per_token(
    function: Callable,
    hidden: jax.Array,
    head: jax.Array,
    tiled: Any,
    whole: Any = (),
    *,
    num_tiles: int,
    soft_cap: float | None = None,
) -> Any:
    """`function(logits, tiled, whole)` of all tokens: a pytree of [B, T] float32.

    Differentiated with respect to `hidden` and `head` only. Products are of the hidden's type with float32 results;
    the head's gradient is added up in float32.

    Args:
        function: from logits [B, t, V] float32 (soft-capped), the tile [B, t, ...] of `tiled`, and `whole`, to [B, t].
        hidden: [B, T, D].
        head: [V, D].
        tiled: pytree of [B, T, ...], cut into tiles; short tiles are filled up with zeros.
        whole: pytree of anything else; functions must not close over arrays.
        num_tiles: how many tiles the T tokens of a row are cut into (the last may be shorter).
        soft_cap: logits become soft_cap * tanh(logits / soft_cap).
    """
    num_tiles = check_num_tiles(num_tiles, hidden.shape[1])
    return _per_token(hidden, head, tiled, whole, function, num_tiles, soft_cap, mesh.layout(head))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _per_token(hidden, head, tiled, whole, function, num_tiles, soft_cap, head_layout):
    table = mesh.constrain(head.astype(hidden.dtype), "VD")

    def body(_, tile):
        h, rest = tile
        return None, function(soft_capped(project(h, table), soft_cap), rest, whole)

    _, values = jax.lax.scan(body, None, cut((hidden, tiled), num_tiles))
    return join(values, hidden.shape[1])


def _forward(hidden, head, tiled, whole, function, num_tiles, soft_cap, head_layout):
    # A frozen head (LoRA) needs no gradient: that is one matrix product in four saved.
    train_head = [None] if head.perturbed else []
    arrays = jax.tree.map(lambda x: x.value, (hidden, head, tiled, whole), is_leaf=lambda x: hasattr(x, "perturbed"))
    return _per_token(*arrays, function, num_tiles, soft_cap, head_layout), (arrays, train_head)


def _backward(function, num_tiles, soft_cap, head_layout, residuals, cotangents):
    (hidden, head, tiled, whole), train_head = residuals
    table = mesh.constrain(head.astype(hidden.dtype), "VD")
    cotangents = jax.tree.map(instantiate, cotangents, is_leaf=is_symbolic_zero)

    def body(d_heads, tile):
        h, rest, g = tile
        of_logits = lambda x: function(soft_capped(x, soft_cap), rest, whole)  # noqa: E731
        (d_logits,) = jax.vjp(of_logits, project(h, table))[1](g)
        d_logits = d_logits.astype(h.dtype)
        d_hidden = mesh.einsum("BTV,VD->BTD", d_logits, table)
        step = functools.partial(mesh.einsum, "BTV,BTD->VD", preferred_element_type=jnp.float32, like=head_layout)
        return [total + step(d_logits, h) for total in d_heads], d_hidden

    start = [mesh.zeros(head.shape, jnp.float32, "VD", like=head_layout) for _ in train_head]
    d_heads, d_hidden = jax.lax.scan(body, start, cut((hidden, tiled, cotangents), num_tiles))
    d_head = d_heads[0].astype(head.dtype) if d_heads else None
    return join(d_hidden, hidden.shape[1]), d_head, None, None


_per_token.defvjp(_forward, _backward, symbolic_zeros=True)


def is_symbolic_zero(x: Any) -> bool:
    """Whether this cotangent is a zero that was never made."""
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def instantiate(cotangent: Any) -> jax.Array:
    """The cotangent as an array; zeros where the output was not used."""
    if not is_symbolic_zero(cotangent):
        return cotangent
    # In the layout of the output it belongs to: under an Explicit mesh that is part of the type.
    return mesh.zeros(cotangent.shape, jnp.float32, "BT"[: len(cotangent.shape)])


def project(h: jax.Array, table: jax.Array) -> jax.Array:
    """[B, t, V] float32 logits of one tile, before the soft cap."""
    return mesh.einsum("BTD,VD->BTV", h, table, preferred_element_type=jnp.float32)


def soft_capped(logits: jax.Array, cap: float | None) -> jax.Array:
    """Logits bent towards +-cap; as they are without a cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def hits(logits: jax.Array, y: jax.Array) -> jax.Array:
    """[B, t, V] bool: where the vocabulary's entry is the token's id in y [B, t]."""
    # A comparison instead of a gather: V may be sharded, and a gather along a sharded axis is refused.
    found = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == y[..., None]
    return mesh.constrain(found, "BTV")


def picked(logits: jax.Array, y: jax.Array) -> jax.Array:
    """[B, t]: the entries of [B, t, V] at the ids y; 0 where y is no entry."""
    return jnp.sum(jnp.where(hits(logits, y), logits, 0.0), axis=-1)


def check_num_tiles(num_tiles: int, length: int) -> int:
    """At most one tile a token; below 1 is refused."""
    if not 1 <= num_tiles:
        raise ValueError(f"num_tiles={num_tiles} must be at least 1")
    return min(num_tiles, length)


def cut(tree: Any, num_tiles: int) -> Any:
    """Leaves [B, T, ...] as [num_tiles, B, t, ...], T padded with zeros; tiles never cut the sharded B."""

    def cut_leaf(x):
        size = -(-x.shape[1] // num_tiles)
        x = jnp.pad(x, [(0, 0), (0, size * num_tiles - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], num_tiles, size, *x.shape[2:]).swapaxes(0, 1)  # (n, B, t, ...)

    return jax.tree.map(cut_leaf, tree)


def join(tree: Any, length: int) -> Any:
    """The inverse of `cut`."""

    def join_leaf(x):
        n, rows, size = x.shape[:3]
        return x.swapaxes(0, 1).reshape(rows, n * size, *x.shape[3:])[:, :length]  # (B, T, ...)

    return jax.tree.map(join_leaf, tree)
