# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule: linear attention whose state forgets and corrects itself, and the short convolution before it.

A head keeps a matrix S [H, Hv] that maps keys to values. Token t does (Yang et al. 2024, arXiv 2412.06464, eq. 10)

    S <- exp(g_t) S,    S <- S + k_t (beta_t (v_t - S^T k_t))^T,    o_t = S^T q_t

`step` is that, one token long. `gated_delta` is the same for a whole row, cut into chunks: inside a chunk matrix
products and one triangular inverse, between chunks a scan that carries S. Everything is float32.

Rows may be packed. `count_restarts` numbers the stretches of a row between which neither S nor the convolution may
carry anything over. Two head dimensions meet here: in einsums H is the key's and h is the value's; X counts chunks.
"""

import jax
import jax.numpy as jnp

from maxkit import mesh


def count_restarts(segments: jax.Array, before: jax.Array) -> jax.Array:
    """How often a row has begun a new segment, up to and including each token: [B, T] int32.

    segments [B, T] with 0 for padding, which never begins one; before [B]: the segment of what was read earlier, 0 if
    nothing was. Tokens counted 0 go on from the state given, those that are counted alike belong together.
    """
    history = jnp.concatenate([before[:, None], segments], axis=1)
    # The segment of the last real token: padding takes over what is on its left.
    history = jax.lax.associative_scan(lambda left, right: jnp.where(right == 0, left, right), history, axis=1)
    return jnp.cumsum(history[:, 1:] != history[:, :-1], axis=1, dtype=jnp.int32)


def causal_conv(x: jax.Array, kernel: jax.Array, tail: jax.Array, restarts: jax.Array) -> jax.Array:
    """y_t = sum over w of kernel_w x_(t - W + 1 + w), one filter per channel, inside a segment.

    Args:
        x: [B, T, N, H], zero where there is padding; any float type, summed in float32.
        kernel: [N, H, W]; the last tap is the token itself.
        tail: [B, W - 1, N, H]: what came before x, from `next_tail`; zeros at the start.
        restarts: [B, T] from `count_restarts`.

    Returns:
        [B, T, N, H] float32.
    """
    length, width = x.shape[1], kernel.shape[-1]
    x = jnp.concatenate([tail.astype(x.dtype), x], axis=1).astype(jnp.float32)
    owners = _with_tail(restarts, width - 1)
    y = jnp.zeros_like(x[:, :length])
    for tap in range(width):
        there = (owners[:, tap : tap + length] == restarts)[..., None, None]
        y += jnp.where(there, x[:, tap : tap + length], 0) * kernel[..., tap].astype(jnp.float32)
    return y


def next_tail(x: jax.Array, tail: jax.Array, restarts: jax.Array, count: jax.Array) -> jax.Array:
    """The W - 1 tokens that the convolution of the next call begins with, in the type of `tail` [B, W - 1, N, H].

    x [B, T, N, H], of which the first `count` [B] tokens are real, or what is not is on the left. What is not of the
    last segment is zero. A row without a real token keeps its tail.
    """
    width = tail.shape[1]
    mine = _with_tail(restarts, width) == restarts[:, -1:]
    kept = jnp.where(mine[..., None, None], jnp.concatenate([tail, x.astype(tail.dtype)], axis=1), 0)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width))(kept, count)


def _with_tail(restarts: jax.Array, width: int) -> jax.Array:
    """[B, width + T]: the tail is of the segment that the row goes on from."""
    return jnp.pad(restarts, [(0, 0), (width, 0)])


def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Scale to length 1 over the last dimension: x / sqrt(|x|^2 + eps), float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)


def step(
    query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array, beta: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token of every row: (output [B, N, Hv], new state), float32.

    query, key [B, N, H]; value [B, N, Hv]; log_decay <= 0 and beta [B, N]; state [B, N, H, Hv]. log_decay -inf empties
    the state first; log_decay 0 with beta 0 leaves it alone.
    """
    state = state * jnp.exp(log_decay)[..., None, None]
    delta = (value - mesh.einsum("BNHh,BNH->BNh", state, key)) * beta[..., None]
    state = state + key[..., None] * delta[:, :, None, :]
    return mesh.einsum("BNHh,BNH->BNh", state, query), state


