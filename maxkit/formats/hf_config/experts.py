# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts over grouped-query attention: Mixtral, Qwen2-MoE, Qwen3-MoE, GPT-OSS, Llama 4 (text).

Checked against transformers 5.23 (`models/<name>/configuration_<name>.py`, `modeling_<name>.py`).
"""

from typing import Any

from maxkit.formats.hf_config import keys
from maxkit.formats.hf_config.dense import QWEN_WINDOW, both_biases
from maxkit.formats.hf_config.family import (
    Family,
    RopeKeys,
    Values,
    layer_types,
    one_window,
    sizes,
    window_blocks,
    without_activation,
    written_layer_types,
)
from maxkit.formats.hf_config.keys import Key, Only
from maxkit.models.config import BlockSpec, ModelConfig

ROUTER_TRAINING = {
    "router_aux_loss_coef": "only training uses the balance loss",
    "output_router_logits": "chooses which intermediate results are returned",
}
JITTER = {"router_jitter_noise": "noise on the router's input, in training only"}


def moe_blocks(blocks: tuple[BlockSpec, ...], layers: set[int]) -> tuple[BlockSpec, ...]:
    """`blocks`, those in `layers` with experts."""
    return tuple(block.model_copy(update={"mlp": "moe"}) if i in layers else block for i, block in enumerate(blocks))


def moe_layers(config: ModelConfig) -> list[int]:
    """The layers that have experts."""
    return [i for i, block in enumerate(config.blocks) if block.mlp == "moe"]


def _one_window_blocks(values: Values, window: int | None) -> tuple[BlockSpec, ...]:
    kind = "full_attention" if window is None else "sliding_attention"
    return window_blocks((kind,) * values["num_hidden_layers"], window)


def _same_window(config: ModelConfig) -> int | None:
    if len({block.sliding_window for block in config.blocks}) > 1:
        raise ValueError("the class gives all layers the same window")
    return one_window(config)


def _mixtral_fields(values: Values) -> dict[str, Any]:
    blocks = _one_window_blocks(values, values["sliding_window"])
    experts = {"mlp_dim": values["intermediate_size"]}
    return {"blocks": moe_blocks(blocks, set(range(len(blocks)))), "moe": experts}


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    keys=sizes(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
    )
    | {
        "sliding_window": Key("pattern", keys.count, None, nullable=True, direct=False),
        "num_local_experts": Key("moe.num_experts", keys.count, 8),
        "num_experts_per_tok": Key("moe.experts_per_token", keys.count, 2),
    },
    no_effect=ROUTER_TRAINING | JITTER,
    refused={"layer_types": Only((None,), "the class gives all layers the same window")},
    always={"moe": {"scoring": "softmax", "normalize_weights": True}},
    aliases={"num_experts": "num_local_experts"},
    rope=RopeKeys(theta=1e6),
    fields=_mixtral_fields,
    written=lambda config: {"sliding_window": _same_window(config)},
)

QWEN_EXPERTS = {
    "num_experts_per_tok": Key("moe.experts_per_token", keys.count, 4),
    "moe_intermediate_size": Key("moe.mlp_dim", keys.count, 1408),
    "norm_topk_prob": Key("moe.normalize_weights", keys.flag, False),
    "decoder_sparse_step": Key("pattern", keys.count, 1, direct=False),
    "mlp_only_layers": Key("pattern", keys.indices, None, nullable=True, direct=False),
}


def qwen_sparse_layers(values: Values) -> set[int]:
    """Every `decoder_sparse_step`-th layer has experts, but those in `mlp_only_layers` do not."""
    step, dense = values["decoder_sparse_step"], values["mlp_only_layers"] or ()
    return {i for i in range(values["num_hidden_layers"]) if (i + 1) % step == 0 and i not in dense}


def qwen_written_experts(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `qwen_sparse_layers`."""
    sparse = set(moe_layers(config))
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in range(config.num_layers) if i not in sparse]}


def _qwen2_moe_fields(values: Values) -> dict[str, Any]:
    window = (values["sliding_window"] or None) if values["use_sliding_window"] else None
    below = values["max_window_layers"] if window else 0
    types = layer_types(values, lambda i: "sliding_attention" if i % 2 == 0 and i < below else "full_attention")
    return {"blocks": moe_blocks(window_blocks(types, window), qwen_sparse_layers(values))}


def _qwen2_moe_written(config: ModelConfig) -> dict[str, Any]:
    window = one_window(config)
    return qwen_written_experts(config) | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": config.num_layers,
        "layer_types": written_layer_types(config),
    }


QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    keys=sizes(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=32768,
    )
    | QWEN_WINDOW
    | QWEN_EXPERTS
    | {
        "num_experts": Key("moe.num_experts", keys.count, 60),
        "shared_expert_intermediate_size": Key("moe.shared_mlp_dim", keys.count, 5632),
        "qkv_bias": Key("attention_bias", keys.flag, True),
    },
    no_effect=ROUTER_TRAINING,
    always={"moe": {"scoring": "softmax", "shared_gate": True}},
    fields=_qwen2_moe_fields,
    written=_qwen2_moe_written,
)


def _qwen3_moe_fields(values: Values) -> dict[str, Any]:
    blocks = _one_window_blocks(values, values["sliding_window"] if values["use_sliding_window"] else None)
    return both_biases(values) | {"blocks": moe_blocks(blocks, qwen_sparse_layers(values))}


def _qwen3_moe_written(config: ModelConfig) -> dict[str, Any]:
    window = _same_window(config)
    return qwen_written_experts(config) | {"use_sliding_window": window is not None, "sliding_window": window}


QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=sizes(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    )
    | QWEN_EXPERTS
    | {
        "num_experts_per_tok": Key("moe.experts_per_token", keys.count, 8),
        "moe_intermediate_size": Key("moe.mlp_dim", keys.count, 768),
        "num_experts": Key("moe.num_experts", keys.count, 128),
        "attention_bias": Key("attention_bias", keys.flag, False),
        "use_sliding_window": Key("pattern", keys.flag, False, direct=False),
        "sliding_window": Key("pattern", keys.count, 4096, nullable=True, direct=False),
    },
    no_effect=ROUTER_TRAINING | {"max_window_layers": "the class gives all layers the same window"},
    refused={
        "layer_types": Only((None,), "the class gives all layers the same window"),
        "qkv_bias": Only((None, False), "the class has attention_bias"),
        "use_qk_norm": Only((None, True), "queries and keys are always normalised"),
        "shared_expert_intermediate_size": Only((None, 0), "the class has no shared expert"),
    },
    always={"qk_norm": "head", "moe": {"scoring": "softmax"}},
    aliases={"num_local_experts": "num_experts"},
    fields=_qwen3_moe_fields,
    written=_qwen3_moe_written,
)


def _gpt_oss_fields(values: Values) -> dict[str, Any]:
    types = layer_types(values, lambda i: "full_attention" if i % 2 else "sliding_attention")
    blocks = window_blocks(types, values["sliding_window"])
    return both_biases(values) | {
        "blocks": moe_blocks(blocks, set(range(len(blocks)))),
        "moe": {"mlp_dim": values["intermediate_size"]},
    }


