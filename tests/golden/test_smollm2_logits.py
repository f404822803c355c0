# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct against the logits and hidden states that transformers computed (make_smollm2_cut.py)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxkit.checkpoint.load import load
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition

FIXTURE = Path(__file__).parent.parent / "fixtures" / "smollm2" / "logits_cut.npz"
# Two float32 programs over 30 layers, logits up to 40: measured 1.1e-4.
TOLERANCE = 2e-3
# The residual stream of this model reaches values in the thousands, so its tolerance is relative: measured 1.6e-6.
HIDDEN_TOLERANCE = 2e-5


@functools.cache
def golden():
    with np.load(FIXTURE) as archive:
        return dict(archive)


@functools.cache
def scanned():
    return load("smollm2-135m-instruct", scan_layers=True)


@functools.cache
def tokens():
    return jnp.asarray(golden()["input_ids"])[None]


def unrolled():
    """The same weights one array per layer; views, so that 540 MB are in memory once or twice, not three times."""
    loaded = scanned()
    definition = ModelDefinition(loaded.config, Execution(scan_layers=False))
    stacks, leaves = loaded.definition.flat(loaded.params), {}
    for path, parameter in definition.parameters.items():
        if parameter.layers is None:
            leaves[path] = stacks[path]
        else:
            stack = path.replace(f"layer_{parameter.layers[0]}", "block_0")
            leaves[path] = stacks[stack][parameter.layers[0]]
    return definition, definition.unflat(leaves)


def check_logits(logits):
    logits, want = np.asarray(logits[0]), golden()
    assert logits.dtype == np.float32
    worst = max(
        np.abs(logits[:, want["columns"]] - want["logits"]).max(),
        np.abs(logits[want["rows"]] - want["row_logits"]).max(),
    )
    print(f"largest absolute difference {worst:.2e}")
    assert worst < TOLERANCE


def check_hidden(name, x):
    want = golden()[f"hidden_{name}"]
    worst = np.abs(np.asarray(x[0])[golden()["hidden_positions"]] - want).max() / np.abs(want).max()
    print(f"hidden_{name}: largest relative difference {worst:.2e}")
    assert worst < HIDDEN_TOLERANCE


def test_the_prompt_is_tokenised_as_in_the_reference():
    assert scanned().tokenizer.encode(str(golden()["prompt"])) == golden()["input_ids"].tolist()


@pytest.mark.parametrize("layout", ["scanned", "unrolled"])
def test_logits_and_last_hidden_state(layout):
    loaded = scanned()
    definition, params = (loaded.definition, loaded.params) if layout == "scanned" else unrolled()

    @jax.jit
    def run(params, tokens):
        model = definition.merge(params)
        x = model.hidden(tokens).x
        return model.final_norm(x), model.head(x)

    last, logits = run(params, tokens())
    check_logits(logits)
    check_hidden("last", last)


@pytest.mark.parametrize("num_layers", [1, 15])
def test_hidden_states_inside(num_layers):
    """The first layers as a model of their own."""
    loaded = scanned()
    config = loaded.config.model_copy(update={"num_layers": num_layers})
    params = {**loaded.params, "layers": jax.tree.map(lambda x: x[:num_layers], loaded.params["layers"])}
    definition = ModelDefinition(config)
    check_hidden(f"l{num_layers}", jax.jit(lambda p, t: definition.merge(p).hidden(t).x)(params, tokens()))


def test_embeddings():
    table = scanned().params["embed"]["table"]
    np.testing.assert_array_equal(
        np.asarray(table)[np.asarray(tokens()[0])][golden()["hidden_positions"]], golden()["hidden_l0"]
    )
