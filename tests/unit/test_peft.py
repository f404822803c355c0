# SPDX-License-Identifier: Apache-2.0
"""Adapters in peft's format: what they add to each tensor of transformers, read back, and with their base model."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_checkpoints import LORA, definition_of, save_run
from tiny_models import weights

import maxkit
from maxkit.checkpoint.convert import convert
from maxkit.checkpoint.inspect import describe
from maxkit.checkpoint.load import Loaded
from maxkit.errors import UserError
from maxkit.formats.hf_config.reader import read_config
from maxkit.formats.peft import PeftReader, modules_of, write_peft
from maxkit.formats.safetensors import SafetensorsFile
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
CASES = {
    "llama-llama3": ("*",),
    "gpt2-tied": ("*",),
    "phi3-window": ("query", "value", "up", "out"),
    "deepseek_v3-groups": ("*",),
    "gpt_oss-mixed": ("*",),
    "llama4-all": ("*",),
    "qwen3_next-remainder": ("attention/*", "delta/*", "experts/*"),
}


def random_adapters(config, lora):
    """{(path, layer): factor} for every projection that `lora` names."""
    found = {}
    for p in ModelDefinition(config, lora=lora).parameters.values():
        for layer in p.layers if p.trainable_adapter else ():
            draw = np.random.default_rng([layer, len(p.address), sum(map(ord, p.address))])
            found[p.address, layer] = draw.normal(size=p.layer_shape).astype(np.float32)
    return found


def delta_of_peft(module, low, high, scale, inputs_first):
    """What peft adds to a matrix of transformers, as its Linear, Conv1D and ParamWrapper compute it."""
    experts = module.parts[0].place.num_experts
    a, b = low.reshape(experts, -1, low.shape[-1]), high.reshape(high.shape[0], -1, experts)
    return scale * np.einsum("ore,eri->eio" if inputs_first else "ore,eri->eoi", b, a)


@pytest.mark.parametrize("name", CASES)
def test_a_module_gets_what_our_projections_have(tmp_path, name):
    config, lora = read_config(FAMILIES / name / "config.json"), LoraConfig(rank=2, alpha=6.0, targets=CASES[name])
    ours = random_adapters(config, lora)
    written = write_peft(tmp_path, config, lora, lambda *key: ours[key], "base", np.dtype(np.float32))
    assert set(written) == set(ours)
    reader = PeftReader(tmp_path, config)
    assert reader.lora == lora and set(reader.addresses()) == set(ours)
    for address, value in ours.items():
        assert reader.shape(*address) == value.shape
        np.testing.assert_array_equal(reader.read(*address), value)
    described, file = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        SafetensorsFile(tmp_path / "adapter_model.safetensors"),
    )
    seen = 0
    for module, parts, low, high in reader._adapters:
        rank = described["rank_pattern"].get(module.target.replace(".", r"\."), described["r"])
        alpha = described["alpha_pattern"].get(module.target.replace(".", r"\."), described["lora_alpha"])
        inputs_first = config.family == "gpt2" or (config.family == "gpt_oss" and module.parameter is not None)
        found = delta_of_peft(module, file.read(low), file.read(high), alpha / rank, inputs_first)
        wanted = np.zeros((found.shape[0], *module.parts[0].place.rearrangement.foreign_shape))
        for part in parts:
            a, b = (ours[f"{part.path}/{x}", part.layer].astype(np.float64) for x in ("lora_a", "lora_b"))
            experts = part.place.experts != "none"
            product = [np.tensordot(x, y, 1) for x, y in (zip(a, b, strict=True) if experts else [(a, b)])]
            for expert, value in enumerate(product):
                part.place.rearrangement.write_into(wanted[expert], lora.scale * value)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        seen += len(parts)
    assert 2 * seen == len(ours)


def test_every_family_has_modules_for_all_of_its_projections():
    for folder in sorted(FAMILIES.iterdir()):
        config = read_config(folder / "config.json")
        ours = set(ModelDefinition(config).matrices.values())
        assert ours == {part.path for module in modules_of(config) for part in module.parts}, folder.name


def test_what_other_programs_wrote_is_one_rank_and_one_scale(tmp_path):
    """Ranks are filled up, scales folded into B, fused modules shared out; the function stays."""
    config, lora = read_config(FAMILIES / "gpt2-tied" / "config.json"), LoraConfig(rank=2, alpha=6.0)
    ours = random_adapters(config, lora)
    write_peft(tmp_path, config, lora, lambda *key: ours[key], "base", np.dtype(np.float32))
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"maxkit"', b'"others"'))
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    described["alpha_pattern"][r"mlp\.c_fc"] = 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    reader = PeftReader(tmp_path, config)
    assert reader.lora.rank == 6 and reader.lora.scale == 3.0 and set(reader.facts) == {"ranks", "scales"}
    for path, layer in ours:
        if path.endswith("lora_a"):
            stem = path.removesuffix("lora_a")
            wanted = np.tensordot(ours[path, layer], ours[f"{stem}lora_b", layer], 1) * (1.5 if "up" in stem else 3.0)
            found = np.tensordot(reader.read(path, layer), reader.read(f"{stem}lora_b", layer), 1) * reader.lora.scale
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not read"),
        ({"use_dora": True}, "use_dora=True is not read"),
        ({"bias": "all"}, "bias='all' is not read"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path: give base="),
        ({"base_model_name_or_path": "nowhere"}, "'nowhere' is neither a path that exists nor a known name"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(tmp_path, change, message):
    definition = definition_of("llama", True, LORA)
    maxkit.save((definition, weights(definition)), tmp_path / "adapters", format="peft")
    path = tmp_path / "adapters" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "here"} | change))
    if "base_model_name_or_path" in change:
        with pytest.raises(UserError, match=message):
            maxkit.load(tmp_path / "adapters")
    else:
        with pytest.raises(UserError, match=message):
            PeftReader(tmp_path / "adapters", definition.config)


def test_adapters_load_with_the_model_they_name(tmp_path):
    """A run of an unrolled model: its adapters alone, and the same model again, adapters and base, bit for bit."""
    definition = definition_of("llama", False, LORA)
    state = save_run(tmp_path / "run", definition)
    done = convert(tmp_path / "run", tmp_path / "adapters", to="peft")
    assert done.verified == 3 * 3 * 2 and any(str(tmp_path / "run") in note for note in done.plan.notes)
    small, whole = (
        sum(p.stat().st_size for p in (tmp_path / name).rglob("*") if p.is_file()) for name in ("adapters", "run")
    )
    assert small < whole / 10
    described = describe(tmp_path / "adapters")
    assert (described["format"], described["num_params"]) == (
        "peft",
        sum(x.size for x in jax.tree.leaves(state.params)),
    )
    assert described["metadata"]["config"]["base_model_name_or_path"] == str(tmp_path / "run")
    loaded = maxkit.load(tmp_path / "adapters")
    assert loaded.definition.lora == LORA and loaded.definition.execution.scan_layers is False
    wanted = definition.flat(definition.join(state.params, state.base))
    found = loaded.definition.flat(loaded.params)
    assert found.keys() == wanted.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, wanted[path])
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="neither a path that exists"):
        maxkit.load(tmp_path / "adapters")
    assert maxkit.load(tmp_path / "adapters", base=tmp_path / "moved").definition.lora == LORA
    with pytest.raises(UserError, match="is a model, not adapters of one"):
        maxkit.load(tmp_path / "moved", base="x")
    convert(tmp_path / "adapters", tmp_path / "merged", to="hf", base=tmp_path / "moved")
    merged = maxkit.load(tmp_path / "merged", scan_layers=False)
    again = loaded.merged()
    for path, value in merged.definition.flat(merged.params).items():
        np.testing.assert_array_equal(value, again.definition.flat(again.params)[path])


def test_merging_keeps_the_base_and_the_function():
    """In float32: logits differ by 2e-6 of their spread (1e-5 allowed); the base is not a bit other than before."""
    definition = definition_of("llama", True, LORA)
    params = weights(definition)
    before = {path: np.array(value) for path, value in definition.flat(params).items()}
    loaded = Loaded(definition, params, None, (), "memory")
    merged = loaded.merged()
    tokens = np.arange(24).reshape(2, 12) % 48
    a, b = (np.asarray(x.model(tokens)[0]) for x in (loaded, merged))
    assert merged.definition.lora is None and np.abs(a - b).max() < 1e-5 * np.ptp(a)
    for path, value in definition.flat(loaded.params).items():
        np.testing.assert_array_equal(value, before[path])
    assert merged.merged() is merged
    with pytest.raises(UserError, match="has no adapters to write"):
        maxkit.save(merged, "nowhere", format="peft")
