# SPDX-License-Identifier: Apache-2.0
"""MXFP4 against transformers' own decoder, bit for bit."""

import numpy as np
import pytest

from maxkit.formats.quantized import decode_mxfp4

torch = pytest.importorskip("torch")


def test_mxfp4_decodes_as_in_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 8, 4, 16), dtype=np.uint8)
    scales = rng.integers(90, 160, (3, 8, 4), dtype=np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.bfloat16)
    ours = decode_mxfp4(blocks, scales).swapaxes(1, 2)  # transformers turns the result around
    assert theirs.shape == ours.shape
    np.testing.assert_array_equal(theirs.float().numpy(), ours.astype(np.float32))
