# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of options, live: transformers on the exported SmolLM2 beside maxkit."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import maxkit
from maxkit import eval as evaluation

pytest.importorskip("torch")
MAKER = Path(__file__).parents[1] / "golden" / "make_eval.py"


def test_options_are_as_likely_as_in_transformers(tmp_path):
    spec = importlib.util.spec_from_file_location("make_eval", MAKER)
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    loaded = maxkit.load("smollm2-135m-instruct", dtype="float32")
    maxkit.save(loaded, tmp_path / "model", format="hf")
    theirs = maker.by_transformers(tmp_path / "model", 2)
    ours = evaluation.evaluate(loaded, list(theirs), limit=2, batch_size=2)
    for name, rows in theirs.items():
        for item, logps in zip(ours[name].items, rows, strict=True):
            np.testing.assert_allclose(item.logps, logps, atol=5e-4)
