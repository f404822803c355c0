# SPDX-License-Identifier: Apache-2.0
"""Linear attention by the gated delta rule between layers of gated softmax attention: Qwen3-Next.

Checked against transformers 5.23 (`models/qwen3_next`).
"""

from typing import Any

from maxkit.formats.hf_config import keys
from maxkit.formats.hf_config.experts import (
    QWEN_EXPERTS,
    ROUTER_TRAINING,
    moe_blocks,
    qwen_sparse_layers,
    qwen_written_experts,
)
from maxkit.formats.hf_config.family import Family, RopeKeys, Values, layer_types, without_activation
from maxkit.formats.hf_config.keys import Key, Only
from maxkit.models.config import BlockSpec, ModelConfig


def _fields(values: Values) -> dict[str, Any]:
    every = values["full_attention_interval"]
    types = layer_types(values, lambda i: "linear_attention" if (i + 1) % every else "full_attention")
    strange = sorted(set(types) - {"linear_attention", "full_attention"})
    if strange:
        raise ValueError(
            f"layer_types: {strange[0][:60]!r} is not supported: allowed are full_attention, linear_attention"
        )
    delta = BlockSpec(mixer="gated_delta")
    blocks = tuple(delta if kind == "linear_attention" else BlockSpec() for kind in types)
    return {"blocks": moe_blocks(blocks, qwen_sparse_layers(values))}


def _written(config: ModelConfig) -> dict[str, Any]:
    types = ["linear_attention" if block.mixer == "gated_delta" else "full_attention" for block in config.blocks]
    return qwen_written_experts(config) | {"layer_types": types}


QWEN3_NEXT = Family(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    keys=without_activation(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        max_position_embeddings=32768,
    )
    | QWEN_EXPERTS
    | {
        "num_experts": Key("moe.num_experts", keys.count, 512),
        "num_experts_per_tok": Key("moe.experts_per_token", keys.count, 10),
        "moe_intermediate_size": Key("moe.mlp_dim", keys.count, 512),
        "shared_expert_intermediate_size": Key("moe.shared_mlp_dim", keys.count, 512),
        "norm_topk_prob": Key("moe.normalize_weights", keys.flag, True),
        "layer_types": Key("pattern", keys.texts, None, nullable=True, direct=False),
        "full_attention_interval": Key("pattern", keys.count, 4, direct=False),
        "linear_num_key_heads": Key("gated_delta.num_key_heads", keys.count, 16),
        "linear_num_value_heads": Key("gated_delta.num_value_heads", keys.count, 32),
        "linear_key_head_dim": Key("gated_delta.key_head_dim", keys.count, 128),
        "linear_value_head_dim": Key("gated_delta.value_head_dim", keys.count, 128),
        "linear_conv_kernel_dim": Key("gated_delta.conv_width", keys.count, 4),
    },
    no_effect=ROUTER_TRAINING,
    refused={
        "attention_bias": Only((None, False), "the gate beside the queries would have a bias as well"),
        "hidden_act": Only((None, "silu", "swish"), "it is the convolution's activation too, which is fixed"),
        "use_sliding_window": Only((None, False), "the class has no sliding window"),
        "sliding_window": Only((None,), "the class has no sliding window"),
    },
    always={
        "norm_scale_offset": 1.0,
        "qk_norm": "head",
        "attention_gate": True,
        "moe": {"scoring": "softmax", "shared_gate": True},
    },
    rope=RopeKeys(partial=0.25),
    fields=_fields,
    written=lambda config: _written(config) | {"hidden_act": "silu"},
)
FAMILIES = (QWEN3_NEXT,)
