# SPDX-License-Identifier: Apache-2.0
"""Options of real questions under SmolLM2-135M-Instruct: the log-likelihoods of transformers (make_eval.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

import maxkit
from maxkit import eval as evaluation

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "eval_smollm2.json").read_text())


@pytest.fixture(scope="module")
def results():
    loaded = maxkit.load("smollm2-135m-instruct", dtype="float32")
    return evaluation.evaluate(loaded, [*FIXTURE, "sums", "pydoc"], limit=3, batch_size=4, seq_len=32)


@pytest.mark.parametrize("name", FIXTURE)
def test_log_likelihoods_are_those_of_transformers(results, name):
    found = [item.logps for item in results[name].items]
    assert len(found) == len(FIXTURE[name]) == 3
    for ours, theirs in zip(found, FIXTURE[name], strict=True):
        # Sums over up to 30 tokens, float32, other orders of additions: the largest difference seen is below 1e-4.
        np.testing.assert_allclose(ours, theirs, atol=5e-4)


def test_what_the_model_writes_and_reads(results):
    assert [(item.problem.prompt[0]["content"], item.text, item.passed) for item in results["sums"].items][0] == (
        "What is 2 + 3?",
        "2 + 3 = 5",
        True,
    )
    assert results["pydoc"].items[0].tokens == 32 and results["pydoc"].report.kept >= 1
    assert results["pydoc"].metrics["nll"] == pytest.approx(sum(i.nll for i in results["pydoc"].items) / 96)
