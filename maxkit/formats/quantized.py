# SPDX-License-Identifier: Apache-2.0
"""Quantised weights as model makers publish them, read into floats: MXFP4 and FP8 in blocks.

Only reading: maxkit stores floats. Not here: the keys they have (`tables.py`), GGUF's types (`gguf.py`).
"""

import ml_dtypes
import numpy as np

MXFP4_BLOCK = 32  # values that share a scale
FP8_BLOCK = 128  # rows and columns that share a scale
# E2M1: a sign, two bits of exponent, one of mantissa.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decode to bfloat16, in which every value of the format but those of extreme scales is exact.

    blocks [..., G, 16] uint8: two E2M1 values a byte, the first in the low nibble; scales [..., G] uint8: E8M0, a
    power of two with a bias of 127, where 255 is not a number. Returns [..., G * 32].
    OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3, 5.4.1 and 6.3.
    """
    assert blocks.shape == (*scales.shape, MXFP4_BLOCK // 2) and blocks.dtype == scales.dtype == np.uint8
    pairs = np.stack([blocks & 0x0F, blocks >> 4], axis=-1)  # (..., G, 16, 2)
    values = _E2M1[pairs].reshape(*scales.shape, MXFP4_BLOCK)
    powers = np.ldexp(np.float32(1), np.minimum(scales, 254).astype(np.int32) - 127)
    powers = np.where(scales == 255, np.float32(np.nan), powers)
    with np.errstate(over="ignore"):  # the largest values of the largest scale are infinite
        scaled = (values * powers[..., None]).astype(ml_dtypes.bfloat16)
    return scaled.reshape(*scales.shape[:-1], scales.shape[-1] * MXFP4_BLOCK)


def decode_fp8(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decode a matrix of float8_e4m3fn to float32: each block of 128 x 128, cut off at the edges, has one factor.

    weight [R, C]; scales float32 [ceil(R / 128), ceil(C / 128)]: the factors to multiply with (files call them
    `weight_scale_inv`). DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2.
    """
    rows, columns = weight.shape
    assert scales.shape == (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)), (weight.shape, scales.shape)
    result = weight.astype(np.float32)
    for i, j in np.ndindex(*scales.shape):
        result[i * FP8_BLOCK : (i + 1) * FP8_BLOCK, j * FP8_BLOCK : (j + 1) * FP8_BLOCK] *= scales[i, j]
    return result
