# SPDX-License-Identifier: Apache-2.0
"""The formulas that tunix_parity.json lacks, against numpy in float64 written out from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxkit.errors import UserError
from maxkit.objectives import Preference, policy, preference, segments
from maxkit.rl import advantages

FLOAT32 = dict(rtol=2e-5, atol=2e-6)


def draws(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


# ---------------------------------------------------------------- segments


def test_sums_per_segment_and_back():
    values = draws(3, 9)
    ids = np.asarray([[1, 1, 2, 2, 2, 3, 0, 0, 0], [1] * 9, [0] * 9])
    found = segments.sums(jnp.asarray(values), jnp.asarray(ids))
    want = np.stack([[row[i == n].sum() for n in range(10)] for row, i in zip(values, ids, strict=True)])
    np.testing.assert_allclose(found, want, **FLOAT32)
    back = segments.spread(found, jnp.asarray(ids))
    np.testing.assert_allclose(back, np.take_along_axis(want, ids, 1), **FLOAT32)
    chosen, rejected = segments.pairs(found)
    np.testing.assert_array_equal(chosen, found[:, [1, 3, 5, 7]])
    np.testing.assert_array_equal(rejected, found[:, [2, 4, 6, 8]])


# ---------------------------------------------------------------- preference

MARGINS = np.concatenate([draws(20, scale=5), [0.0, -200.0, 200.0]])


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def test_preference_losses():
    h, beta, s = MARGINS, 0.3, 0.2
    np.testing.assert_allclose(preference.ipo(h, beta), (h - 1 / (2 * beta)) ** 2, rtol=2e-5)
    np.testing.assert_allclose(preference.hinge(h, beta), np.maximum(0, 1 - beta * h), **FLOAT32)
    cdpo = -(1 - s) * log_sigmoid(beta * h) - s * log_sigmoid(-beta * h)
    np.testing.assert_allclose(preference.sigmoid(h, beta, s), cdpo, **FLOAT32)
    robust = (-(1 - s) * log_sigmoid(beta * h) + s * log_sigmoid(-beta * h)) / (1 - 2 * s)
    np.testing.assert_allclose(preference.robust(h, beta, s), robust, **FLOAT32)


def test_robust_undoes_wrong_labels_in_the_mean():
    """Labels flipped with chance s: the expected robust loss is DPO's on right labels (arXiv 2403.00409, lemma 3.1)."""
    s = 0.2
    mean = (1 - s) * preference.robust(MARGINS, 0.3, s) + s * preference.robust(-MARGINS, 0.3, s)
    np.testing.assert_allclose(mean, preference.sigmoid(MARGINS, 0.3), rtol=1e-4, atol=1e-5)


def test_losses_of_mean_log_probs():
    chosen, rejected = -np.abs(draws(20, seed=1)) - 0.01, -np.abs(draws(20, seed=2)) - 0.01
    simpo = -log_sigmoid(2.5 * (chosen - rejected) - 0.7)
    np.testing.assert_allclose(preference.simpo(chosen, rejected, 2.5, 0.7), simpo, **FLOAT32)
    odds = lambda x: np.exp(x) / (1 - np.exp(x))  # noqa: E731
    want = -log_sigmoid(np.log(odds(chosen) / odds(rejected)))
    np.testing.assert_allclose(preference.odds_ratio(chosen, rejected), want, **FLOAT32)


def test_odds_of_a_certain_answer_have_a_finite_gradient():
    for chosen, rejected in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-500.0, -1.0)):
        found = jax.value_and_grad(preference.odds_ratio, argnums=(0, 1))(chosen, rejected)
        assert all(np.isfinite(x) for x in jax.tree.leaves(found))


@pytest.mark.parametrize("loss", preference.LOSSES)
def test_every_loss_falls_as_the_margin_of_chosen_grows(loss):
    objective = Preference(loss, beta=0.5)
    slope = jax.grad(lambda c: objective.losses(c, jnp.float32(-1.0), jnp.float32(-1.0), jnp.float32(-1.0)))
    assert slope(jnp.float32(-1.2)) < 0


# ---------------------------------------------------------------- policy

MASK = np.asarray([[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], np.float32)
IDS = np.asarray([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 1, 2, 2, 2], [0] * 6])
SEQUENCES = [(0, [0, 1, 2, 3, 4]), (1, [1, 2]), (2, [1, 2]), (2, [4, 5])]


def test_aggregations_of_packed_rows():
    values = draws(4, 6)
    sums, lengths = np.asarray([values[r, c].sum() for r, c in SEQUENCES]), np.asarray([5, 2, 2, 2])
    want = {
        "token_mean": sums.sum() / 11,
        "sequence_mean": (sums / lengths).mean(),
        "sequence_sum": sums.mean(),
        "sequence_scale": sums.mean() / 8,
    }
    assert set(want) == set(policy.AGGREGATIONS)
    for name, value in want.items():
        found = policy.aggregate(values, MASK, IDS, name, 8 if name == "sequence_scale" else None)
        np.testing.assert_allclose(found, value, rtol=1e-5)


