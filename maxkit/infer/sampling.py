# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token: greedy, temperature, top-k, top-p, row by row.

All controls are traced, so a new temperature, seed, top_k or top_p never compiles again; sorting and drawing
are skipped at run time when no row asks for them. Order as in Hugging Face and vLLM: temperature, then
top-k, then top-p of what top-k left. Next to read: `engine.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from maxkit import mesh
from maxkit.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """How each row is sampled, every field [B].

    temperature float32, 0 is greedy; top_k int32, 0 is off; top_p float32, 1 is off;
    seed uint32 and request uint32: the two numbers that, with the position, make the key of a draw.
    """

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    request: jax.Array | np.ndarray


def controls(
    num_rows: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    first_request: int = 0,
) -> Controls:
    """The same controls for `num_rows` rows (numpy, on the host) with request numbers counted from
    `first_request`.

    Raises:
        UserError: temperature below 0 or not finite, top_k below 1, top_p outside (0, 1], seed outside 32
            bits.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature} must be 0 (greedy) or a positive finite number")
    if top_k is not None and not 1 <= top_k < 2**31:
        raise UserError(f"top_k={top_k} must be at least 1; None turns it off")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1; None turns it off")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be from 0 to {2**32 - 1}")
    return Controls(
        temperature=np.full(num_rows, temperature, np.float32),
        top_k=np.full(num_rows, top_k or 0, np.int32),
        top_p=np.full(num_rows, 1.0 if top_p is None else top_p, np.float32),
        seed=np.full(num_rows, seed, np.uint32),
        request=np.arange(first_request, first_request + num_rows).astype(np.uint32),
    )


def sample(logits: jax.Array, how: Controls, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next token of each row and its log-probability.

    Args:
        logits: [B, V].
        how: controls of the rows.
        positions: [B] int32, where in its sequence the token will stand; one key per (seed, request,
            position).

    Returns:
        tokens [B] int32 and logps [B] float32: nats under softmax(logits / temperature) over the whole
        vocabulary, before top-k and top-p (what a trainer computes); a greedy row's under softmax(logits).
    """
    logits = whole_vocabulary(logits.astype(jnp.float32))
    draws = how.temperature > 0
    scaled = logits / jnp.where(draws, how.temperature, 1.0)[:, None]

    def drawn() -> jax.Array:
        kept = jax.lax.cond(
            jnp.any(draws & ((how.top_k > 0) | (how.top_p < 1))),
            lambda: whole_vocabulary(keep(scaled, how.top_k, how.top_p)),
            lambda: scaled,
        )
        noise = whole_vocabulary(gumbel(how, positions, logits.shape[1]))
        return _argmax(jnp.where(draws[:, None], kept + noise, logits))

    tokens = jax.lax.cond(jnp.any(draws), drawn, lambda: _argmax(logits))
    hits = jax.lax.broadcasted_iota(jnp.int32, scaled.shape, 1) == tokens[:, None]
    picked = jnp.sum(jnp.where(hits, scaled, 0.0), axis=-1)
    return tokens, picked - jax.nn.logsumexp(scaled, axis=-1)


def keep(scaled: jax.Array, top_k: jax.Array | np.ndarray, top_p: jax.Array | np.ndarray) -> jax.Array:
    """`scaled` [B, V] with -inf for every token outside the row's top_k [B] and top_p [B].

    top_k tokens of the largest logits stay (0: all), of these the fewest whose probabilities, renormalised
    over the top_k, reach top_p (Holtzman et al. 2019, arXiv 1904.09751). The most probable token always
    stays, and so does one that ties with the last one kept.
    """
    vocab = scaled.shape[1]
    ordered = -jnp.sort(-scaled, axis=-1)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    inside = jax.lax.broadcasted_iota(jnp.int32, scaled.shape, 1) < k[:, None]
    probabilities = jax.nn.softmax(jnp.where(inside, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # top_p = 1 keeps everything: a cumulative sum that reaches 1 by rounding must not cut the tail off.
    inside &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    last = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= last, scaled, -jnp.inf)


def gumbel(how: Controls, positions: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise [B, V]; a row's depends on its seed, request and position only, not on its neighbours."""

    def row(seed, request, position):
        # Threefry by name: draws of one seed must not depend on a process-wide generator setting.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), request)
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)

    return jax.vmap(row)(how.seed, how.request, positions)


def whole_vocabulary(x: jax.Array) -> jax.Array:
    """[B, V] with V gathered: a sort, a cumulative sum and an argmax need it whole."""
    return mesh.constrain(x, "BS")  # S is never sharded


def _argmax(x: jax.Array) -> jax.Array:
    return mesh.constrain(jnp.argmax(x, axis=-1).astype(jnp.int32), "B")
