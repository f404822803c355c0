# SPDX-License-Identifier: Apache-2.0
"""What `config=` may be for a MaxText checkpoint, what it says, and what is refused by name."""

import json
import math
from pathlib import Path

import pytest
from tiny_models import tiny

from maxkit.errors import UserError
from maxkit.formats import maxtext, presets
from maxkit.formats.maxtext.facts import model_config
from maxkit.formats.maxtext.settings import DEFAULTS, read_settings
from maxkit.formats.restated import differences
from maxkit.models.config import BlockSpec

FIXTURES = Path(__file__).parents[1] / "fixtures" / "maxtext"
LOG = FIXTURES / "axis0_scanned_025" / "config_resolved.txt"


def settings(**changes) -> dict:
    """Those of a small Llama, as a YAML would have them."""
    sizes = {"base_emb_dim": 16, "base_mlp_dim": 24, "base_num_query_heads": 4, "base_num_kv_heads": 2, "head_dim": 4}
    return DEFAULTS | sizes | {"base_num_decoder_layers": 2, "vocab_size": 48, "max_target_length": 64} | changes


def test_the_log_of_a_run():
    found = read_settings(LOG)
    assert len(found) > 850
    assert (found["decoder_block"], found["rope_type"], found["opt_type"]) == ("llama2", "default", "adamw")
    assert found["normalization_layer_epsilon"] == 1e-5
    assert found["mlp_activations"] == ["silu", "linear"]
    assert (found["param_scan_axis"], found["attn_logits_soft_cap"], found["scan_layers"]) == (0, None, True)


def test_lines_as_maxtext_prints_them(tmp_path):
    text = LOG.read_text().splitlines()
    (tmp_path / "log").write_text("\n".join(f"I1122 03:12:29 12 Config param {line}" for line in text))
    assert read_settings(tmp_path / "log") == read_settings(LOG)


