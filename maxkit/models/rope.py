# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split pairs, and its length scalings.

Frequencies and angles are always float32: rounding them to bfloat16 changes what a model says.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from maxkit.models.config import RopeScaling


def rotations(
    positions: jax.Array, dim: int, theta: float, scaling: RopeScaling | None, max_seq_len: int
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [B, T, dim/2] float32, for positions [B, T] and the `dim` dimensions that are turned."""
    frequencies, magnitude = _frequencies(positions, dim, theta, scaling, max_seq_len)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Return x [B, T, heads, H] turned by the angles [B, T, half] of its position, in its first 2 * half dimensions.

    Dimension i is paired with i + half, or with i + 1 when `interleaved`; what lies beyond stays as it is.
    """
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    wide = turned.astype(jnp.float32)
    cos, sin = cos[:, :, None], sin[:, :, None]
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        wide = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(turned.shape)
    else:
        first, second = jnp.split(wide, 2, axis=-1)
        wide = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = wide.astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def _frequencies(positions, dim, theta, scaling, max_seq_len) -> tuple[jax.Array, float]:
    plain = (1.0 / (theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim))).astype(np.float32)
    if scaling is None:
        return jnp.asarray(plain), 1.0
    original = scaling.original_max_seq_len or max_seq_len
    if scaling.kind == "linear":
        return jnp.asarray(plain / np.float32(scaling.factor)), 1.0
    if scaling.kind == "llama3":
        return jnp.asarray(_llama3(plain, scaling, original)), 1.0
    if scaling.kind == "yarn":
        return jnp.asarray(_yarn(plain, scaling, original, dim, theta)), _yarn_magnitude(scaling)
    if scaling.kind == "longrope":
        return _longrope(positions, plain, scaling, original), _longrope_magnitude(scaling, original)
    return _dynamic(positions, scaling, original, dim, theta), 1.0


def _longrope(positions, plain, scaling, original):
    """A divisor per pair (Ding et al. 2024, arXiv 2402.13753): one set up to the original length, another beyond it.

    Which set holds for the whole batch is decided by the longest position in it, as in transformers.
    """
    short, long = (jnp.asarray(plain / np.asarray(f, np.float32)) for f in (scaling.short_factor, scaling.long_factor))
    return jnp.where(jnp.max(positions) + 1 > original, long, short)


def _longrope_magnitude(scaling, original) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else math.sqrt(1 + math.log(scaling.factor) / math.log(original))


def _llama3(plain, scaling, original):
    """Long wavelengths are divided by the factor, short ones kept, a linear blend between (Llama 3.1 model card)."""
    wavelength = 2 * math.pi / plain
    width = max(scaling.high_freq_factor - scaling.low_freq_factor, 1e-6)  # both are 1 in Llama 4: a step, no blend
    blend = (original / wavelength - scaling.low_freq_factor) / width
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * plain / scaling.factor + blend * plain).astype(np.float32)


def _yarn(plain, scaling, original, head_dim, theta):
    """NTK-by-parts (Peng et al. 2023, arXiv 2309.00071, section 3.2): a ramp between the two rotation counts."""

    def dimension(rotations_at_original):
        return head_dim * math.log(original / (rotations_at_original * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return (plain / scaling.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def _yarn_magnitude(scaling) -> float:
    """The attention temperature of YaRN (eq. 22), folded into cos and sin."""

    def mscale(factor, weight=1.0):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.factor, scaling.mscale) / mscale(scaling.factor, scaling.mscale_all_dim)
    return mscale(scaling.factor)


def _dynamic(positions, scaling, original, head_dim, theta):
    """The base grows with the longest position in the batch once it passes the original length (dynamic NTK)."""
    length = jnp.maximum(jnp.max(positions) + 1, original).astype(jnp.float32)
    stretch = scaling.factor * length / original - (scaling.factor - 1)
    base = theta * stretch ** (head_dim / (head_dim - 2))
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / base**exponent
