# SPDX-License-Identifier: Apache-2.0
"""MXFP4 and FP8 blocks packed by hand, against the values their formats give them."""

import ml_dtypes
import numpy as np

from maxkit.formats.quantized import decode_fp8, decode_mxfp4


def test_a_block_of_mxfp4_packed_by_hand():
    # Bytes of (second << 4 | first): every E2M1 value with both signs, twice.
    block = np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, np.uint8)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6] * 2)
    for scale, factor in ((127, 1.0), (128, 2.0), (120, 2.0**-7), (0, 2.0**-127), (250, 2.0**123)):
        found = decode_mxfp4(block[None], np.array([scale], np.uint8))
        assert found.dtype == ml_dtypes.bfloat16 and found.shape == (32,)
        np.testing.assert_array_equal(found.astype(np.float64), values * factor)
        np.testing.assert_array_equal(np.signbit(found.astype(np.float32)), np.signbit(values))
    assert np.isnan(decode_mxfp4(block[None], np.array([255], np.uint8)).astype(np.float32)).all()


def test_blocks_of_mxfp4_lie_one_behind_the_other():
    blocks = np.zeros((3, 2, 2, 16), np.uint8)
    blocks[1, 0, 1, 5] = 0x2A  # its 11th value is -1, its 12th is 1
    scales = np.full((3, 2, 2), 127, np.uint8)
    scales[1, 0, 1] = 130
    found = decode_mxfp4(blocks, scales).astype(np.float32)
    assert found.shape == (3, 2, 64)
    assert found[1, 0, 32 + 10] == -8 and found[1, 0, 32 + 11] == 8 and np.count_nonzero(found) == 2


def test_blocks_of_fp8_have_a_factor_each_and_are_cut_off_at_the_edges():
    weight = np.ones((130, 257), ml_dtypes.float8_e4m3fn)
    weight[0, 0], weight[129, 256], weight[5, 130] = -448, 0.001953125, 1.125  # largest, least subnormal, a mantissa
    scales = np.array([[1, 2, 3], [5, 7, 0.1]], np.float32)
    found = decode_fp8(weight, scales)
    assert found.dtype == np.float32 and found.shape == weight.shape
    assert (found[0, 0], found[129, 256], found[5, 130]) == (-448, np.float32(0.001953125) * np.float32(0.1), 2.25)
    assert (found[127, 127], found[128, 127], found[128, 128], found[127, 256]) == (1, 5, 7, 3)
