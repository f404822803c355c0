# SPDX-License-Identifier: Apache-2.0
"""Divergences from a teacher: the formulas against numpy in float64, the tiles against the formulas with all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxkit import ops
from maxkit.ops.divergence import MASS_FLOOR

B, T, D, WIDER, V, K = 2, 7, 8, 12, 19, 4
KINDS = ("forward", "reverse", "jensen_shannon")
MIXTURE, TEMPERATURE, CAP = 0.3, 1.7, 5.0
# float32 sums of 19 terms of size 1, and of 14 tokens where they are gradients.
FLOAT32 = dict(rtol=2e-5, atol=2e-5)


def exact(p, q, kind):
    """In float64, of probabilities."""
    kl = lambda a, b: (a * np.log(a / b)).sum(-1)  # noqa: E731
    m = MIXTURE * p + (1 - MIXTURE) * q
    return {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "jensen_shannon": lambda: MIXTURE * kl(p, m) + (1 - MIXTURE) * kl(q, m),
    }[kind]()


def softmax(logits):
    e = np.exp(np.asarray(logits, np.float64))
    return e / e.sum(-1, keepdims=True)


@functools.cache
def inputs():
    draw = np.random.default_rng(0)
    hidden, theirs = draw.normal(size=(B, T, D)), draw.normal(size=(B, T, WIDER))
    head, their_head = draw.normal(size=(V, D)), draw.normal(size=(V, WIDER)) * 0.5
    targets, mask = draw.integers(0, V, (B, T)), np.ones((B, T))
    mask[0, 2], mask[1, 4:] = 0, 0
    floats = [x.astype(np.float32) for x in (hidden, head, theirs, their_head, mask)]
    return *floats[:4], targets.astype(np.int32), floats[4]


def probabilities():
    """(teacher, student) at TEMPERATURE in float64, and the student's at 1."""
    hidden, head, theirs, their_head = (np.asarray(x, np.float64) for x in inputs()[:4])
    teacher, student = theirs @ their_head.T, CAP * np.tanh(hidden @ head.T / CAP)
    return softmax(teacher / TEMPERATURE), softmax(student / TEMPERATURE), softmax(student)


@functools.cache
def top_k():
    teacher = probabilities()[0]
    ids = np.argsort(-teacher)[..., :K]
    return ids.astype(np.int32), np.log(np.take_along_axis(teacher, ids, -1)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind):
    p, q, _ = probabilities()
    found = ops.divergence(jnp.asarray(np.log(p), jnp.float32), jnp.asarray(np.log(q), jnp.float32), kind, MIXTURE)
    np.testing.assert_allclose(found, exact(p, q, kind), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(ops.divergence(jnp.log(p), jnp.log(p), kind), 0, atol=1e-6)


def test_jensen_shannon_goes_over_into_the_others():
    """Divided by the small weight it becomes forward and reverse KL (arXiv 2306.13649, section 2)."""
    p, q, _ = (jnp.asarray(np.log(x), jnp.float32) for x in probabilities())
    for mixture, kind in ((0.01, "forward"), (0.99, "reverse")):
        scaled = ops.divergence(p, q, "jensen_shannon", mixture) / min(mixture, 1 - mixture)
        np.testing.assert_allclose(scaled, ops.divergence(p, q, kind), rtol=0.1)


def tiled(kind, num_tiles, stored):
    """(divergence, logps, d hidden, d head) with another cotangent for every token and output."""
    hidden, head, theirs, their_head, targets, mask = inputs()
    how = dict(num_tiles=num_tiles, kind=kind, mixture=MIXTURE, temperature=TEMPERATURE, soft_cap=CAP)
    scale = jnp.linspace(-1.0, 2.0, B * T).reshape(B, T)

    def total(hidden, head):
        if stored:
            out = ops.token_divergence_top_k(hidden, head, *top_k(), targets, mask, **how)
        else:
            out = ops.token_divergence(hidden, head, theirs, their_head, targets, mask, **how)
        return jnp.sum(scale * out[0]) + 0.5 * jnp.sum(out[1]), out

    (_, values), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, head)
    return *values, *gradients


