# SPDX-License-Identifier: Apache-2.0
"""Divergences between the next-token distributions of a teacher and a student, tile by tile over tokens."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from maxkit import mesh
from maxkit.ops import head_tiles

Divergence = Literal["forward", "reverse", "jensen_shannon"]
# Added to both masses outside a teacher's K tokens: less is rounding of a float32 sum of probabilities.
MASS_FLOOR = 1e-6
ABSENT = -1e30


def divergence(teacher: jax.Array, student: jax.Array, kind: Divergence = "forward", mixture: float = 0.5) -> jax.Array:
    """[...] of log-probabilities [..., V], in nats; outcomes whose teacher's log-prob is -1e30 or less are left out.

        forward          KL(P || Q) = sum_v P (log P - log Q)             P teacher, Q student
        reverse          KL(Q || P)
        jensen_shannon   w KL(P || M) + (1 - w) KL(Q || M),               M = w P + (1 - w) Q, w = `mixture`

    Agarwal et al. 2023 (GKD), arXiv 2306.13649, section 2. Checked against numpy in float64, 2e-6.
    """
    there = teacher > ABSENT / 2
    p, q = (jnp.where(there, x, 0.0) for x in (teacher, student))  # finite, also where they are left out

    def kl(a, b):
        return jnp.sum(jnp.where(there, jnp.exp(a) * (a - b), 0.0), axis=-1)

    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    mean = jnp.logaddexp(p + jnp.log(mixture), q + jnp.log1p(-mixture))
    return mixture * kl(p, mean) + (1 - mixture) * kl(q, mean)


def token_divergence(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    num_tiles: int = 1,
    kind: Divergence = "forward",
    mixture: float = 0.5,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Of every token the divergence from the teacher's distribution, and the log-prob of its target.

    Args:
        hidden, head: the student's, [B, T, D] and [V, D]; only they get a gradient.
        teacher_hidden, teacher_head: [B, T, D'] and [V, D'].
        targets: [B, T] int ids below V.
        mask: [B, T]; where it is 0 both results and the gradient are exactly 0.
        num_tiles: how many tiles the T tokens of a row are cut into: one tile's logits of both exist at a time.
        kind, mixture: which divergence (`divergence`).
        temperature: both logits are divided by it in the divergence; the log-prob of the target is at 1.
        soft_cap, teacher_soft_cap: of the logits, before the division.

    Returns:
        (divergence, logps), each [B, T] float32, in nats. The divergence is not multiplied by temperature^2.

    Checked against autodiff of the untiled formula, 2e-5 in float32 (tests/unit/test_divergence.py).
    """
    table = mesh.constrain(teacher_head.astype(teacher_hidden.dtype), "VD")
    function = functools.partial(_of_tile, kind, mixture, temperature, teacher_soft_cap)
    tiled = (targets, mask != 0, teacher_hidden)
    return head_tiles.per_token(function, hidden, head, tiled, table, num_tiles=num_tiles, soft_cap=soft_cap)


def _of_tile(kind, mixture, temperature, cap, logits, tile, table):
    y, counts, h = tile
    teacher = head_tiles.soft_capped(head_tiles.project(h, table), cap)
    teacher, student = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (teacher, logits))
    apart = divergence(teacher, student, kind, mixture)
    return _counted(apart, logits, y, counts)


def token_divergence_top_k(
    hidden: jax.Array,
    head: jax.Array,
    teacher_ids: jax.Array,
    teacher_logps: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    num_tiles: int = 1,
    kind: Divergence = "forward",
    mixture: float = 0.5,
    temperature: float = 1.0,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`token_divergence` from what is stored of a teacher: its K likeliest tokens and their log-probs.

    The missing mass is one more outcome, "any other token": 1 - sum_k P_k for the teacher, 1 - sum_k Q_k for the
    student, 1e-6 added to both. So nothing is renormalised, a student equal to the teacher has divergence 0, and
    otherwise the value is at most the divergence from the whole teacher (data processing inequality).

    Args:
        teacher_ids, teacher_logps: [B, T, K] int, float; the log-probs at `temperature`. Ids are distinct.
    """
    function = functools.partial(_of_top_k_tile, kind, mixture, temperature)
    tiled = (targets, mask != 0, teacher_ids, teacher_logps)
    return head_tiles.per_token(function, hidden, head, tiled, num_tiles=num_tiles, soft_cap=soft_cap)


def _of_top_k_tile(kind, mixture, temperature, logits, tile, _):
    y, counts, ids, logps = tile
    teacher = _dense(ids, logps, logits)
    student = jax.nn.log_softmax(logits / temperature, axis=-1)
    mass = 1.0 - jnp.sum(jnp.exp(logps.astype(jnp.float32)), axis=-1)
    other = jax.nn.logsumexp(jnp.where(teacher > ABSENT / 2, ABSENT, student), axis=-1)
    # One outcome more, in logs. The student's is a sum of what is there, not 1 minus a sum: it has a gradient at 0.
    teacher_other = jnp.log(jnp.maximum(mass, 0.0) + MASS_FLOOR)[..., None]
    student_other = jnp.logaddexp(other, jnp.log(MASS_FLOOR))[..., None]
    apart = divergence(teacher, student, kind, mixture) + divergence(teacher_other, student_other, kind, mixture)
    return _counted(apart, logits, y, counts)


def _dense(ids, logps, logits):
    """[B, t, V]: the stored log-probs where they belong, -1e30 elsewhere; no gather or scatter along a sharded V."""

    def put(dense, column):
        y, logp = column
        return jnp.where(head_tiles.hits(dense, y), logp[..., None], dense), None

    columns = (jnp.moveaxis(ids, -1, 0), jnp.moveaxis(logps.astype(jnp.float32), -1, 0))  # (K, B, t)
    start = jax.lax.stop_gradient(jnp.full_like(logits, ABSENT))
    return jax.lax.scan(put, start, columns, unroll=min(8, ids.shape[-1]))[0]


def _counted(apart, logits, y, counts):
    logps = head_tiles.picked(logits, y) - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(counts, apart, 0.0), jnp.where(counts, logps, 0.0)
