# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: the rotation itself in float64, and the four scalings against transformers' own formulas.

transformers computes its frequencies with torch, which `.venv` does not have. The dozen torch functions that those
formulas call exist in numpy under the same names, so the very same source runs on numpy in float64.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers.modeling_rope_utils as hf

from maxkit.models.config import RopeScaling
from maxkit.models.rope import rotate, rotations

HEAD_DIM, THETA, MAX_SEQ_LEN = 16, 10000.0, 256
POSITIONS = jnp.asarray([[0, 1, 2, 63, 64, 511], [5, 4, 3, 2, 1, 0]], jnp.int32)

SCALINGS = {
    "linear": ({"factor": 4.0}, {}),
    "dynamic": ({"factor": 2.0}, {}),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"original_max_position_embeddings": 64},
    ),
    "yarn": ({"factor": 4.0}, {"original_max_position_embeddings": 64}),
    "yarn, all set": (
        {
            "factor": 40.0,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.2,
            "truncate": False,
        },
        {"original_max_position_embeddings": 64},
    ),
    "yarn, given temperature": ({"factor": 4.0, "attention_factor": 1.5}, {"original_max_position_embeddings": 64}),
}


class Float64(np.ndarray):
    """A numpy array with the method by which torch changes type and device: here always to float64."""

    def to(self, device=None, dtype=None):
        return self.astype(np.float64)


TORCH = types.SimpleNamespace(
    arange=lambda *limits, dtype=None, device=None: np.arange(*limits).view(Float64),
    clamp=np.clip,
    where=np.where,
    maximum=np.maximum,
    tensor=lambda value, dtype=None, device=None: np.asarray(value),
    Tensor=np.generic,
    int64=None,
    float=None,
    float32=None,
)


def transformers_frequencies(name, seq_len, monkeypatch):
    kind, (shared, extra) = name.split(",")[0], SCALINGS[name]
    parameters = {"rope_type": kind, "rope_theta": THETA, **shared, **extra}
    config = types.SimpleNamespace(
        rope_parameters=parameters,
        head_dim=HEAD_DIM,
        hidden_size=HEAD_DIM,
        num_attention_heads=1,
        max_position_embeddings=MAX_SEQ_LEN,
        standardize_rope_params=lambda: None,
    )
    monkeypatch.setattr(hf, "torch", TORCH, raising=False)
    frequencies, magnitude = hf.ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=seq_len)
    return np.asarray(frequencies, np.float64), magnitude


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(name, monkeypatch):
    """Angles in float32: 511 x 2 ** -24 = 3e-5 radians is what rounding the frequency alone makes of the largest.

    The angles are compared through their frequencies (from position 1) to 1e-6 relative, and through cos and sin.
    """
    shared, extra = SCALINGS[name]
    original = extra.get("original_max_position_embeddings")
    scaling = RopeScaling(kind=name.split(",")[0], original_max_seq_len=original, **shared)
    seq_len = int(POSITIONS.max()) + 1
    frequencies, magnitude = transformers_frequencies(name, seq_len, monkeypatch)
    cos, sin = rotations(POSITIONS, HEAD_DIM, THETA, scaling, MAX_SEQ_LEN)
    assert cos.dtype == sin.dtype == jnp.float32
    angles = np.asarray(POSITIONS)[..., None] * frequencies
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 1], frequencies, rtol=1e-6)
    np.testing.assert_allclose(cos, np.cos(angles) * magnitude, atol=1e-4)
    np.testing.assert_allclose(sin, np.sin(angles) * magnitude, atol=1e-4)


def test_dynamic_scaling_starts_beyond_the_original_length():
    scaling = RopeScaling(kind="dynamic", factor=2.0)
    positions = jnp.arange(MAX_SEQ_LEN)[None]
    short = rotations(positions, HEAD_DIM, THETA, scaling, MAX_SEQ_LEN)
    plain = rotations(positions, HEAD_DIM, THETA, None, MAX_SEQ_LEN)
    # The base is computed in float32 while tracing, hence not to the last bit: 256 radians x 1e-7.
    np.testing.assert_allclose(short[0], plain[0], atol=1e-4)
    longer = jax.jit(lambda p: rotations(p, HEAD_DIM, THETA, scaling, MAX_SEQ_LEN))(positions + 1)
    assert np.abs(longer[0][:, :-1] - plain[0][:, 1:]).max() > 1e-3


def test_plain_frequencies_in_float64():
    cos, sin = rotations(POSITIONS, HEAD_DIM, 500_000.0, None, MAX_SEQ_LEN)
    want = np.asarray(POSITIONS, np.float64)[..., None] * 500_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    np.testing.assert_allclose(cos, np.cos(want), atol=5e-5)
    np.testing.assert_allclose(sin, np.sin(want), atol=5e-5)


def test_rotation_is_the_complex_product_of_the_two_halves():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(*POSITIONS.shape, 3, HEAD_DIM)), jnp.float32)
    cos, sin = rotations(POSITIONS, HEAD_DIM, THETA, None, MAX_SEQ_LEN)
    pairs = np.asarray(x, np.complex128)[..., : HEAD_DIM // 2] + 1j * np.asarray(x)[..., HEAD_DIM // 2 :]
    turned = pairs * (np.asarray(cos, np.float64) + 1j * np.asarray(sin))[:, :, None]
    np.testing.assert_allclose(rotate(x, cos, sin), np.concatenate([turned.real, turned.imag], -1), atol=1e-6)


def test_scores_depend_on_the_distance_alone():
    draw = np.random.default_rng(0)
    query, key = (jnp.asarray(draw.normal(size=(1, 1, 1, HEAD_DIM)), jnp.float32) for _ in range(2))

    def score(q_at, k_at):
        turned = [
            rotate(x, *rotations(jnp.asarray([[at]]), HEAD_DIM, THETA, None, MAX_SEQ_LEN))
            for x, at in ((query, q_at), (key, k_at))
        ]
        return float((turned[0] * turned[1]).sum())

    # Up to the rounding of an angle near 1000 radians, 6e-5, times values of size 5.
    assert score(9, 4) == pytest.approx(score(1009, 1004), abs=1e-3)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_bfloat16_is_turned_in_float32():
    """A cos rounded to bfloat16 is off by 2 ** -9, and it is off for the same position in every layer."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(*POSITIONS.shape, 2, HEAD_DIM)), jnp.bfloat16)
    cos, sin = rotations(POSITIONS, HEAD_DIM, THETA, None, MAX_SEQ_LEN)
    found, wide = rotate(x, cos, sin), rotate(x.astype(jnp.float32), cos, sin)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), wide.astype(jnp.bfloat16).astype(jnp.float32))