def untiled(kind, stored):
    """The same from all logits at once, by autodiff; the bucket of all other tokens written out."""
    hidden, head, _, _, targets, mask = inputs()
    teacher = jnp.asarray(probabilities()[0], jnp.float32)
    scale = jnp.linspace(-1.0, 2.0, B * T).reshape(B, T)

    def total(hidden, head):
        logits = CAP * jnp.tanh(jnp.einsum("btd,vd->btv", hidden, head) / CAP)
        p, q = teacher, jax.nn.softmax(logits / TEMPERATURE)
        if stored:
            ids = top_k()[0]
            p, q = (jnp.take_along_axis(x, ids, -1) for x in (p, q))
            p, q = (jnp.concatenate([x, 1 - x.sum(-1, keepdims=True) + MASS_FLOOR], axis=-1) for x in (p, q))
        m = MIXTURE * p + (1 - MIXTURE) * q
        kl = lambda a, b: (a * jnp.log(a / b)).sum(-1)  # noqa: E731
        js = MIXTURE * kl(p, m) + (1 - MIXTURE) * kl(q, m)
        apart = {"forward": kl(p, q), "reverse": kl(q, p), "jensen_shannon": js}[kind] * mask
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0] * mask
        return jnp.sum(scale * apart) + 0.5 * jnp.sum(logps), (apart, logps)

    (_, values), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, head)
    return *values, *gradients


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_untiled_formula(kind, stored):
    wanted = untiled(kind, stored)
    for num_tiles in (1, 3):
        for mine, autodiff in zip(tiled(kind, num_tiles, stored), wanted, strict=True):
            np.testing.assert_allclose(mine, autodiff, **FLOAT32)
    off = np.asarray(inputs()[5]) == 0
    assert not any(np.asarray(x)[off].any() for x in wanted[:3])
    if not stored:
        np.testing.assert_allclose(wanted[0], exact(*probabilities()[:2], kind) * ~off, **FLOAT32)


def from_top(logits, k, student, kind="forward"):
    """What `token_divergence_top_k` says of logits [1, T, V] and the k best of a teacher's."""
    logps, ids = jax.lax.top_k(jax.nn.log_softmax(logits), k)
    ones = jnp.ones(logits.shape[:2])
    return ops.token_divergence_top_k(student, jnp.eye(V), ids, logps, jnp.zeros(ones.shape, int), ones, kind=kind)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_missing_mass_is_one_more_outcome(kind):
    """Zero for a student equal to the teacher; never above the whole divergence, and equal to it with all tokens."""
    teacher, student = (jnp.asarray(np.random.default_rng(n).normal(size=(1, 50, V)) * 2, jnp.float32) for n in (0, 1))
    whole = ops.divergence(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student), kind)
    few, more, every = (from_top(teacher, k, student, kind) for k in (2, 8, V))
    assert (few <= more + 1e-5).all() and (more <= whole + 1e-5).all() and few.mean() < 0.9 * more.mean()
    np.testing.assert_allclose(every, whole, rtol=1e-4)
    for k in (1, 4, V):
        np.testing.assert_allclose(from_top(teacher, k, teacher, kind), 0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_certain_and_opposite_distributions_stay_finite(kind):
    """Logits of +-1000: probabilities of exactly 0 in float32."""
    teacher, student = (jnp.asarray(sign * 1000 * np.eye(V)[None, :4], jnp.float32) for sign in (1, -1))
    dense = lambda x: ops.divergence(jax.nn.log_softmax(teacher), jax.nn.log_softmax(x), kind).sum()  # noqa: E731
    few = lambda x: from_top(teacher, 2, x, kind).sum()  # noqa: E731
    for function in (dense, few):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.value_and_grad(function)(student)))
