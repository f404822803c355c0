# SPDX-License-Identifier: Apache-2.0
"""A folder that maxkit wrote, opened by transformers itself."""

from pathlib import Path

import numpy as np
import pytest

from maxkit.formats.huggingface import HuggingFaceReader, write_huggingface

torch = pytest.importorskip("torch")
FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.mark.parametrize("name", ["llama_tiny_full", "llama_tiny_tied"])
@pytest.mark.parametrize("shard_bytes", [10**9, 15_000])
def test_transformers_loads_what_was_written(tmp_path, name, shard_bytes):
    from transformers import AutoModelForCausalLM

    source = HuggingFaceReader(FIXTURES / name)
    leaves = ((path, layer, source.read(path, layer)) for path, layer in source.addresses())
    write_huggingface(tmp_path, source.config, leaves, None, None, shard_bytes=shard_bytes)
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    wanted = AutoModelForCausalLM.from_pretrained(FIXTURES / name).state_dict()
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.state_dict().keys() == wanted.keys()
    for key, tensor in found.state_dict().items():
        assert tensor.dtype == wanted[key].dtype and torch.equal(tensor, wanted[key]), key
    stored = np.load(FIXTURES / name / "logits.npz")
    with torch.no_grad():
        logits = found.to(torch.float32)(torch.from_numpy(stored["tokens"])).logits.numpy()
    np.testing.assert_allclose(logits, stored["logits"], atol=1e-5)
