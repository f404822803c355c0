# SPDX-License-Identifier: Apache-2.0
"""Folders of every family that maxkit wrote, opened by transformers itself: the same logits as before."""

import numpy as np
import pytest
from golden.families import CASES, FIXTURES, write_folder

from maxkit.formats.huggingface import HuggingFaceReader, write_huggingface

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_was_written(tmp_path, name):
    from transformers import AutoModelForCausalLM

    write_folder(tmp_path / "in", name)
    source = HuggingFaceReader(tmp_path / "in")
    leaves = ((path, layer, source.read(path, layer)) for path, layer in source.addresses())
    write_huggingface(tmp_path / "out", source.config, leaves, None, None, shard_bytes=40_000)
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert type(model).__name__ == CASES[name].model
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    golden = np.load(FIXTURES / name / "golden.npz")
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(golden["tokens"]).long(), use_cache=False).logits.numpy()
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-5 * golden["logits"].std(), rtol=0)
