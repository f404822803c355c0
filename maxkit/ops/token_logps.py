# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens under a vocabulary projection, without ever holding the logits of all tokens."""

import jax
import jax.numpy as jnp

from maxkit.ops import head_tiles


def token_logps(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    num_tiles: int = 1,
    temperature: float | jax.Array = 1.0,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Of every token the log-probability of its target and the entropy of its distribution, in nats.

        logps = z[target] - logsumexp(z)        entropy = logsumexp(z) - sum_v softmax(z)_v z_v

    with z = hidden head^T / temperature in float32, soft-capped before the division if asked for.

    Args:
        hidden: [B, T, D], any float type; its gradient has the same type.
        head: [V, D]; its gradient is accumulated in float32 and returned in the head's type.
        targets: [B, T] int ids below V.
        mask: [B, T]; where it is 0 both results and the gradient are exactly 0. It is no weight: other values count 1.
        num_tiles: how many tiles the T tokens of a row are cut into (the last may be shorter).
        temperature: above 0, a number or a scalar array; not differentiated.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2, arXiv 2408.00118, section 2).

    Returns:
        (logps, entropy), each [B, T] float32; the entropy has no gradient.

    Checked against the untiled computation with autodiff and against numpy in float64, 2e-5 in float32
    (tests/unit/test_token_logps.py).
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    logps, entropy = head_tiles.per_token(
        _of_tile, hidden, head, (targets, mask != 0), temperature, num_tiles=num_tiles, soft_cap=soft_cap
    )
    return logps, jax.lax.stop_gradient(entropy)


def _of_tile(logits, tile, temperature):
    y, counts = tile
    logits = logits / temperature
    lse = jax.nn.logsumexp(logits, axis=-1)
    fixed = jax.lax.stop_gradient(logits - lse[..., None])
    entropy = -jnp.sum(jnp.exp(fixed) * fixed, axis=-1)
    return jnp.where(counts, head_tiles.picked(logits, y) - lse, 0.0), jnp.where(counts, entropy, 0.0)
