# SPDX-License-Identifier: Apache-2.0
"""Every family against transformers: tensors, logits, packed rows, decoding, and the folder that is written again.

The fixtures are tiny random models (`families.py`, `make_families.py`); their weights are drawn anew here.
"""

import json

import numpy as np
import pytest
from golden.families import CASES, FIXTURES, checksum, write_folder

from maxkit.formats.huggingface import HuggingFaceReader, write_huggingface
from maxkit.formats.safetensors import SafetensorsFile


def leaves(reader):
    return ((path, layer, reader.read(path, layer)) for path, layer in reader.addresses())


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_read_and_written_again(tmp_path, name):
    tensors = write_folder(tmp_path / "in", name)
    assert checksum(tensors) == np.load(FIXTURES / name / "golden.npz")["checksum"], "not the weights of the fixture"
    reader = HuggingFaceReader(tmp_path / "in")
    assert (reader.missing_keys(), reader.unused_keys(), reader.ignored_keys()) == ([], [], {})
    for path, layer in reader.addresses():
        assert reader.read(path, layer).shape == reader.shape(path, layer)
    given = list(leaves(reader))
    np.random.default_rng(0).shuffle(given)  # any order will do
    write_huggingface(tmp_path / "out", reader.config, given, None, None)
    written = SafetensorsFile(tmp_path / "out/model.safetensors")
    assert written.entries.keys() == tensors.keys()
    for key, tensor in tensors.items():
        found = written.read(key)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and found.tobytes() == tensor.tobytes(), key
    assert HuggingFaceReader(tmp_path / "out").config == reader.config
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [CASES[name].model]
