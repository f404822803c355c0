# SPDX-License-Identifier: Apache-2.0
"""What is changed in config.json, family by family, to see whether the reader means by it what transformers means.

Shared by `make_config_effects.py` (transformers) and `test_config_effects.py` (maxkit). An `Effect` changes one key of
a tiny model of `families.py`; `given` is put into the file before, so that the key has something to act on.
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from golden.families import FIXTURES

from maxkit.formats.hf_config.reader import FAMILIES, rope_keys

EFFECTS_FILE = Path(__file__).parent.parent / "fixtures" / "config_effects.json"
ABSENT = "<absent>"
TOKENS = np.random.default_rng(5).integers(3, 60, (1, 12))
KEPT_POSITIONS, KEPT_TOKENS = (6, 11), 8  # of the logits of a change, this much is stored


class Effect(NamedTuple):
    """One key, changed: in a file with `given`, the key gets `value`."""

    key: str
    value: Any
    given: dict[str, Any] = {}


# The tiny model of each family.
CASES = {
    "llama": "llama-yarn",
    "mistral": "mistral-window",
    "qwen2": "qwen2-window",
    "qwen3": "qwen3-full",
    "gemma": "gemma-mqa",
    "gemma2": "gemma2-caps",
    "gemma3": "gemma3-mixed",
    "olmo2": "olmo2-gqa",
    "olmo3": "olmo3-remainder",
    "phi3": "phi3-window",
    "mixtral": "mixtral-full",
    "qwen2_moe": "qwen2_moe-all",
    "qwen3_moe": "qwen3_moe-all",
    "gpt_oss": "gpt_oss-yarn",
    "llama4": "llama4-chunks",
    "deepseek_v2": "deepseek_v2-groups",
    "deepseek_v3": "deepseek_v3-groups",
    "qwen3_next": "qwen3_next-remainder",
    "gpt2": "gpt2-tied",
    "arcee": "arcee-bias",
    "seed_oss": "seed_oss-bias",
    "ministral": "ministral-mixed",
    "cwm": "cwm-default",
    "smollm3": "smollm3-nope",
    "granite": "granite-scales",
    "helium": "helium-gqa",
    "ernie4_5": "ernie4_5-bias",
    "cohere": "cohere-gqa",
    "starcoder2": "starcoder2-bias",
    "stablelm": "stablelm-serial",
    "glm": "glm-gqa",
    "glm4": "glm4-gqa",
    "olmoe": "olmoe-all",
    "glm4_moe": "glm4_moe-groups",
    "dots1": "dots1-window",
}
_PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_NONE = {"rope_parameters": ABSENT}
_DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
_YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}
_LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip
_BY_TYPE = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
# Keys that most families have. A value that changes shapes is compared by the tensors it asks for.
_COMMON = [
    Effect("vocab_size", 90),
    Effect("hidden_size", 48),
    Effect("intermediate_size", 50),
    Effect("num_hidden_layers", 2, {"layer_types": ABSENT}),
    Effect("num_attention_heads", 12, {"head_dim": 10}),
    Effect("num_key_value_heads", 3),
    Effect("head_dim", 12),
    Effect("max_position_embeddings", 8, _DYNAMIC),
    Effect("rms_norm_eps", 0.5),
    Effect("tie_word_embeddings", True, {"tie_word_embeddings": False}),
    Effect("hidden_act", "relu"),
    Effect("hidden_activation", "relu"),
    Effect("rope_theta", 50.0, _NONE),
    Effect("rope_scaling", {"rope_type": "linear", "factor": 3.0}, _NONE),
    Effect("rope_parameters", {"rope_type": "default", "rope_theta": 70.0}, _PLAIN),
    Effect("original_max_position_embeddings", 6, _LLAMA3),
    Effect("attention_bias", True, {"attention_bias": False}),
    Effect("query_pre_attn_scalar", 50),
    Effect(
        "layer_types",
        ["full_attention", "sliding_attention", "full_attention"],
        {"layer_types": ABSENT, "num_hidden_layers": 3},
    ),
    Effect("sliding_window", 3),
    Effect("num_local_experts", 6),
    Effect("num_experts", 8),
    Effect("num_experts_per_tok", 1),
    Effect("moe_intermediate_size", 20),
    Effect("shared_expert_intermediate_size", 26),
    Effect("norm_topk_prob", False, {"norm_topk_prob": True}),
    Effect("decoder_sparse_step", 2, {"mlp_only_layers": []}),
    Effect("mlp_only_layers", [1]),
]
_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ABSENT, "num_hidden_layers": 3}
_LATE = _WINDOW | {"max_window_layers": 1}
_QWEN = [
    Effect("use_sliding_window", False, _LATE),
    Effect("max_window_layers", 2, _LATE),
    Effect("sliding_window", 2, _LATE),
    Effect(
        "layer_types", ["sliding_attention", "full_attention", "full_attention"], _WINDOW | {"max_window_layers": 1}
    ),
]
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 3.0],
    "long_factor": [1.0, 4.0, 9.0],
}
_NO_TYPES = {"layer_types": ABSENT, "num_hidden_layers": 3}
_MLA = [
    Effect("qk_nope_head_dim", 8),
    Effect("qk_rope_head_dim", 6, {"head_dim": ABSENT}),
    Effect("v_head_dim", 9),
    Effect("kv_lora_rank", 10),
    Effect("q_lora_rank", None),
    Effect("num_attention_heads", 4, {"num_key_value_heads": None}),
    Effect("first_k_dense_replace", 2),
    Effect("n_routed_experts", 12),
    Effect("n_shared_experts", 2),
    Effect("routed_scaling_factor", 0.5),
    Effect("n_group", 2),
    Effect("topk_group", 3),
    Effect("rope_parameters", _YARN["rope_parameters"] | {"mscale": 1.0, "mscale_all_dim": 0.5}, _YARN),
]
_SPLIT = [
    Effect("first_k_dense_replace", 2),
    Effect("n_routed_experts", 12),
    Effect("n_shared_experts", 2),
    Effect("routed_scaling_factor", 0.5),
    Effect("n_group", 2),
    Effect("topk_group", 3),
]
_OWN: dict[str, list[Effect]] = {
    "llama": [Effect("mlp_bias", True)],
    "qwen2": [Effect("num_hidden_layers", 2, {"layer_types": ABSENT}), *_QWEN],
    "qwen3": _QWEN,
    "gemma": [Effect("hidden_act", "relu")],
    "gemma2": [
        Effect("final_logit_softcapping", None),
        Effect("attn_logit_softcapping", 1.0),
        Effect("layer_types", ["full_attention"] * 3, _NO_TYPES),
    ],
    "gemma3": [
        Effect("max_position_embeddings", 8, {"rope_parameters": _BY_TYPE | {
            "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}}),
        Effect("rope_parameters", _BY_TYPE | {"sliding_attention": {"rope_type": "default", "rope_theta": 90.0}},
               {"rope_parameters": _BY_TYPE}),
        Effect("final_logit_softcapping", 2.0),
        Effect("sliding_window_pattern", 2, _NO_TYPES),
        Effect("rope_local_base_freq", 40.0, _NONE),
    ],
    "olmo3": [
        Effect("max_position_embeddings", 8, {"rope_parameters": _BY_TYPE | {
            "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
            "num_hidden_layers": 4, "layer_types": ABSENT}),
        Effect("rope_parameters", _BY_TYPE | {"sliding_attention": {"rope_type": "default", "rope_theta": 90.0}},
               {"rope_parameters": _BY_TYPE}),
        Effect("rope_scaling", {"rope_type": "linear", "factor": 3.0},
               _NONE | {"num_hidden_layers": 4, "layer_types": ABSENT}),
    ],
    "phi3": [
        Effect("rope_scaling", {key: value for key, value in _LONG.items() if key != "rope_theta"}, _NONE),
        Effect("original_max_position_embeddings", 8,
               {"rope_parameters": _LONG, "original_max_position_embeddings": 32}),
        Effect("max_position_embeddings", 96, {"rope_parameters": _LONG, "original_max_position_embeddings": 8}),
        Effect("partial_rotary_factor", 0.67, _NONE),
    ],
    "mixtral": [Effect("sliding_window", 3, {"sliding_window": None})],
    "qwen2_moe": [
        Effect("qkv_bias", False),
        Effect("intermediate_size", 50, {"mlp_only_layers": [0]}),
        Effect("use_sliding_window", False, _WINDOW | {"max_window_layers": 3}),
        Effect("max_window_layers", 1, _WINDOW | {"max_window_layers": 3}),
        Effect("sliding_window", 2, _WINDOW | {"max_window_layers": 3}),
        Effect("layer_types", ["full_attention", "sliding_attention", "full_attention"],
               _WINDOW | {"max_window_layers": 3}),
    ],
    "qwen3_moe": [
        Effect("intermediate_size", 50, {"mlp_only_layers": [0]}),
        Effect("num_experts", 8, {"num_local_experts": ABSENT, "num_experts": 6}),
        Effect("use_sliding_window", True, {"sliding_window": 3}),
        Effect("sliding_window", 2, {"use_sliding_window": True, "sliding_window": 4}),
        Effect("norm_topk_prob", False, {"norm_topk_prob": True}),
    ],
    "gpt_oss": [
        Effect("swiglu_limit", 0.5),
        Effect("layer_types", ["full_attention", "sliding_attention", "full_attention", "full_attention"]),
        Effect("rope_parameters", ABSENT),
    ],
    "llama4": [
        Effect("num_hidden_layers", 3, dict.fromkeys(("layer_types", "no_rope_layers", "moe_layers"), ABSENT)),
        Effect("intermediate_size_mlp", 40),
        Effect("moe_layers", [0, 2]),
        Effect("interleave_moe_layer_step", 1, {"moe_layers": ABSENT}),
        Effect("use_qk_norm", False),
        Effect("no_rope_layers", [0, 1, 1, 0, 1]),
        Effect("no_rope_layer_interval", 2, {"no_rope_layers": ABSENT, "layer_types": ABSENT}),
        Effect("attention_chunk_size", 3),
        Effect("layer_types", ["full_attention", "chunked_attention"] * 2 + ["chunked_attention"]),
        Effect("attn_temperature_tuning", False),
        Effect("floor_scale", 2),
        Effect("attn_scale", 0.9),
        Effect("num_experts_per_tok", 2),
    ],
    "deepseek_v2": [*_MLA, Effect("topk_method", "greedy")],
    "deepseek_v3": [*_MLA, Effect("rope_interleave", False)],
    "qwen3_next": [
        Effect("head_dim", 16),
        Effect("layer_types", ["full_attention", "linear_attention", "full_attention", "linear_attention"],
               {"num_hidden_layers": 4, "layer_types": ABSENT}),
        Effect("full_attention_interval", 2, {"layer_types": ABSENT}),
        Effect("linear_num_key_heads", 3),
        Effect("linear_num_value_heads", 4),
        Effect("linear_key_head_dim", 8),
        Effect("linear_value_head_dim", 6),
        Effect("linear_conv_kernel_dim", 3),
        Effect("partial_rotary_factor", 0.8, _NONE | {"head_dim": 10}),
        Effect("rope_theta", 50.0, _NONE | {"head_dim": 16}),
        Effect("rope_scaling", {"rope_type": "linear", "factor": 3.0}, _NONE | {"head_dim": 16}),
        Effect("original_max_position_embeddings", 6, _LLAMA3 | {"head_dim": 16}),
        Effect("max_position_embeddings", 8, _DYNAMIC | {"head_dim": 16}),
        Effect("rope_parameters", {"rope_type": "default", "rope_theta": 70.0}, _PLAIN | {"head_dim": 16}),
        Effect("num_hidden_layers", 4, {"layer_types": ABSENT}),
        Effect("intermediate_size", 50, {"mlp_only_layers": [0]}),
    ],
    "arcee": [Effect("mlp_bias", False)],
    "seed_oss": [Effect("mlp_bias", False), Effect("attention_out_bias", False)],
    "cwm": [Effect("mlp_bias", True), Effect("rope_theta", 50.0, {"rope_parameters": {"rope_type": "default"}})],
    "smollm3": [
        Effect("use_sliding_window", False, {"layer_types": ABSENT}),
        Effect("sliding_window", 2),
        Effect("layer_types", ["full_attention", "sliding_attention", "full_attention"],
               {"layer_types": ABSENT, "no_rope_layers": [1, 1, 0], "num_hidden_layers": 3}),
        Effect("num_hidden_layers", 2, {"layer_types": ABSENT, "no_rope_layers": ABSENT}),
        Effect("no_rope_layers", [1, 1, 0, 1, 0]),
        Effect("no_rope_layer_interval", 3, {"no_rope_layers": ABSENT, "layer_types": ABSENT}),
        Effect("mlp_bias", True),
    ],
    "granite": [
        Effect("attention_multiplier", 0.9),
        Effect("embedding_multiplier", 0.4),
        Effect("logits_scaling", 3.0),
        Effect("residual_multiplier", 1.4),
        Effect("mlp_bias", True),
    ],
    "helium": [Effect("mlp_bias", False)],
    "ernie4_5": [Effect("use_bias", False)],
    "cohere": [Effect("logit_scale", 0.2), Effect("layer_norm_eps", 0.5)],
    "starcoder2": [Effect("norm_epsilon", 0.5), Effect("use_bias", False)],
    "stablelm": [
        Effect("layer_norm_eps", 0.5),
        Effect("use_qkv_bias", False),
        Effect("use_parallel_residual", True),
        Effect("partial_rotary_factor", 0.75, _NONE),
        Effect("hidden_size", 96),
        Effect("num_attention_heads", 3, {"num_key_value_heads": 3}),
        Effect("max_position_embeddings", 8, _DYNAMIC | {"partial_rotary_factor": 1.0}),
        Effect("rope_theta", 50.0, _NONE | {"partial_rotary_factor": 1.0}),
        Effect("rope_scaling", {"rope_type": "linear", "factor": 3.0}, _NONE | {"partial_rotary_factor": 1.0}),
        Effect("rope_parameters", {"rope_type": "default", "rope_theta": 70.0},
               _PLAIN | {"partial_rotary_factor": 1.0}),
    ],
    "glm": [Effect("num_attention_heads", 12, {"head_dim": 8}), Effect("partial_rotary_factor", 1.0, _NONE)],
    "glm4": [Effect("num_attention_heads", 12, {"head_dim": 8}), Effect("partial_rotary_factor", 1.0, _NONE)],
    "olmoe": [Effect("num_attention_heads", 2, {"head_dim": ABSENT}), Effect("hidden_size", 48, {"head_dim": ABSENT})],
    "glm4_moe": [
        Effect("num_attention_heads", 12, {"head_dim": 8}),
        Effect("partial_rotary_factor", 1.0, _NONE),
        Effect("use_qk_norm", False),
        *_SPLIT,
    ],
    "dots1": [
        Effect("sliding_window", 2),
        Effect("max_window_layers", 2, {"layer_types": ABSENT}),
        *(effect for effect in _SPLIT if effect.key not in ("n_group", "topk_group")),
        Effect("n_group", 4, {"topk_group": 2, "n_group": 2}),
        Effect("topk_group", 3, {"topk_group": 2, "n_group": 4}),
    ],
    "gpt2": [
        Effect("n_positions", 80),
        Effect("n_embd", 48),
        Effect("n_layer", 2),
        Effect("n_head", 4),
        Effect("n_inner", 60),
        Effect("activation_function", "relu"),
        Effect("layer_norm_epsilon", 0.5),
        Effect("scale_attn_weights", False),
        Effect("vocab_size", 90),
        Effect("tie_word_embeddings", False),
    ],
}  # fmt: skip
# Keys that a family reads and that can only say what another says already.
NOTHING_TO_CHANGE: dict[str, dict[str, str]] = {family: {} for family in CASES} | {
    "gemma3": {"original_max_position_embeddings": "is a key of the tables per layer type"},
    "olmo3": {
        "original_max_position_embeddings": "is a key of the tables per layer type",
        "rope_theta": "any value but the default is refused: versions of transformers disagree",
    },
    "helium": dict.fromkeys(
        ("hidden_size", "num_attention_heads", "head_dim"), "one alone is refused: heads * head_dim is hidden_size"
    ),
    "olmoe": {"head_dim": "any value but hidden_size / heads is refused"},
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3"),
        {
            "num_key_value_heads": "any value but num_attention_heads is refused",
            "head_dim": "any value but qk_rope_head_dim is refused",
        },
    ),
}


def effects(family: str) -> list[Effect]:
    """The changes of a family; its own stand in for common ones of the same key."""
    known = FAMILIES[family].keys.keys() | rope_keys(FAMILIES[family]).keys()
    own = _OWN.get(family, [])
    common = [] if family == "gpt2" else [effect for effect in _COMMON if effect.key not in {e.key for e in own}]
    return [effect for effect in common + own if effect.key in known and effect.key not in NOTHING_TO_CHANGE[family]]


def apply(raw: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`raw` with keys set or, where the value is ABSENT, taken out."""
    merged = raw | change
    return {key: value for key, value in merged.items() if not isinstance(value, str) or value != ABSENT}


