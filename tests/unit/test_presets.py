# SPDX-License-Identifier: Apache-2.0
"""Presets: the published number of parameters, and where their names can be given."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from maxkit import build, config
from maxkit.checkpoint.load import open_source
from maxkit.errors import UserError
from maxkit.formats.hf_config.reader import config_json
from maxkit.formats.presets import NOT_SUPPORTED, PRESETS, preset_config, preset_json
from maxkit.models.definition import ModelDefinition
from maxkit.plan import abstract

ROOT = Path(__file__).parents[2]
UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}


@pytest.mark.parametrize("name", PRESETS)
def test_the_number_of_parameters_is_the_published_one(name):
    """To the digits that were published, which authors round or cut off."""
    preset, found = PRESETS[name], ModelDefinition(preset_config(name)).num_params
    stated, unit = re.fullmatch(r"([\d.]+)([MBT])", preset.published).groups()
    digits = len(stated.partition(".")[2])
    scaled = found / UNITS[unit] * 10**digits
    allowed = {round(scaled), math.floor(scaled)}
    if preset.besides:
        allowed = range(math.floor(scaled), math.ceil(scaled * 1.02))
    assert round(float(stated) * 10**digits) in allowed, (found, preset.published)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_and_read_as_a_file(name):
    described = preset_config(name)
    assert described.family == PRESETS[name].family and PRESETS[name].source
    assert (
        json.loads(json.dumps(config_json(described, None, "bfloat16")))["architectures"]
        == (preset_json(name)["architectures"])
    )


def test_a_hub_id_is_of_one_preset_or_has_a_reason():
    ids = [hub_id for preset in PRESETS.values() for hub_id in preset.hub_ids]
    assert len(ids) == len(set(ids)) and not set(ids) & NOT_SUPPORTED.keys()
    with pytest.raises(UserError, match="did you mean 'llama3.1-8b'"):
        preset_config("lama3.1-8b")


def test_the_page_of_families_is_current():
    page = (ROOT / "docs/families.md").read_text()
    spec = importlib.util.spec_from_file_location("coverage_tables", ROOT / "benchmarks/coverage.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    again = "python benchmarks/coverage.py writes it anew"
    assert tables.family_table() in page, again
    assert tables.preset_table() in page, again


def test_a_preset_is_pretrained_from_scratch():
    cfg = config.resolve("pretrain", environ={}, given={"model": ("smollm2-135m", "keyword")})
    made = build.blueprint(cfg)
    assert (made.source, made.start) == (None, None)
    assert made.definition.config == preset_config("smollm2-135m")
    contradicting = {"model": ("smollm2-135m", "keyword"), "config": ("smollm2-360m", "keyword")}
    with pytest.raises(
        UserError, match="config=smollm2-360m contradicts what preset smollm2-135m records: .*embed_dim"
    ):
        build.blueprint(config.resolve("pretrain", environ={}, given=contradicting))
    contradicting["config"] = ("smolm2-135m", "keyword")
    with pytest.raises(UserError, match="config=smolm2-135m: no such file.*did you mean 'smollm2-135m'"):
        build.blueprint(config.resolve("pretrain", environ={}, given=contradicting))


def test_a_preset_has_no_weights_to_load_but_can_be_planned():
    with pytest.raises(UserError, match="'llama3.1-8b' is an architecture without weights.*hf:meta-llama/Llama-3.1-8B"):
        open_source("llama3.1-8b")
    cfg = config.resolve("sft", environ={}, given={"model": ("qwen3-30b-a3b", "keyword")})
    assert abstract.blueprint(cfg).definition.config.moe.num_experts == 128
