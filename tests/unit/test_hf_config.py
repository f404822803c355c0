# SPDX-License-Identifier: Apache-2.0
"""config.json of every family: which keys there are, what is refused, and that nothing else can come out."""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from maxkit.errors import UserError
from maxkit.formats.hf_config import keys
from maxkit.formats.hf_config.reader import ARCHITECTURES, FAMILIES, config_json, read_config_dict, rope_keys
from maxkit.models.config import ModelConfig, RopeScaling

FIXTURES = Path(__file__).parent.parent / "fixtures" / "families"
FOLDERS = sorted(path.parent for path in FIXTURES.glob("*/config.json"))
TINY = {path.name: json.loads((path / "config.json").read_text()) for path in FOLDERS}
# What a class has no default for, or none that is possible.
ASKED = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "glm4_moe": {"head_dim": 128},  # of 42, half would be an odd number of dimensions to turn
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1},
}
SMALL = {name: {"architectures": [family.architecture]} | ASKED.get(name, {}) for name, family in FAMILIES.items()}


def read(raw):
    return read_config_dict(raw, "config.json")


def model_type(family):
    return family.model_type or family.name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_the_class_is_in_exactly_one_list(name):
    """What the configuration class of transformers writes: changes the maths, has no effect, or is refused."""
    family = FAMILIES[name]
    maths = family.keys.keys() | rope_keys(family).keys()
    without = family.no_effect.keys() | (keys.NO_EFFECT.keys() - maths - family.refused.keys())
    refused = family.refused.keys() | (keys.REFUSED.keys() - maths - family.no_effect.keys())
    lists = [maths, without, refused, set(family.aliases)]
    written = AutoConfig.for_model(model_type(family)).to_dict()
    for key in written:
        found = [group for group in lists if key in group]
        assert len(found) == 1, (key, written[key], len(found))
    for i, one in enumerate(lists):
        for other in lists[i + 1 :]:
            assert not one & other
    assert all(reason for reason in family.no_effect.values()) and all(only.why for only in family.refused.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_class(name):
    """A file that says nothing and one in which the class of transformers says everything are the same model."""
    family = FAMILIES[name]
    written = AutoConfig.for_model(model_type(family)).to_dict() | {"architectures": [family.architecture]}
    asked = ASKED.get(name, {})
    newer = {"vocab_size": 102400} if name == "deepseek_v2" else {}  # transformers 5.23; 5.12 had 32000
    if name == "olmo3":  # transformers 5.23; 5.12 had 10000
        written["rope_parameters"] = None
    assert read({"architectures": [family.architecture]} | asked) == read(written | asked | newer)


@pytest.mark.parametrize("name", TINY)
def test_written_and_read_again_is_the_same(name):
    config = read(TINY[name])
    written = config_json(config, None, "float32")
    assert read(written) == config
    theirs, wanted = (AutoConfig.for_model(**copy.deepcopy(raw)).to_dict() for raw in (written, TINY[name]))
    differing = {key for key in FAMILIES[config.family].keys if theirs.get(key) != wanted.get(key)}
    # Two ways to say the same: a list of layers, or where they begin or how often they come.
    same = {
        "max_window_layers",
        "sliding_window",
        "mlp_only_layers",
        "decoder_sparse_step",
        "interleave_moe_layer_step",
    }
    same.add("no_rope_layer_interval")
    assert differing <= same | {"head_dim"}, differing  # and some classes do not write what it is by default


def test_published_spellings():
    """Keys as the authors' own files have them."""
    kimi = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "n_group": 1, "topk_group": 1,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config",
                     "AutoModelForCausalLM": "moonshotai/Kimi-K2--modeling_deepseek.DeepseekV3ForCausalLM"},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "aux_loss_alpha": 0.001,
        "seq_aux": True, "ep_size": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "rope_theta": 5e4, "rope_scaling": {"type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0,
                                            "mscale": 1.0, "mscale_all_dim": 1.0,
                                            "original_max_position_embeddings": 4096},
    }  # fmt: skip
    config = read(kimi)
    assert config.family == "deepseek_v3" and config.head_dim == 192
    assert config.attention_scale == pytest.approx(192**-0.5 * (0.1 * 3.4657359 + 1) ** 2)  # ln 32 = 3.4657
    vision = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256,
        "boi_token_index": 255999, "eoi_token_index": 256000, "image_token_index": 262144, "vision_config": {},
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024},
    }  # fmt: skip
    gemma = read(vision)
    assert (gemma.family, gemma.rope_theta, gemma.rope_scaling.factor) == ("gemma3", 1e6, 8.0)
    assert (gemma.pattern[0].rope_theta, gemma.pattern[0].rope_scaled) == (1e4, False)
    with pytest.raises(UserError, match="tie_word_embeddings differs"):
        read(vision | {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}})
    with pytest.raises(UserError, match="'projector' is not known"):
        read(vision | {"projector": 1})
    gpt_oss = read({"architectures": ["GptOssForCausalLM"], "experts_per_token": 4, "num_experts_per_tok": 4,
                    "initial_context_length": 4096, "quantization_config": {"quant_method": "mxfp4"}})  # fmt: skip
    assert gpt_oss.rope_scaling.kind == "yarn" and not gpt_oss.rope_scaling.truncate
    assert read({"architectures": ["MistralForCausalLM"], "sliding_window": None}).pattern[0].sliding_window is None
    assert read({"architectures": ["MistralForCausalLM"]}).pattern[0].sliding_window == 4096
    assert read({"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"}).activation == "gelu_tanh"
    phi = read({"architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 131072, "rope_scaling": {
        "type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}})  # fmt: skip
    assert (phi.rope_scaling.kind, phi.rope_scaling.factor) == ("longrope", 32.0)


LLAMA = SMALL["llama"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "architecture 'None' is not supported"),
        ({"architectures": ["LlamaForCausalML"]}, "did you mean 'LlamaForCausalLM'"),
        ({"architectures": [["x"]]}, "is not supported: allowed: .*Qwen3ForCausalLM"),
        ({"model_type": "bert"}, "architecture 'bert' is not supported"),
        (LLAMA | {"hidden_sise": 3}, "'hidden_sise' is not known for llama.*did you mean 'hidden_size'"),
        (LLAMA | {"moon_phase": 3}, "'moon_phase' is not known for llama.*remove it if it has no effect"),
        (LLAMA | {"hidden_size": float("nan")}, "hidden_size=nan must be a positive int"),
        (LLAMA | {"hidden_size": -4}, "hidden_size=-4 must be"),
        (LLAMA | {"hidden_size": True}, "hidden_size=True must be"),
        (LLAMA | {"hidden_size": 10**30}, "hidden_size=1000.*must be a positive int up to"),
        (LLAMA | {"num_hidden_layers": 2000}, "num_hidden_layers=2000 must be a positive int up to 1024"),
        (LLAMA | {"rms_norm_eps": float("inf")}, "rms_norm_eps=inf must be a positive number"),
        (LLAMA | {"rms_norm_eps": None}, "rms_norm_eps=None must be"),
        (LLAMA | {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not supported"),
        (LLAMA | {"rope_theta": 0}, "rope_theta=0 must be"),
        (LLAMA | {"rope_scaling": [1]}, "rope_scaling=.* must be an object"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "rope_scaling.factor='4' must be"),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "64 ent"),
        (LLAMA | {"sliding_window": 5}, "sliding_window=5 is not supported for llama"),
        (LLAMA | {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        (LLAMA | {"auto_map": {"AutoModel": "modeling_x.Y"}}, "auto_map names code of its own .modeling_x.Y"),
        (LLAMA | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (SMALL["qwen2"] | {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers=32"),
        (SMALL["gemma2"] | {"layer_types": ["odd"] * 26}, "layer_types: 'odd' is not supported"),
        (SMALL["gemma2"] | {"sliding_window": None}, "sliding_window is not set"),
        (SMALL["gemma3"] | {"rope_parameters": {"rope_theta": 1e4}}, "one object each for full_attention"),
        (SMALL["gemma3"] | {"attn_logit_softcapping": 5.0}, "never applies it"),
        (SMALL["olmo3"] | {"rope_theta": 1e4}, "read differently by versions of transformers"),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "num_experts_per_tok is missing"),
        (SMALL["deepseek_v3"] | {"num_key_value_heads": 8}, "num_key_value_heads must be num_attention_heads=128"),
        (SMALL["deepseek_v3"] | {"attention_bias": True}, "latent attention is built without biases"),
        (SMALL["deepseek_v3"] | {"n_group": 7}, "num_experts=256 must be a multiple of num_groups=7"),
        (SMALL["mixtral"] | {"num_experts": 4, "num_local_experts": 8}, "num_experts=4 differs from num_local"),
        (SMALL["mixtral"] | {"num_local_experts": 2**30}, "34359738368 experts in all layers are more than 100000"),
        (SMALL["gpt_oss"] | {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0 is not supported"),
        (SMALL["llama4"] | {"no_rope_layers": [1, 2]}, "no_rope_layers must be 48 zeros and ones"),
        (SMALL["gpt2"] | {"n_embd": 10, "n_head": 3}, "n_embd=10 must be a multiple of n_head=3"),
        (SMALL["gpt2"] | {"scale_attn_by_inverse_layer_idx": True}, "every layer would have another scale"),
    ],
)  # fmt: skip
def test_what_is_refused_and_how(raw, words):
    with pytest.raises(UserError, match=words) as caught:
        read(raw)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", {"qk_norm": "head"}, "qk_norm=head"),
        ("llama", {"attention_out_bias": True}, "attention_out_bias=True"),
        ("mistral", {"pattern": ({"sliding_window": 4}, {"sliding_window": 5})}, "different sliding windows"),
        ("gemma2", {"embedding_scale": 2.0}, "embedding_scale=2.0"),
        ("gemma2", {"attention_scale": -1.0}, "attention_scale=-1.0"),
        ("mixtral", {"moe": None, "pattern": ({},)}, "num_experts=8|moe=None"),
        ("deepseek_v3", {"attention_scale": 0.1}, "attention_scale=0.1"),
        ("gpt2", {"mlp_gated": True}, "mlp_gated=True"),
        ("phi3", {"rope_scaling": RopeScaling(kind="linear", factor=2.0).model_dump()}, "rope_scaling"),
    ],
)  # fmt: skip
def test_what_a_family_cannot_say_is_not_written(family, change, words):
    config = ModelConfig.model_validate(read(SMALL[family]).model_dump() | change)
    with pytest.raises(UserError, match=f"a Hugging Face {family} model cannot.*({words})"):
        config_json(config, None, "float32")


def test_an_unknown_family_is_not_written():
    with pytest.raises(UserError, match="family 'lama' has no config.json: did you mean 'llama'"):
        config_json(read(LLAMA).model_copy(update={"family": "lama"}), None, "float32")


JUNK = [None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 10**400, 0.5, -1.5, 1e308, float("nan"), float("inf"), "", "x",
        "silu", "8", [], {}, [0], [1, 0, 1], ["full_attention"], ["sliding_attention"] * 3, {"a": 1}, [[[]]],
        {"rope_type": "yarn", "factor": 0}, {"rope_type": "longrope", "short_factor": [0], "long_factor": []},
        {"full_attention": 3}, {"rope_type": ["yarn"]}]  # fmt: skip


def mutate(value, chance):
    """`value` with one thing somewhere in it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(sorted(value))
        return value | {key: mutate(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.5:
        at = chance.randrange(len(value))
        return value[:at] + [mutate(value[at], chance)] + value[at + 1 :]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and chance.random() < 0.3:
        return chance.choice([-value, value * 10**9, value + 1, value // 3, str(value)])
    return chance.choice(JUNK)


@pytest.mark.parametrize("name", TINY)
def test_damaged_configs_are_refused_or_are_models(name):
    chance = random.Random(name)
    known = sorted(FAMILIES[ARCHITECTURES[TINY[name]["architectures"][0]]].keys)
    models = 0
    for _ in range(60):
        raw = TINY[name]
        for _ in range(chance.choice([1, 1, 2, 5])):
            raw = raw | {chance.choice(known): mutate(None, chance)} if chance.random() < 0.3 else mutate(raw, chance)
            raw = raw if isinstance(raw, dict) else TINY[name]
        try:
            config = read(raw)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
            continue
        assert ModelConfig.model_validate(config.model_dump()) == config and config.layer_groups()
        models += 1
    assert 0 < models < 60


def test_reading_needs_no_jax():
    code = (
        "import sys; from maxkit.formats.hf_config.reader import read_config;"
        f"read_config({str(FOLDERS[0] / 'config.json')!r});"
        "sys.exit(bool({'jax', 'flax', 'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