def base(family: str) -> dict[str, Any]:
    """The file that is changed."""
    return json.loads((FIXTURES / CASES[family] / "config.json").read_text())


def both_files(family: str, effect: Effect) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file before and after the change."""
    before = apply(base(family), effect.given)
    return before, apply(before, {effect.key: effect.value})


def label(effect: Effect) -> str:
    """The key under which a change is stored."""
    return f"{effect.key}={json.dumps(effect.value)} given {json.dumps(effect.given, sort_keys=True)}"


def tensors_checksum(shapes: dict[str, tuple[int, ...]]) -> str:
    """A number that tells two sets of names and shapes apart."""
    return f"{zlib.crc32(json.dumps(sorted((key, list(shape)) for key, shape in shapes.items())).encode()):08x}"


def other_value(value: Any) -> Any:
    """Something else of the same kind, for a key that should not matter."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return (value + 0.2) % 1  # dropout is below 1
    if isinstance(value, int):
        return value + 1
    return {"cls_index": "mean", "silu": "relu"}.get(value, "tanh")


def without_effect(family: str, default: dict[str, Any]) -> dict[str, Any]:
    """Keys of the class that the family lists as without effect, each with a value that is not the default."""
    raw = default | base(family)
    return {key: other_value(raw[key]) for key in FAMILIES[family].no_effect if key in default}