def gated_delta(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    restarts: jax.Array,
    state: jax.Array,
    *,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule over rows of any length.

    Args:
        query, key: [B, T, N, H], of unit length; scale the query before.
        value: [B, T, N, Hv].
        log_decay: [B, T, N], at most 0; beta: [B, T, N] in [0, 1]. Both 0 where there is padding.
        restarts: [B, T] from `count_restarts`: the state is emptied wherever it grows.
        state: [B, N, H, Hv] float32, what tokens with restarts 0 go on from.
        chunk_size: a power of two; changes rounding and speed only.

    Returns:
        (outputs [B, T, N, Hv], state after the last token), float32. Checked against `step` in float64 (2e-5), its
        gradients against those of `step` (1e-4): tests/unit/test_gated_delta.py.
    """
    length = query.shape[1]
    query, key, value, log_decay, beta = (x.astype(jnp.float32) for x in (query, key, value, log_decay, beta))
    if length == 1:
        log_decay = jnp.where(restarts[..., None] > 0, -jnp.inf, log_decay)
        output, state = step(query[:, 0], key[:, 0], value[:, 0], log_decay[:, 0], beta[:, 0], state)
        return output[:, None], state
    chunk_size = min(chunk_size, 1 << (length - 1).bit_length())
    query, key, value, log_decay, beta = (_chunks(x, chunk_size) for x in (query, key, value, log_decay, beta))
    inside, enter, leave, survive = _decays(log_decay, _chunk_restarts(restarts, chunk_size))
    # With decayed similarities of keys A (strictly lower), what the tokens of a chunk write is U with
    # (1 + A) U = beta V - (beta enter K) S: one inverse serves the values and the state alike (section 3.3).
    weighted = key * beta[..., None]
    similar = jnp.tril(mesh.einsum("XBNTH,XBNSH->XBNTS", weighted, key) * inside, -1)
    inverse = _unit_lower_inverse(similar)
    values = mesh.einsum("XBNTS,XBNSh->XBNTh", inverse, value * beta[..., None])
    reads = mesh.einsum("XBNTS,XBNSH->XBNTH", inverse, weighted * enter[..., None])
    attends = mesh.einsum("XBNTH,XBNSH->XBNTS", query, key) * inside

    def body(state, chunk):
        values, reads, query, attends, key, survive = chunk
        written = values - mesh.einsum("BNTH,BNHh->BNTh", reads, state)
        output = mesh.einsum("BNTH,BNHh->BNTh", query, state) + mesh.einsum("BNTS,BNSh->BNTh", attends, written)
        return state * survive[..., None, None] + mesh.einsum("BNTH,BNTh->BNHh", key, written), output

    chunks = (values, reads, query * enter[..., None], attends, key * leave[..., None], survive)
    state, output = jax.lax.scan(body, state, chunks)
    output = output.transpose(1, 0, 3, 2, 4)  # (B, X, C, N, Hv)
    rows, count, size, heads, width = output.shape
    return output.reshape(rows, count * size, heads, width)[:, :length], state


def _decays(log_decay: jax.Array, restarts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What is left of a write at a later read, 0 where a restart lies between.

    Of log_decay [X, B, N, C] and restarts [X, B, 1 + C] (the first is that of the token before the chunk): between
    tokens of a chunk [X, B, N, C, C], from the state before it to its tokens [X, B, N, C], from its tokens to the state
    after it [X, B, N, C], from state to state [X, B, N].
    """
    total = jnp.cumsum(log_decay, axis=-1)
    before, last, restarts = restarts[:, :, :1], restarts[:, :, -1:], restarts[:, :, 1:]

    def left(exponent, kept):
        return jnp.exp(jnp.where(kept[:, :, None], exponent, -jnp.inf))

    # Masked before exp: above the diagonal the difference is positive and may overflow.
    pairs = (restarts[..., :, None] == restarts[..., None, :]) & jnp.tri(restarts.shape[-1], dtype=bool)
    inside = left(total[..., :, None] - total[..., None, :], pairs)
    leave = left(total[..., -1:] - total, restarts == last)
    return inside, left(total, restarts == before), leave, left(total[..., -1:], last == before)[..., 0]


def _unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(1 + lower)^-1 of strictly lower triangular [X, B, N, C, C], C a power of two.

    By halves: the inverse of [[P, 0], [Q, R]] is [[P', 0], [-R' Q P', R']]. Matrix products only, which every mesh
    shards; powers of `lower`, the other way to have only products, overflow where keys repeat.
    """
    size = lower.shape[-1]
    if size == 1:
        return jnp.ones_like(lower)
    half = size // 2
    blocks = jnp.concatenate([lower[..., :half, :half], lower[..., half:, half:]])
    first, second = jnp.split(_unit_lower_inverse(blocks), 2)
    corner = mesh.einsum("XBNTU,XBNUS->XBNTS", lower[..., half:, :half], first)
    corner = -mesh.einsum("XBNTU,XBNUS->XBNTS", second, corner)
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, N, ...] as [X, B, N, C, ...]; T is filled up with zeros, tokens that change nothing."""
    rows, length, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * len(rest))
    x = x.reshape(rows, -1, size, *rest)
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def _chunk_restarts(restarts: jax.Array, size: int) -> jax.Array:
    """[B, T] as [X, B, 1 + C], each chunk with the token before it (0 before the first)."""
    rows, length = restarts.shape
    restarts = jnp.pad(restarts, [(0, 0), (0, -length % size)])
    restarts = jax.lax.cummax(restarts, axis=1).reshape(rows, -1, size)  # what fills up T goes on with the last
    before = jnp.pad(restarts[:, :-1, -1], [(0, 0), (1, 0)])
    return jnp.concatenate([before[..., None], restarts], axis=-1).swapaxes(0, 1)
