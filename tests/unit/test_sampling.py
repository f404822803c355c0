# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxkit.errors import UserError
from maxkit.infer.sampling import Controls, controls, keep, sample

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -4.0], np.float32)
DRAWS = 20_000

draw = jax.jit(sample)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def allowed(logits, temperature, top_k, top_p):
    """The distribution after temperature, then top-k, then top-p, by sorting in float64."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    order = order[: top_k or len(order)]
    probabilities = softmax(scaled[order])
    order = order[: int(np.searchsorted(np.cumsum(probabilities), top_p) + 1)]
    out = np.zeros(len(logits))
    out[order] = softmax(scaled[order])
    return out


def frequencies(**how):
    """Relative frequencies of DRAWS rows that differ only in their request number."""
    tokens, _ = draw(np.tile(LOGITS, (DRAWS, 1)), controls(DRAWS, **how), np.full(DRAWS, 7, np.int32))
    return np.bincount(np.asarray(tokens), minlength=len(LOGITS)) / DRAWS


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"temperature": 3.0, "top_p": 0.6},
    ],
)
def test_draws_follow_the_distribution(how):
    expected = allowed(LOGITS, how["temperature"], how.get("top_k"), how.get("top_p", 1.0))
    found = frequencies(**how)
    assert (found[expected == 0] == 0).all()
    # Five standard deviations of a relative frequency.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-12).all()


def test_temperature_comes_before_top_p():
    # A mass of 0.6 needs two tokens at temperature 1, more at temperature 3.
    kept = [int((allowed(LOGITS, temperature, None, 0.6) > 0).sum()) for temperature in (1.0, 3.0)]
    assert kept == [2, 4]
    assert (frequencies(temperature=3.0, top_p=0.6) > 0).sum() == 4


def test_the_kept_set_is_the_smallest_and_full_settings_keep_all():
    scaled = np.random.default_rng(0).normal(size=(50, 101)).astype(np.float32)
    for k, p in [(0, 0.5), (10, 1.0), (10, 0.5), (500, 0.999), (1, 1.0), (0, 1e-6)]:
        kept = np.isfinite(keep(scaled, np.full(50, k, np.int32), np.full(50, p, np.float32)))
        for row, mask in zip(scaled, kept, strict=True):
            assert (mask == (allowed(row, 1.0, k, p) > 0)).all()
    assert np.isfinite(keep(scaled, np.zeros(50, np.int32), np.ones(50, np.float32))).all()


def test_greedy_rows_beside_drawn_ones_and_logps_of_the_full_scaled_distribution():
    how = controls(4, temperature=0.5, top_k=2)
    how = dataclasses.replace(how, temperature=np.array([0.0, 0.5, 0.0, 0.5], np.float32))
    logits = np.random.default_rng(1).normal(size=(4, 33)).astype(np.float32)
    tokens, logps = draw(logits, how, np.zeros(4, np.int32))
    assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax()
    for row, temperature in enumerate([1.0, 0.5, 1.0, 0.5]):
        expected = np.log(softmax(logits[row] / temperature))[tokens[row]]
        np.testing.assert_allclose(logps[row], expected, atol=1e-5)


def test_keys_depend_on_seed_request_and_position_alone():
    def tokens(how, position):
        logits = np.zeros((how.seed.shape[0], 1000), np.float32)
        return np.asarray(draw(logits, how, np.full(how.seed.shape[0], position, np.int32))[0])

    base = tokens(controls(8, temperature=1.0, seed=3), 5)
    assert len(set(base.tolist())) > 4  # equal rows draw differently
    assert (base == tokens(controls(8, temperature=1.0, seed=3), 5)).all()
    assert (base != tokens(controls(8, temperature=1.0, seed=4), 5)).any()
    assert (base != tokens(controls(8, temperature=1.0, seed=3), 6)).any()
    assert (base[2:] == tokens(controls(8, temperature=1.0, seed=3, first_request=2), 5)[:6]).all()
    shuffled = jax.tree.map(lambda x: x[::-1], controls(8, temperature=1.0, seed=3))
    assert (base[::-1] == tokens(shuffled, 5)).all()


def test_consecutive_positions_are_uncorrelated():
    how = controls(2000, temperature=1.0)
    noise = [draw(np.zeros((2000, 100), np.float32), how, np.full(2000, at, np.int32))[0] for at in (1, 2)]
    assert abs(np.corrcoef(np.asarray(noise))[0, 1]) < 0.1


def test_every_setting_runs_the_same_program():
    fresh = jax.jit(lambda *args: sample(*args))  # a function of its own has a cache of its own
    for how in [
        {},
        {"temperature": 0.3},
        {"temperature": 2.0, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.2, "seed": 9},
    ]:
        fresh(jnp.zeros((2, 8)), controls(2, **how), np.zeros(2, np.int32))
    assert fresh._cache_size() == 1


def test_bfloat16_logits_are_sampled_in_float32():
    _, logps = sample(jnp.asarray([LOGITS], jnp.bfloat16), controls(1), jnp.zeros(1, jnp.int32))
    assert logps.dtype == jnp.float32
    np.testing.assert_allclose(logps[0], np.log(softmax(LOGITS))[0], atol=1e-6)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_controls_are_refused(how, message):
    with pytest.raises(UserError, match=message):
        controls(1, **how)


def test_controls_are_one_record_per_row():
    how = controls(3, temperature=0.5, first_request=4)
    assert isinstance(how, Controls) and how.request.tolist() == [4, 5, 6] and how.top_k.tolist() == [0, 0, 0]
