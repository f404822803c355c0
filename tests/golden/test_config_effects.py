# SPDX-License-Identifier: Apache-2.0
"""Each key of config.json that changes the maths, changed: the same other model as in transformers.

The fixture is made by `make_config_effects.py`; weights are drawn from the tensors' names.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.config_effects import (
    CASES,
    EFFECTS_FILE,
    KEPT_POSITIONS,
    KEPT_TOKENS,
    NOTHING_TO_CHANGE,
    TOKENS,
    base,
    both_files,
    effects,
    label,
    tensors_checksum,
    without_effect,
)
from golden.families import weight
from safetensors.numpy import save_file
from transformers import AutoConfig

from maxkit.checkpoint.load import load
from maxkit.formats.hf_config.reader import FAMILIES, read_config_dict, rope_keys
from maxkit.formats.tables import find_table

TOLERANCE = 2e-4  # of the standard deviation of the logits
MOVED = 1e-3  # and this much at least a change must do
STORED = json.loads(EFFECTS_FILE.read_text())
ALL = [(family, effect) for family in CASES for effect in effects(family)]


def shapes(raw):
    return find_table(read_config_dict(raw, "config.json"), "hf").shapes()


def logits(folder, case, raw):
    folder.mkdir()
    tensors = {key: weight(case, key, shape) for key, shape in shapes(raw).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    loaded = load(folder, scan_layers=False)
    return np.asarray(loaded.model(jnp.asarray(TOKENS, jnp.int32))[0])[0]


@pytest.fixture(autouse=True, scope="module")
def small_programs():
    yield
    jax.clear_caches()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_changes_the_maths_is_changed(family):
    known = FAMILIES[family].keys.keys() | rope_keys(FAMILIES[family]).keys()
    changed = {effect.key for effect in effects(family)}
    assert changed | NOTHING_TO_CHANGE[family].keys() == known
    assert {label(effect) for effect in effects(family)} == STORED[family].keys() - {"without effect"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_has_no_effect_was_changed_in_transformers_too(family):
    """The maker of the fixture asserts equal logits; a key that only published files have is no key of the class."""
    raw = base(family)
    default = AutoConfig.for_model(raw["model_type"]).to_dict()
    changed = without_effect(family, default)
    assert changed.keys() <= set(STORED[family]["without effect"])
    assert all(
        read_config_dict(raw | {key: value}, "x") == read_config_dict(raw, "x") for key, value in changed.items()
    )


@pytest.mark.parametrize(("family", "effect"), ALL, ids=[f"{family}-{effect.key}" for family, effect in ALL])
def test_a_changed_key_means_what_it_means_in_transformers(tmp_path, family, effect):
    before, after = both_files(family, effect)
    stored = STORED[family][label(effect)]
    assert read_config_dict(before, "config.json") != read_config_dict(after, "config.json")
    if "tensors" in stored:
        assert shapes(before) != shapes(after)
        assert tensors_checksum(shapes(after)) == stored["tensors"]
        return
    found = logits(tmp_path / "after", CASES[family], after)
    kept = found[list(KEPT_POSITIONS), :KEPT_TOKENS]
    assert stored["moved"] > MOVED
    np.testing.assert_allclose(kept, stored["logits"], rtol=0, atol=TOLERANCE * stored["spread"])