def _gpt_oss_written(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": one_window(config), "layer_types": written_layer_types(config), "hidden_act": "silu"}


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    keys=without_activation(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=36,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
    )
    | {
        "attention_bias": Key("attention_bias", keys.flag, True),
        "sliding_window": Key("pattern", keys.count, 128, nullable=True, direct=False),
        "layer_types": Key("pattern", keys.texts, None, nullable=True, direct=False),
        "num_local_experts": Key("moe.num_experts", keys.count, 128),
        "num_experts_per_tok": Key("moe.experts_per_token", keys.count, 4),
        "swiglu_limit": Key("activation_limit", keys.number, 7.0),
    },
    no_effect=ROUTER_TRAINING
    | {
        "hidden_act": "the experts' activation is fixed: a clamped SwiGLU",
        "initial_context_length": "the class reads original_max_position_embeddings",
    },
    refused={"swiglu_alpha": Only((1.702,), "the slope of the clamped SwiGLU is fixed")},
    always={
        "activation": "clamped_swiglu",
        "attention_sinks": True,
        "moe": {"scoring": "topk_softmax", "router_bias": True, "expert_bias": True},
    },
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    rope=RopeKeys(
        theta=150000.0,
        table={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    fields=_gpt_oss_fields,
    written=_gpt_oss_written,
    quantized=("mxfp4",),
)


def _truth(value: Any) -> bool:
    """A flag; the published files say 4 for true."""
    return True if value == 4 and not isinstance(value, (bool, float)) else keys.flag(value)


def _llama4_fields(values: Values) -> dict[str, Any]:
    count, every = values["num_hidden_layers"], values["no_rope_layer_interval"]
    turned = values["no_rope_layers"] or tuple(int((i + 1) % every != 0) for i in range(count))
    if len(turned) != count or not set(turned) <= {0, 1}:
        raise ValueError(f"no_rope_layers must be {count} zeros and ones, one per layer (1: with RoPE)")
    step, sparse = values["interleave_moe_layer_step"], values["moe_layers"]
    sparse = range(step - 1, count, step) if sparse is None else sparse
    types = layer_types(values, lambda i: "chunked_attention" if turned[i] else "full_attention")
    strange = sorted(set(types) - {"chunked_attention", "full_attention"})
    if strange:
        raise ValueError(
            f"layer_types: {strange[0][:60]!r} is not supported: allowed are chunked_attention, full_attention"
        )
    chunk = values["attention_chunk_size"]
    if chunk is None and "chunked_attention" in types:
        raise ValueError("layer_types has chunked_attention, but attention_chunk_size is not set")
    blocks = tuple(
        BlockSpec(chunk_size=chunk if kind == "chunked_attention" else None, rope=bool(turned[i]))
        for i, kind in enumerate(types)
    )
    fields = both_biases(values) | {
        "blocks": moe_blocks(blocks, set(sparse)),
        "mlp_dim": values["intermediate_size_mlp"],
        "moe": {"mlp_dim": values["intermediate_size"], "shared_mlp_dim": values["intermediate_size"]},
        "qk_norm": "unit" if values["use_qk_norm"] else "none",
    }
    if values["attn_temperature_tuning"]:
        fields["attention_temperature"] = {
            "floor_scale": values["floor_scale"],
            "coefficient": values["attn_scale"],
        }
    return fields


def _integral(value: float) -> float:
    """An int where it is one: transformers 5 takes nothing else for this key."""
    return int(value) if value == int(value) else value


def _llama4_written(config: ModelConfig) -> dict[str, Any]:
    chunks = {block.chunk_size for block in config.blocks} - {None}
    if len(chunks) > 1:
        raise ValueError("blocks with different chunk sizes")
    tuning = config.attention_temperature
    return {
        "intermediate_size": config.moe.mlp_dim if config.moe else config.mlp_dim,
        "intermediate_size_mlp": config.mlp_dim,
        "use_qk_norm": config.qk_norm == "unit",
        "no_rope_layers": [int(block.rope) for block in config.blocks],
        "layer_types": ["chunked_attention" if block.chunk_size else "full_attention" for block in config.blocks],
        "attention_chunk_size": min(chunks, default=None),
        "moe_layers": moe_layers(config),
        "interleave_moe_layer_step": 1,
        "attn_temperature_tuning": tuning is not None,
        "floor_scale": _integral(tuning.floor_scale) if tuning else 8192,
        "attn_scale": tuning.coefficient if tuning else 0.1,
    }


LLAMA4 = Family(
    name="llama4",
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    keys=sizes(
        vocab_size=202048,
        hidden_size=5120,
        intermediate_size=8192,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
    )
    | {
        "intermediate_size": Key("moe.mlp_dim, moe.shared_mlp_dim", keys.count, 8192, direct=False),
        "intermediate_size_mlp": Key("mlp_dim", keys.count, 16384, direct=False),
        "attention_bias": Key("attention_bias", keys.flag, False),
        "num_local_experts": Key("moe.num_experts", keys.count, 16),
        "num_experts_per_tok": Key("moe.experts_per_token", keys.count, 1),
        "moe_layers": Key("pattern", keys.indices, None, nullable=True, direct=False),
        "interleave_moe_layer_step": Key("pattern", keys.count, 1, direct=False),
        "use_qk_norm": Key("qk_norm", keys.flag, True, direct=False),
        "no_rope_layers": Key("pattern", keys.indices, None, nullable=True, direct=False),
        "no_rope_layer_interval": Key("pattern", keys.count, 4, direct=False),
        "attention_chunk_size": Key("pattern", keys.count, 8192, nullable=True, direct=False),
        "layer_types": Key("pattern", keys.texts, None, nullable=True, direct=False),
        "attn_temperature_tuning": Key("attention_temperature", _truth, True, direct=False),
        "floor_scale": Key("attention_temperature.floor_scale", keys.number, 8192, direct=False),
        "attn_scale": Key("attention_temperature.coefficient", keys.number, 0.1, direct=False),
    },
    no_effect=ROUTER_TRAINING | JITTER,
    refused={"for_llm_compressor": Only((None, False), "experts in another form")},
    always={"rope_interleaved": True, "moe": {"scoring": "topk_sigmoid", "scale_inputs": True}},
    rope=RopeKeys(theta=500000.0),
    fields=_llama4_fields,
    written=_llama4_written,
    wrapper=(
        "Llama4ForConditionalGeneration",
        "llama4",
        dict.fromkeys(
            "vision_config boi_token_index eoi_token_index image_token_index".split(),
            "of the images, which only the multimodal model sees",
        ),
    ),
)
FAMILIES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT_OSS, LLAMA4)
