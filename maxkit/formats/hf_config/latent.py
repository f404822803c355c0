# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: DeepSeek V2, V3 and Kimi K2, which is a DeepSeek V3 of other sizes.

Checked against transformers 5.23 (`models/deepseek_v2`, `models/deepseek_v3`).
"""

import math
from typing import Any

from maxkit.formats.hf_config import keys
from maxkit.formats.hf_config.experts import ROUTER_TRAINING, moe_blocks, moe_layers
from maxkit.formats.hf_config.family import Family, Values, sizes
from maxkit.formats.hf_config.keys import REQUIRED, Key, Only
from maxkit.models.config import BlockSpec, ModelConfig

_NO_BIAS = Only((None, False), "latent attention is built without biases")


def softmax_scale(head_dim: int, scaling: Any) -> float | None:
    """The factor on query . key where YaRN changes it: head_dim ** -0.5 times the square of its mscale; else None."""
    if scaling is None or not scaling.mscale_all_dim or scaling.factor <= 1:
        return None
    return head_dim**-0.5 * (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0) ** 2


def _latent_fields(values: Values) -> dict[str, Any]:
    heads = values["num_attention_heads"]
    if values["num_key_value_heads"] not in (None, heads):
        raise ValueError(f"num_key_value_heads must be num_attention_heads={heads}: the latent is one for all heads")
    turned = values["qk_rope_head_dim"]
    if values["head_dim"] not in (None, turned):  # these classes mean the part that RoPE turns
        raise ValueError(f"head_dim={values['head_dim']} must be qk_rope_head_dim={turned}")
    head_dim = values["qk_nope_head_dim"] + turned
    dense, count = values["first_k_dense_replace"], values["num_hidden_layers"]
    return {
        "head_dim": head_dim,
        "num_kv_heads": heads,
        "attention_scale": softmax_scale(head_dim, values["rope"].scaling),
        "blocks": moe_blocks((BlockSpec(),) * count, set(range(dense, count))),
        "moe": {"shared_mlp_dim": values["moe_intermediate_size"] * values["n_shared_experts"]},
    }


def _latent_written(config: ModelConfig) -> dict[str, Any]:
    if config.moe is None or config.mla is None:
        raise ValueError("the class has latent attention and experts")
    sparse = moe_layers(config)
    return {
        "num_key_value_heads": config.num_kv_heads,
        "q_lora_rank": config.mla.q_rank,
        "first_k_dense_replace": sparse[0] if sparse else config.num_layers,
        "n_shared_experts": config.moe.shared_mlp_dim // config.moe.mlp_dim,
    }


def _keys(names: dict[str, Key]) -> dict[str, Key]:
    return names | {
        "head_dim": Key("mla.rope_head_dim", keys.count, None, nullable=True, direct=False),
        "num_key_value_heads": Key("num_kv_heads", keys.count, None, nullable=True, direct=False),
        "qk_nope_head_dim": Key("mla.nope_head_dim", keys.count, 128),
        "qk_rope_head_dim": Key("mla.rope_head_dim", keys.count, 64),
        "v_head_dim": Key("mla.v_head_dim", keys.count, 128),
        "kv_lora_rank": Key("mla.kv_rank", keys.count, 512),
        "q_lora_rank": Key("mla.q_rank", keys.count, 1536, nullable=True),
    }


_NO_EFFECT = ROUTER_TRAINING | {
    "qk_head_dim": "the class sets it to qk_nope_head_dim + qk_rope_head_dim",
    "aux_loss_alpha": "only training uses the balance loss",
    "seq_aux": "only training uses the balance loss",
    "ep_size": "how the authors' code spreads experts over devices",
    "num_nextn_predict_layers": "layers that predict further tokens, which the class leaves out",
    "num_mtp_layers": "layers that predict further tokens, which the class leaves out",
}
_OWN_CODE = frozenset(
    f"{module}_deepseek.{name}"
    for module, names in {
        "configuration": ("DeepseekV2Config", "DeepseekV3Config"),
        "modeling": ("DeepseekV2Model", "DeepseekV2ForCausalLM", "DeepseekV3Model", "DeepseekV3ForCausalLM"),
    }.items()
    for name in names
)


def _v2_fields(values: Values) -> dict[str, Any]:
    fields = _latent_fields(values)
    if values["topk_method"] == "group_limited_greedy":
        groups, chosen = values["n_group"], values["topk_group"]
        if groups is None or chosen is None:
            raise ValueError("topk_method='group_limited_greedy' needs n_group and topk_group")
        fields["moe"] |= {"num_groups": groups, "groups_per_token": chosen}
    return fields


def _v2_written(config: ModelConfig) -> dict[str, Any]:
    written = _latent_written(config)
    grouped = config.moe.num_groups > 1 or config.moe.groups_per_token > 1
    return written | {
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "n_group": config.moe.num_groups if grouped else None,
        "topk_group": config.moe.groups_per_token if grouped else None,
    }


def _topk_method(value: Any) -> str:
    allowed = ("greedy", "group_limited_greedy")
    if value not in allowed:
        raise ValueError(f"is not supported: allowed are {', '.join(allowed)}")
    return value


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    keys=_keys(
        sizes(
            vocab_size=102400,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=None,
            max_position_embeddings=2048,
        )
    )
    | {
        "first_k_dense_replace": Key("pattern", keys.whole, 0, direct=False),
        "n_routed_experts": Key("moe.num_experts", keys.count, 64),
        "n_shared_experts": Key("moe.shared_mlp_dim", keys.count, 2, direct=False),
        "num_experts_per_tok": Key("moe.experts_per_token", keys.count, REQUIRED),
        "moe_intermediate_size": Key("moe.mlp_dim", keys.count, 1407),
        "routed_scaling_factor": Key("moe.weights_scale", keys.number, 1.0),
        "topk_method": Key("moe.num_groups, moe.groups_per_token", _topk_method, "greedy", direct=False),
        "n_group": Key("moe.num_groups", keys.count, None, nullable=True, direct=False),
        "topk_group": Key("moe.groups_per_token", keys.count, None, nullable=True, direct=False),
    },
    no_effect=_NO_EFFECT,
    refused={
        "attention_bias": _NO_BIAS,
        "mlp_bias": Only((None, False), "shared and routed experts would differ"),
        "norm_topk_prob": Only((None, False), "the class has it and never applies it"),
        "moe_layer_freq": Only((None, 1), "every layer after the first dense ones has experts"),
        "scoring_func": Only((None, "softmax"), "the class scores by softmax"),
    },
    always={"rope_interleaved": True, "moe": {"scoring": "softmax", "group_score": "max"}},
    aliases={"num_experts": "n_routed_experts"},
    fields=_v2_fields,
    written=_v2_written,
    own_code=_OWN_CODE,
    quantized=("fp8",),
)
DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=_keys(
        sizes(
            vocab_size=129280,
            hidden_size=7168,
            intermediate_size=18432,
            num_hidden_layers=61,
            num_attention_heads=128,
            num_key_value_heads=128,
            max_position_embeddings=4096,
        )
    )
    | {
        "num_key_value_heads": Key("num_kv_heads", keys.count, 128, nullable=True, direct=False),
        "first_k_dense_replace": Key("pattern", keys.whole, 3, direct=False),
        "n_routed_experts": Key("moe.num_experts", keys.count, 256),
        "n_shared_experts": Key("moe.shared_mlp_dim", keys.count, 1, direct=False),
        "num_experts_per_tok": Key("moe.experts_per_token", keys.count, 8),
        "moe_intermediate_size": Key("moe.mlp_dim", keys.count, 2048),
        "routed_scaling_factor": Key("moe.weights_scale", keys.number, 2.5),
        "norm_topk_prob": Key("moe.normalize_weights", keys.flag, True),
        "n_group": Key("moe.num_groups", keys.count, 8),
        "topk_group": Key("moe.groups_per_token", keys.count, 4),
        "rope_interleave": Key("rope_interleaved", keys.flag, True),
    },
    no_effect=_NO_EFFECT,
    refused={
        "attention_bias": _NO_BIAS,
        "moe_layer_freq": Only((None, 1), "every layer after the first dense ones has experts"),
        "scoring_func": Only((None, "sigmoid"), "the class scores by sigmoid"),
        "topk_method": Only((None, "noaux_tc"), "the class chooses with a correction bias"),
    },
    always={"moe": {"scoring": "sigmoid", "group_score": "top2_sum", "correction_bias": True}},
    aliases={"num_local_experts": "n_routed_experts"},
    fields=_latent_fields,
    written=lambda config: _latent_written(config) | {"num_nextn_predict_layers": 0},  # they are not in our files
    other_model_types=("kimi_k2",),
    own_code=_OWN_CODE,
    quantized=("fp8",),
)
FAMILIES = (DEEPSEEK_V2, DEEPSEEK_V3)
