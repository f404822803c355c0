# SPDX-License-Identifier: Apache-2.0
"""Attention and its masks against numpy in float64, written as loops over queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxkit import ops

B, T, S, H = 2, 7, 11, 8
# A softmax over at most 11 keys and two products in float32: 2 ** -24 times a few tens.
FLOAT32 = dict(rtol=1e-5, atol=1e-6)


def reference(query, key, value, mask, scale):
    """One query at a time; a query that sees nothing gets the mean of all values."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    heads, groups = query.shape[2], query.shape[2] // key.shape[2]
    out = np.zeros(query.shape)
    for b, t, n in np.ndindex(*query.shape[:2], heads):
        seen = np.flatnonzero(mask[b, t])
        if len(seen):
            scores = key[b, seen, n // groups] @ query[b, t, n] * scale
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ value[b, seen, n // groups] / weights.sum()
        else:
            out[b, t, n] = value[b, :, n // groups].mean(0)
    return out


def arrays(heads, kv_heads, dtype="float32", length=S):
    draw = np.random.default_rng(0)
    shapes = (B, T, heads, H), (B, length, kv_heads, H), (B, length, kv_heads, H)
    return [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]


def random_mask():
    mask = np.random.default_rng(1).integers(0, 2, (B, T, S)).astype(bool)
    mask[0, 3] = mask[1, 0] = False
    return mask


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 1), (9, 3), (1, 1)])
def test_grouped_query_attention(heads, kv_heads):
    query, key, value = arrays(heads, kv_heads)
    mask = random_mask()
    found = ops.reference_attention(query, key, value, jnp.asarray(mask), scale=0.31)
    np.testing.assert_allclose(found, reference(query, key, value, mask, 0.31), **FLOAT32)


def test_bfloat16_keeps_its_type_and_scores_in_float32():
    query, key, value = arrays(6, 2, "bfloat16")
    query = query * 8  # scores of size 60: rounded to bfloat16 they would be off by 0.2
    mask = random_mask()
    found = ops.reference_attention(query, key, value, jnp.asarray(mask), scale=H**-0.5)
    want = reference(*(x.astype(jnp.float32) for x in (query, key, value)), mask, H**-0.5)
    assert found.dtype == jnp.bfloat16
    # Rounding a result between 2 and 4 costs 2 ** -7, rounding the weights 2 ** -9 of it.
    np.testing.assert_allclose(found.astype(jnp.float32), want, atol=2**-7 + 4 * 2**-9)


def test_a_row_that_sees_nothing_is_finite_also_in_its_gradient():
    query, key, value = arrays(4, 2)
    mask = jnp.zeros((B, T, S), bool)
    out, gradients = jax.value_and_grad(lambda *qkv: ops.reference_attention(*qkv, mask, scale=1.0).sum(), argnums=(0, 1, 2))(
        query, key, value
    )
    assert np.isfinite(out) and all(np.isfinite(g).all() for g in gradients)
    found = ops.reference_attention(query, key, value, mask, scale=1.0)
    np.testing.assert_allclose(found[:, 0], value.mean(1).repeat(2, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_the_mask_is_causal_windowed_and_within_segments(window):
    draw = np.random.default_rng(2)
    query_positions, key_positions = draw.integers(0, 8, (B, T)), draw.integers(-1, 8, (B, S))
    query_segments, key_segments = draw.integers(0, 3, (B, T)), draw.integers(0, 3, (B, S))
    extra = draw.integers(0, 2, (B, T, S)).astype(bool)
    sight = ops.Visibility(*map(jnp.asarray, (query_positions, key_positions, query_segments, key_segments, extra)))
    found = np.asarray(sight.mask(ops.Span(window)))
    for b, t, s in np.ndindex(B, T, S):
        back = query_positions[b, t] - key_positions[b, s]
        want = (
            back >= 0
            and key_positions[b, s] >= 0  # -1 is an empty slot of a cache
            and (window is None or back < window)
            and query_segments[b, t] == key_segments[b, s]
            and extra[b, t, s]
        )
        assert found[b, t, s] == want


def test_a_window_of_one_sees_itself_alone():
    positions = jnp.arange(5)[None]
    np.testing.assert_array_equal(ops.Visibility(positions, positions).mask(ops.Span(1))[0], np.eye(5, dtype=bool))


def test_nothing_flows_from_a_masked_key():
    """Not even a NaN-free trace of it: the output is bit-equal whatever the hidden keys and values are."""
    query, key, value = arrays(6, 2)
    mask = random_mask()
    mask[0, 3, 2] = mask[1, 0, 2] = True  # every query sees something
    hidden = ~mask.any(axis=1)[:, :, None, None] | (np.arange(S) == 4)[None, :, None, None]
    mask[:, :, 4] = False
    found = ops.reference_attention(query, key, value, jnp.asarray(mask), scale=1.0)
    other = [jnp.where(hidden, 1e4, x) for x in (key, value)]
    np.testing.assert_array_equal(found, ops.reference_attention(query, *other, jnp.asarray(mask), scale=1.0))
