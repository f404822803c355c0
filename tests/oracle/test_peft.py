# SPDX-License-Identifier: Apache-2.0
"""peft itself opens the adapters that maxkit wrote, with the same logits, merged and not; and maxkit what peft wrote.

Tolerance: 2e-5 of the spread of the logits, in float32 (largest found: see docs/design/012-lora.md).
"""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import weights

import maxkit
from maxkit.checkpoint.load import Loaded, load
from maxkit.formats.hf_config.reader import read_config
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig

# peft looks for patterns of parameters among modules alone before it warns; it does use them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning:peft", "ignore:The following .*_pattern keys:RuntimeWarning"
)
torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
# Linear; fused and Conv1D; latent attention with experts; experts stored [inputs, outputs], with the MLP's bias.
CASES = ["llama-llama3", "gpt2-tied", "deepseek_v3-groups", "gpt_oss-mixed"]
TOKENS = np.arange(24).reshape(2, 12) % 40 + 3


def model_of(name, targets=("*",)):
    config = read_config(FAMILIES / name / "config.json")
    definition = ModelDefinition(config, lora=LoraConfig(rank=3, alpha=5.0, targets=targets))
    return Loaded(definition, weights(definition, seed=3), None, (), "made here")


def logits_of(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.float().numpy()


def assert_close(found, wanted):
    worst = np.abs(found - np.asarray(wanted)).max() / np.ptp(wanted)
    print(f"largest difference {worst:.1e} of the spread")
    assert worst < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_peft_opens_our_adapters(tmp_path, name):
    from transformers import AutoModelForCausalLM

    loaded = model_of(name)
    flat = loaded.definition.flat(loaded.params)
    plain = ModelDefinition(loaded.config)
    base = plain.unflat({path: flat[path] for path in plain.parameters})
    maxkit.save((plain, base), tmp_path / "base", format="hf")
    maxkit.save(loaded, tmp_path / "adapters", format="peft")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager", experts_implementation="eager"
    )
    without = logits_of(model)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapters")
    ours = loaded.model(TOKENS)[0]
    assert_close(logits_of(adapted), ours)
    assert np.abs(without - np.asarray(ours)).max() > 0.05 * np.ptp(ours)
    assert_close(logits_of(adapted.merge_and_unload()), ours)
    assert_close(np.asarray(loaded.merged().model(TOKENS)[0]), ours)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("llama-llama3", {"target_modules": "all-linear", "use_rslora": True}),
        ("gpt2-tied", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
        (
            "deepseek_v3-groups",
            {
                "target_modules": ["kv_b_proj", "o_proj"],
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                "rank_pattern": {"o_proj": 5},
            },
        ),
    ],
)
def test_we_open_adapters_of_peft(tmp_path, name, chosen):
    from transformers import AutoModelForCausalLM

    loaded = model_of(name)
    plain = ModelDefinition(loaded.config)
    maxkit.save((plain, weights(plain, seed=3)), tmp_path / "base", format="hf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager", experts_implementation="eager"
    )
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **chosen))
    torch.manual_seed(0)
    for key, value in adapted.named_parameters():
        if "lora_" in key:
            value.data = torch.randn_like(value) * 0.3
    adapted.save_pretrained(tmp_path / "adapters")
    found = load(tmp_path / "adapters", base=tmp_path / "base")
    wanted = logits_of(adapted)
    assert_close(np.asarray(found.model(TOKENS)[0]), wanted)
    assert np.abs(logits_of(adapted.unload()) - wanted).max() > 0.01 * np.ptp(wanted)