def test_a_yaml_over_the_defaults_and_over_a_model_that_it_names(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(
        "base_config: base.yml\ndecoder_block: qwen3\nuse_qk_norm: true\nnormalization_layer_epsilon: 1e-6\n"
    )
    config = maxtext.describe(path).config
    assert (config.family, config.qk_norm, config.norm_eps, config.embed_dim) == ("qwen3", "head", 1e-6, 2048)
    path.write_text("model_name: llama3.1-8b\nbase_num_decoder_layers: 3\nmax_target_length: 128\n")
    config = maxtext.describe(path).config
    assert (config.num_layers, config.embed_dim, config.num_kv_heads, config.max_seq_len) == (3, 4096, 8, 128)
    assert (config.rope_interleaved, config.attention_scale, config.rope_scaling.kind) == (True, 1.0, "llama3")
    path.write_text("model_name: llama9-8b\n")
    with pytest.raises(UserError, match="model_name='llama9-8b' is not known"):
        maxtext.describe(path)


def test_a_config_json_and_a_preset_stand_for_what_the_converter_makes(tmp_path):
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for given in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        contents = maxtext.open(FIXTURES / "axis0_scanned_025", given)
        assert differences(contents.config, maxtext.describe(LOG).config) == []
        assert contents.scan_axis == 0  # by the shapes: a config.json knows nothing of it
        assert "scan_layers" not in contents.facts
    config = maxtext.describe("gemma2-2b").config
    assert (config.norm_scale_offset, config.embedding_scale, config.attention_scale) == (0.0, None, 1.0)
    assert math.isclose(config.logit_scale, 2304**-0.5)
    with pytest.raises(UserError, match=r"no such file, and no such preset: did you mean 'gemma2-2b'"):
        maxtext.describe("gemma2-2c")


def test_a_recorded_architecture_and_a_description_must_agree(tmp_path):
    contents = maxtext.open(FIXTURES / "axis0_scanned_025", LOG)
    maxtext.write(tmp_path, contents)
    assert maxtext.open(tmp_path, LOG).config == contents.config
    other = contents.config.model_copy(update={"norm_eps": 1e-6, "rope_theta": 5e5})
    with pytest.raises(UserError, match=r"norm_eps: 1e-05, and 1e-06; .*rope_theta: 10000.0, and 500000.0"):
        maxtext.open(tmp_path, other)


@pytest.mark.parametrize(
    "name", [name for name in presets.PRESETS if name.startswith(("llama2", "qwen", "gemma3", "deepseek3"))]
)
def test_settings_and_config_are_inverse(name):
    config = presets.preset_config(name)
    if config.family == "qwen2_moe":
        with pytest.raises(UserError, match="has no MaxText form"):
            maxtext.maxtext_form(config)
        return
    form, found = maxtext.maxtext_form(config)
    assert differences(form, model_config(found)) == []
    assert differences(form, maxtext.maxtext_form(form)[0]) == []


def test_what_changes_the_maths_and_is_not_supported_is_refused_all_at_once():
    with pytest.raises(UserError) as caught:
        model_config(settings(quantization="int8", moba=True, attn_logits_soft_cap=3.0, attention_bias=True))
    text = str(caught.value)
    assert "\n" not in text
    for part in ("quantization='int8'", "moba=True", "attn_logits_soft_cap=3.0", "attention_bias=True"):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder_block": "deepseek4"}, "decoder_block='deepseek4' of MaxText is not supported"),
        ({"decoder_block": "gpt3"}, "trainable_position_size=-1"),
        ({"decoder_block": "llama4", "num_experts": 4}, "chunk_attn_window_size=0"),
        (
            {"decoder_block": "llama4", "num_experts": 4, "chunk_attn_window_size": 8, "nope_layer_interval": 4},
            "inhomogeneous_layer_cycle_interval=1, nope_layer_interval=4",
        ),
        ({"decoder_block": "gemma3"}, "model_name='default'"),
        ({"decoder_block": "deepseek"}, "attention_type='global'"),
        ({"rope_type": "longrope"}, "rope_type='longrope'"),
        ({"mlp_activations": ["tanh", "linear"]}, "mlp_activations="),
        ({"sliding_window_size": 0, "decoder_block": "gemma2"}, "sliding_window_size=0"),
        ({"global_parameter_scale": 2}, "give resolved settings"),
        ({"base_num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"partial_rotary_factor": 0.5}, "part of a head is turned"),
    ],
)
def test_refused_by_name(changes, words):
    with pytest.raises(UserError) as caught:
        model_config(settings(**changes))
    assert words in str(caught.value)


def test_how_the_writer_was_built_makes_no_difference():
    for flags in ({"pure_nnx": False, "enable_nnx": False, "pure_nnx_decoder": False}, {"scan_layers": False}):
        assert model_config(settings(**flags)) == model_config(settings())


def test_facts_of_the_blocks():
    assert model_config(settings()) == tiny(attention_scale=1.0)
    assert model_config(settings(rope_type="llama3.1", rope_use_scale=False)).rope_interleaved
    assert model_config(settings(rope_type="yarn")).rope_scaling.attention_factor == 1.0
    tied = model_config(settings(logits_via_embedding=True))
    assert (tied.tie_embeddings, tied.logit_scale) == (True, 0.25)
    assert model_config(settings(logits_via_embedding=True, normalize_embedding_logits=False)).logit_scale == 1.0
    gemma2 = model_config(settings(decoder_block="gemma2", sliding_window_size=8))
    assert gemma2.num_layers == 4
    assert gemma2.pattern == (BlockSpec(sliding_window=8), BlockSpec())
    wide = model_config(settings(decoder_block="gemma3", sliding_window_size=8, model_name="gemma3-27b",
                                 use_post_attn_norm=True, use_post_ffw_norm=True, base_emb_dim=36))  # fmt: skip
    assert (wide.attention_scale, wide.qk_norm) == (9**-0.5, "head")


def test_deepseek_by_its_name():
    """Groups, and a bias that counts for the choice only, belong to models named deepseek3-..."""
    given = settings(
        decoder_block="deepseek", attention_type="mla", num_experts=8, num_experts_per_tok=2, base_moe_mlp_dim=6,
        routed_score_func="sigmoid", routed_bias=True, n_routing_groups=4, topk_routing_group=2, shared_experts=1,
        first_num_dense_layers=1, max_position_embeddings=64,
    )  # fmt: skip
    plain, named = model_config(given).moe, model_config(given | {"model_name": "deepseek3-test"}).moe
    assert (plain.correction_in_weights, plain.num_groups) == (True, 1)
    assert (named.correction_in_weights, named.num_groups, named.groups_per_token) == (False, 4, 2)
    assert named.group_score == "top2_sum"
    assert model_config(given).attention_scale is None
    stretched = model_config(given | {"max_position_embeddings": 163840})
    assert math.isclose(stretched.attention_scale, 192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
