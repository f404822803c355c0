# SPDX-License-Identifier: Apache-2.0
"""maxkit.save: what is loaded again is what was given, in both formats and layouts, with tokenizer and adapters."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import LORA, MODELS, definition_of
from tiny_models import weights

import maxkit
from maxkit.checkpoint import inspect
from maxkit.checkpoint.load import Loaded, load
from maxkit.data.tokenizer import train_bpe
from maxkit.errors import UserError
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition


def loaded_of(name="gemma", scan=True, lora=None, tokenizer=None):
    definition = definition_of(name, scan, lora)
    return Loaded(definition, weights(definition), tokenizer, (), "memory")


def same(ours, theirs):
    ours, theirs = (ModelDefinition.flat(tree) for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", ["gemma", "deepseek"])
def test_what_is_saved_is_loaded_without_flags(tmp_path, name, scan):
    given = loaded_of(name, scan)
    maxkit.save(given, tmp_path / "model")
    found = load(tmp_path / "model")
    assert found.config == given.config and found.definition.execution.scan_layers is scan
    same(found.params, given.params)
    assert inspect.describe(tmp_path / "model")["scan_layers"] is scan
    assert found.tokenizer is None and not list(tmp_path.glob("*.partial"))


def test_in_the_other_layout_and_another_type(tmp_path):
    maxkit.save(loaded_of(scan=True), tmp_path / "model", scan_layers=False, dtype="bfloat16")
    found, want = load(tmp_path / "model"), loaded_of(scan=False)
    same(found.params, {k: v for k, v in _cast(want.params).items()})


def _cast(tree):
    return {k: _cast(v) if isinstance(v, dict) else v.astype(jnp.bfloat16) for k, v in tree.items()}


def test_the_tokenizer_goes_with_it(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat"] * 3, 260)
    for format in ("maxkit", "hf"):
        maxkit.save(loaded_of("llama", tokenizer=tokenizer), tmp_path / format, format=format)
        assert load(tmp_path / format).tokenizer.encode("the cat") == tokenizer.encode("the cat")


@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
def test_a_bare_model_and_a_pair_are_models_too(tmp_path, lora):
    given = loaded_of("llama", lora=lora)
    for name, model in (("model", given.model), ("pair", (given.definition, given.params))):
        maxkit.save(model, tmp_path / name)
        found = load(tmp_path / name)
        assert found.definition.lora == lora
        same(found.params, given.params)


@pytest.mark.parametrize("format", ["maxkit", "hf"])
def test_adapters_are_merged_when_asked_for_or_needed(tmp_path, format):
    given = loaded_of("llama", lora=LORA)
    maxkit.save(given, tmp_path / "merged", format=format, merge_lora=True if format == "maxkit" else None)
    found = load(tmp_path / "merged")
    assert found.definition.lora is None
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    np.testing.assert_allclose(found.model(tokens)[0], given.model(tokens)[0], atol=2e-5)
    plain = ModelDefinition(MODELS["llama"], Execution())
    kept = {path: leaf for path, leaf in ModelDefinition.flat(given.params).items() if path in plain.parameters}
    changed = [p for p, leaf in ModelDefinition.flat(found.params).items() if not np.array_equal(leaf, kept[p])]
    assert sorted(p.split("/")[-2] for p in changed) == ["down", "out", "query"]


def test_what_cannot_be_saved_is_one_line(tmp_path):
    given = loaded_of("llama")
    maxkit.save(given, tmp_path / "model")
    for words, call in (
        ("exists already", lambda: maxkit.save(given, tmp_path / "model")),
        ("to='onnx'", lambda: maxkit.save(given, tmp_path / "a", format="onnx")),
        ("not a dict", lambda: maxkit.save(given.params, tmp_path / "a")),
        ("dtype='int8'", lambda: maxkit.save(given, tmp_path / "a", dtype="int8")),
        (
            "scan_layers=False was given (keyword)",
            lambda: maxkit.save(given, tmp_path / "a", format="hf", scan_layers=False),
        ),
        (
            "merge_lora=False",
            lambda: maxkit.save(loaded_of("llama", lora=LORA), tmp_path / "a", format="hf", merge_lora=False),
        ),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