def test_sequence_ratio_is_the_mean_with_each_tokens_own_gradient():
    logps, old = draws(4, 6), draws(4, 6, seed=1)
    found = policy.log_ratios(jnp.asarray(logps), jnp.asarray(old), MASK, IDS, "sequence")
    for row, columns in SEQUENCES:
        np.testing.assert_allclose(found[row, np.asarray(columns)], (logps - old)[row, columns].mean(), rtol=1e-5)
    assert not np.asarray(found)[MASK == 0].any()
    slope = jax.grad(lambda x: policy.log_ratios(x, jnp.asarray(old), MASK, IDS, "sequence").sum())(jnp.asarray(logps))
    np.testing.assert_array_equal(slope, MASK)


@pytest.mark.parametrize("level", policy.RATIO_LEVELS)
def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_is_the_policy_gradient(level):
    logps, gain = jnp.asarray(draws(4, 6), jnp.float32), jnp.asarray(draws(4, 6, seed=1), jnp.float32)

    def loss(logps):
        ratio = policy.log_ratios(logps, None, MASK, IDS, level)
        return policy.aggregate(policy.clipped_surrogate(ratio, gain), MASK, IDS, "token_mean"), ratio

    gradient, ratio = jax.grad(loss, has_aux=True)(logps)
    assert not np.asarray(ratio).any()
    np.testing.assert_allclose(gradient, -gain * MASK / 11, rtol=1e-5)


def test_clipping():
    """On a grid of ratios, both signs: value, where the gradient is 0, and what is counted as clipped."""
    ratio, gain = np.meshgrid([0.3, 0.75, 0.9, 1.0, 1.1, 1.25, 1.4, 4.0], [-2.0, 0.0, 1.5])
    low, high, dual = 0.2, 0.3, 3.0
    wanted = -np.minimum(ratio * gain, np.clip(ratio, 1 - low, 1 + high) * gain)
    find = lambda x: policy.clipped_surrogate(x, jnp.asarray(gain, jnp.float32), low, high)  # noqa: E731
    log_ratio = jnp.asarray(np.log(ratio), jnp.float32)
    np.testing.assert_allclose(find(log_ratio), wanted, **FLOAT32)
    below, above = policy.clipped(log_ratio, gain, low, high)
    np.testing.assert_array_equal(below, (ratio < 0.8) & (gain < 0))
    np.testing.assert_array_equal(above, (ratio > 1.3) & (gain > 0))
    gradient = np.asarray(jax.grad(lambda x: find(x).sum())(log_ratio))
    np.testing.assert_array_equal(gradient == 0, np.asarray(below | above) | (gain == 0))
    bounded = policy.clipped_surrogate(log_ratio, gain, low, high, dual)
    np.testing.assert_allclose(bounded, np.where(gain < 0, np.minimum(wanted, -dual * gain), wanted), **FLOAT32)
    assert (np.asarray(bounded) < wanted - 1).sum() == 1  # A = -2 at ratio 4


def test_kl_estimators():
    """In the mean over tokens drawn from the policy, k1 and k3 are the divergence; k3 is never negative."""
    p, q = (np.exp(x) / np.exp(x).sum() for x in (draws(6), draws(6, seed=1)))
    exact = (p * np.log(p / q)).sum()
    for name, wanted in (("k1", exact), ("k2", (p * np.log(p / q) ** 2 / 2).sum()), ("k3", exact)):
        assert (p * policy.kl(np.log(p), np.log(q), name)).sum() == pytest.approx(wanted, rel=1e-5), name
    assert (np.asarray(policy.kl(draws(99), draws(99, seed=1))) >= 0).all()


def test_absurd_log_probs_stay_finite():
    logps = jnp.asarray([[-500.0, -1.0, -1.0]])
    other = jnp.asarray([[-1.0, -500.0, -1.0]])

    def loss(logps):
        ratio = policy.log_ratios(logps, other, jnp.ones((1, 3)))
        return jnp.sum(policy.clipped_surrogate(ratio, -1.0) + policy.kl(logps, other))

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.value_and_grad(loss)(logps)))


# ---------------------------------------------------------------- advantages


def test_groups_of_one_reward_are_zero_and_counted():
    rewards = [0.1, 0.1, 0.1, 0.0, 0.5, 1.0, 7.3, 7.3, 7.3]
    np.testing.assert_array_equal(advantages.zero_variance(rewards, 3), [True, False, True])
    for estimate in (advantages.group_std, advantages.group_mean, advantages.leave_one_out):
        found = estimate(rewards, 3)
        assert not found[:3].any() and not found[6:].any() and found[3:6].sum() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(advantages.leave_one_out(rewards, 3)[3:6], [-0.75, 0.0, 0.75])


@pytest.mark.parametrize(
    ("rewards", "size", "words"),
    [
        ([1.0, 2.0, 3.0], 2, "not groups of 2"),
        ([[1.0, 2.0]], 2, r"shape \(1, 2\)"),
        ([1.0, 2.0], 1, "at least 2"),
        ([1.0, float("nan")], 2, "answer 1 is nan"),
    ],
)
def test_bad_rewards_are_refused(rewards, size, words):
    with pytest.raises(UserError, match=words):
        advantages.group_mean(rewards, size)
