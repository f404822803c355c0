# SPDX-License-Identifier: Apache-2.0
"""Families that are Llama, Gemma or GPT-2 with other constants: each a few rows.

Arcee, Cohere, CWM, Dots, Ernie 4.5, GLM, Granite, Helium, Ministral, OLMoE, Seed-OSS, SmolLM3, StableLM, StarCoder2.
Checked against transformers 5.23 (`models/<name>/configuration_<name>.py`, `modeling_<name>.py`).
"""

import dataclasses
import math
from typing import Any

from maxkit.formats.hf_config import keys
from maxkit.formats.hf_config.dense import LLAMA, NO_WINDOW, both_biases
from maxkit.formats.hf_config.experts import ROUTER_TRAINING, moe_blocks, moe_layers
from maxkit.formats.hf_config.family import (
    Family,
    RopeKeys,
    Values,
    layer_types,
    one_window,
    sizes,
    window_blocks,
    written_layer_types,
)
from maxkit.formats.hf_config.keys import REQUIRED, Key, Only
from maxkit.models.config import BlockSpec, ModelConfig

_FLAG_OFF = Key("attention_bias", keys.flag, False)
_WINDOW_LIST = {
    "sliding_window": Key("pattern", keys.count, 4096, nullable=True, direct=False),
    "layer_types": Key("pattern", keys.texts, None, nullable=True, direct=False),
}
_BALANCE = ROUTER_TRAINING | {
    "num_nextn_predict_layers": "layers that predict further tokens, which the class leaves out",
    "num_mtp_layers": "layers that predict further tokens, which the class leaves out",
}


def _windows(default: Any) -> Any:
    """`fields` of full and sliding layers; `default` says of which kind layer i is."""
    return lambda values: {
        "blocks": window_blocks(layer_types(values, lambda i: default(i, values)), values["sliding_window"])
    }


def _windows_written(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": one_window(config), "layer_types": written_layer_types(config)}


def inverse(value: float) -> float:
    """The number whose inverse is `value` to the last bit, where there is one."""
    near = 1 / value
    choices = (near, float(round(near) or 1), math.nextafter(near, math.inf), math.nextafter(near, 0))
    return next((choice for choice in choices if 1 / choice == value), near)


ARCEE = dataclasses.replace(
    LLAMA,
    name="arcee",
    architecture="ArceeForCausalLM",
    keys=sizes(
        vocab_size=32000,
        hidden_size=2560,
        intermediate_size=18432,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        activation="relu2",
    )
    | {"attention_bias": _FLAG_OFF, "mlp_bias": Key("mlp_bias", keys.flag, False)},
    always={"mlp_gated": False},
)
SEED_OSS = Family(
    name="seed_oss",
    architecture="SeedOssForCausalLM",
    keys=sizes(
        vocab_size=155136,
        hidden_size=4096,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=80,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=524288,
    )
    | {
        "attention_bias": Key("attention_bias", keys.flag, True),
        "attention_out_bias": Key("attention_out_bias", keys.flag, False),
        "mlp_bias": Key("mlp_bias", keys.flag, False),
    },
    no_effect={"residual_dropout": "only training uses it"},
    refused=NO_WINDOW,
)
MINISTRAL = Family(
    name="ministral",
    architecture="MinistralForCausalLM",
    keys=sizes(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )
    | _WINDOW_LIST,
    fields=_windows(lambda i, values: "full_attention" if values["sliding_window"] is None else "sliding_attention"),
    written=_windows_written,
)
CWM = Family(
    name="cwm",
    architecture="CwmForCausalLM",
    keys=sizes(
        vocab_size=128256,
        hidden_size=6144,
        intermediate_size=21504,
        num_hidden_layers=64,
        num_attention_heads=48,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
    )
    | _WINDOW_LIST
    | {
        "sliding_window": Key("pattern", keys.count, 8192, nullable=True, direct=False),
        "mlp_bias": Key("mlp_bias", keys.flag, False),
    },
    rope=RopeKeys(
        theta=1e6,
        table={
            "rope_type": "llama3",
            "rope_theta": 1e6,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    fields=_windows(lambda i, values: "sliding_attention" if i % 4 else "full_attention"),
    written=_windows_written,
    required_ids=("bos_token_id",),
)


def _smollm3_fields(values: Values) -> dict[str, Any]:
    count, every = values["num_hidden_layers"], values["no_rope_layer_interval"]
    turned = values["no_rope_layers"]
    turned = tuple(int((i + 1) % every != 0) for i in range(count)) if turned is None else turned
    if len(turned) != count or not set(turned) <= {0, 1}:
        raise ValueError(f"no_rope_layers must be {count} zeros and ones, one per layer (1: with RoPE)")
    window = values["sliding_window"] if values["use_sliding_window"] else None
    types = layer_types(values, lambda i: "sliding_attention" if window and not turned[i] else "full_attention")
    blocks = tuple(
        block.model_copy(update={"rope": bool(turned[i])}) for i, block in enumerate(window_blocks(types, window))
    )
    return both_biases(values) | {"blocks": blocks}


SMOLLM3 = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    keys=sizes(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    | _WINDOW_LIST
    | {
        "attention_bias": _FLAG_OFF,
        "mlp_bias": Key("mlp_bias", keys.flag, False),
        "use_sliding_window": Key("pattern", keys.flag, False, direct=False),
        "sliding_window": Key("pattern", keys.count, None, nullable=True, direct=False),
        "no_rope_layers": Key("pattern", keys.indices, None, nullable=True, direct=False),
        "no_rope_layer_interval": Key("pattern", keys.count, 4, direct=False),
    },
    no_effect={"max_window_layers": "the class reads layer_types"},
    rope=RopeKeys(theta=2e6),
    fields=_smollm3_fields,
    written=lambda config: (
        _windows_written(config)
        | {
            "use_sliding_window": one_window(config) is not None,
            "no_rope_layers": [int(block.rope) for block in config.blocks],
        }
    ),
)


def _granite_fields(values: Values) -> dict[str, Any]:
    head_dim, scale = values["fields"]["head_dim"], values["attention_multiplier"]
    embedding = values["embedding_multiplier"]
    return both_biases(values) | {
        "attention_scale": None if scale == head_dim**-0.5 else scale,
        "embedding_scale": None if embedding == 1.0 else embedding,
        "logit_scale": 1 / values["logits_scaling"],
    }


def _granite_written(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention_scale
    return {
        "attention_multiplier": config.head_dim**-0.5 if scale is None else scale,
        "embedding_multiplier": config.embedding_scale or 1.0,
        "logits_scaling": inverse(config.logit_scale),
    }


GRANITE = dataclasses.replace(
    LLAMA,
    name="granite",
    architecture="GraniteForCausalLM",
    keys=LLAMA.keys
    | {
        "attention_multiplier": Key("attention_scale", keys.number, 1.0, direct=False),
        "embedding_multiplier": Key("embedding_scale", keys.number, 1.0, direct=False),
        "logits_scaling": Key("logit_scale", keys.number, 1.0, direct=False),
        "residual_multiplier": Key("residual_scale", keys.number, 1.0),
    },
    fields=_granite_fields,
    written=_granite_written,
)


def _helium_fields(values: Values) -> dict[str, Any]:
    fields = values["fields"]
    if fields["num_heads"] * fields["head_dim"] != fields["embed_dim"]:
        raise ValueError("num_attention_heads * head_dim must be hidden_size: the class's output projection is square")
    return {}


HELIUM = Family(
    name="helium",
    architecture="HeliumForCausalLM",
    keys=sizes(
        vocab_size=48000,
        hidden_size=2560,
        intermediate_size=7040,
        num_hidden_layers=24,
        num_attention_heads=20,
        num_key_value_heads=20,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-8,
    )
    | {"attention_bias": _FLAG_OFF, "mlp_bias": Key("mlp_bias", keys.flag, False)},
    refused=NO_WINDOW,
    always={"rope_interleaved": True},
    rope=RopeKeys(theta=1e5),
    fields=_helium_fields,
)
ERNIE45 = Family(
    name="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    keys=sizes(
        vocab_size=103424,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=18,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    | {"use_bias": Key("attention_bias, attention_out_bias, mlp_bias", keys.flag, False, direct=False)},
    always={"rope_interleaved": True},
    rope=RopeKeys(theta=500000.0),
    fields=lambda values: dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias"), values["use_bias"]),
    written=lambda config: {"use_bias": config.attention_bias},
)


def _layer_norm(names: dict[str, Key], eps: str) -> dict[str, Key]:
    """The keys of a class with LayerNorm, whose epsilon is called `eps`."""
    return {name: key for name, key in names.items() if name != "rms_norm_eps"} | {
        eps: Key("norm_eps", keys.number, 1e-5)
    }


COHERE = Family(
    name="cohere",
    architecture="CohereForCausalLM",
    keys=_layer_norm(
        sizes(
            vocab_size=256000,
            hidden_size=8192,
            intermediate_size=22528,
            num_hidden_layers=40,
            num_attention_heads=64,
            num_key_value_heads=None,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        "layer_norm_eps",
    )
    | {"attention_bias": _FLAG_OFF, "logit_scale": Key("logit_scale", keys.number, 0.0625)},
    refused={"use_qk_norm": Only((None, False), "its norms of queries and keys have a scale per head")},
    always={"norm": "layer", "parallel_branches": "one_norm", "rope_interleaved": True},
    rope=RopeKeys(theta=500000.0),
    fields=both_biases,
)


def _one_window(values: Values) -> dict[str, Any]:
    window = values["sliding_window"]
    kind = "full_attention" if window is None else "sliding_attention"
    return {"blocks": window_blocks((kind,) * values["num_hidden_layers"], window)}


STARCODER2 = Family(
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    keys=_layer_norm(
        sizes(
            vocab_size=49152,
            hidden_size=3072,
            intermediate_size=12288,
            num_hidden_layers=30,
            num_attention_heads=24,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            activation="gelu_tanh",
        ),
        "norm_epsilon",
    )
    | {
        "use_bias": Key("attention_bias, attention_out_bias, mlp_bias", keys.flag, True, direct=False),
        "sliding_window": Key("pattern", keys.count, None, nullable=True, direct=False),
    },
    no_effect=dict.fromkeys(("residual_dropout", "embedding_dropout"), "only training uses it"),
    refused={"layer_types": Only((None,), "the class gives all layers the same window")},
    always={"norm": "layer", "norm_bias": True, "mlp_gated": False},
    fields=lambda values: (
        _one_window(values) | dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias"), values["use_bias"])
    ),
    written=lambda config: {"use_bias": config.attention_bias, "sliding_window": one_window(config)},
)
STABLELM = Family(
    name="stablelm",
    architecture="StableLmForCausalLM",
    keys={
        name: key
        for name, key in _layer_norm(
            sizes(
                vocab_size=50304,
                hidden_size=2560,
                intermediate_size=6912,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=32,
                max_position_embeddings=4096,
            ),
            "layer_norm_eps",
        ).items()
        if name != "head_dim"
    }
    | {
        "use_qkv_bias": Key("attention_bias", keys.flag, False),
        "use_parallel_residual": Key("parallel_branches", keys.flag, False, direct=False),
    },
    refused={"qk_layernorm": Only((None, False), "its norms of queries and keys have a scale per head")},
    always={"norm": "layer", "norm_bias": True},
    rope=RopeKeys(partial=0.25),
    fields=lambda values: {"parallel_branches": "one_norm" if values["use_parallel_residual"] else "no"},
    written=lambda config: {"use_parallel_residual": config.parallel_branches == "one_norm"},
)
_GLM: dict[str, Any] = dict(
    vocab_size=151552,
    hidden_size=4096,
    intermediate_size=13696,
    num_hidden_layers=40,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1.5625e-07,
)
GLM = Family(
    name="glm",
    architecture="GlmForCausalLM",
    keys=sizes(**_GLM) | {"attention_bias": Key("attention_bias", keys.flag, True)},
    always={"rope_interleaved": True},
    rope=RopeKeys(partial=0.5),
)
GLM4 = dataclasses.replace(
    GLM, name="glm4", architecture="Glm4ForCausalLM", always={"rope_interleaved": True, "norm_placement": "both"}
)


def _olmoe_fields(values: Values) -> dict[str, Any]:
    fields = values["fields"]
    if fields["num_heads"] * fields["head_dim"] != fields["embed_dim"]:
        raise ValueError("num_attention_heads * head_dim must be hidden_size: the class's norm of queries is that wide")
    return both_biases(values) | {
        "moe": {"mlp_dim": values["intermediate_size"]},
        "blocks": (BlockSpec(mlp="moe"),) * values["num_hidden_layers"],
    }


OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    keys=sizes(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=None,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    | {
        "attention_bias": _FLAG_OFF,
        "num_experts": Key("moe.num_experts", keys.count, 64),
        "num_experts_per_tok": Key("moe.experts_per_token", keys.count, 8),
        "norm_topk_prob": Key("moe.normalize_weights", keys.flag, False),
    },
    no_effect=ROUTER_TRAINING,
    refused={"clip_qkv": Only((None,), "queries, keys and values would be clipped")},
    always={"qk_norm": "projection", "moe": {"scoring": "softmax"}},
    aliases={"num_local_experts": "num_experts"},
    fields=lambda values: (
        both_biases(values)
        | {
            "moe": {"mlp_dim": values["intermediate_size"]},
            "blocks": (BlockSpec(mlp="moe"),) * values["num_hidden_layers"],
        }
    ),
)


def _split_fields(values: Values) -> dict[str, Any]:
    """Dense layers, then layers with experts and shared ones."""
    dense, count = values["first_k_dense_replace"], values["num_hidden_layers"]
    return {
        "blocks": moe_blocks((BlockSpec(),) * count, set(range(dense, count))),
        "moe": {"shared_mlp_dim": values["moe_intermediate_size"] * values["n_shared_experts"]},
    }


def _split_written(config: ModelConfig) -> dict[str, Any]:
    sparse = moe_layers(config)
    if config.moe is None:
        raise ValueError("the class has experts")
    return {
        "first_k_dense_replace": sparse[0] if sparse else config.num_layers,
        "n_shared_experts": config.moe.shared_mlp_dim // config.moe.mlp_dim,
    }


def _split_experts(**defaults: Any) -> dict[str, Key]:
    given = dict(n_group=1, topk_group=1, routed_scaling_factor=1.0, moe_intermediate_size=1408) | defaults
    return {
        "n_routed_experts": Key("moe.num_experts", keys.count, given["n_routed_experts"]),
        "n_shared_experts": Key("moe.shared_mlp_dim", keys.count, given["n_shared_experts"], direct=False),
        "num_experts_per_tok": Key("moe.experts_per_token", keys.count, given["num_experts_per_tok"]),
        "moe_intermediate_size": Key("moe.mlp_dim", keys.count, given["moe_intermediate_size"]),
        "first_k_dense_replace": Key("pattern", keys.whole, given["first_k_dense_replace"], direct=False),
        "n_group": Key("moe.num_groups", keys.count, given["n_group"]),
        "topk_group": Key("moe.groups_per_token", keys.count, given["topk_group"]),
        "routed_scaling_factor": Key("moe.weights_scale", keys.number, given["routed_scaling_factor"]),
        "norm_topk_prob": Key("moe.normalize_weights", keys.flag, given["norm_topk_prob"]),
    }


_SIGMOID = {"scoring": "sigmoid", "group_score": "top2_sum", "correction_bias": True}
GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys=sizes(
        vocab_size=151552,
        hidden_size=4096,
        intermediate_size=10944,
        num_hidden_layers=46,
        num_attention_heads=96,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
    )
    | _split_experts(
        n_routed_experts=128,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=1,
        norm_topk_prob=True,
    )
    | {"attention_bias": _FLAG_OFF, "use_qk_norm": Key("qk_norm", keys.flag, False, direct=False)},
    no_effect=_BALANCE,
    always={"moe": _SIGMOID},
    aliases={"num_local_experts": "n_routed_experts"},
    rope=RopeKeys(partial=0.5),
    fields=lambda values: _split_fields(values) | {"qk_norm": "head" if values["use_qk_norm"] else "none"},
    written=lambda config: _split_written(config) | {"use_qk_norm": config.qk_norm == "head"},
)


def _dots1_fields(values: Values) -> dict[str, Any]:
    window, first = values["sliding_window"], values["max_window_layers"]
    types = layer_types(values, lambda i: "sliding_attention" if window and i >= first else "full_attention")
    sparse = set(range(values["first_k_dense_replace"], values["num_hidden_layers"]))
    return both_biases(values) | _split_fields(values) | {"blocks": moe_blocks(window_blocks(types, window), sparse)}


DOTS1 = Family(
    name="dots1",
    architecture="Dots1ForCausalLM",
    keys=sizes(
        vocab_size=152064,
        hidden_size=4608,
        intermediate_size=10944,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
    )
    | _split_experts(
        n_routed_experts=REQUIRED,
        n_shared_experts=REQUIRED,
        num_experts_per_tok=REQUIRED,
        first_k_dense_replace=0,
        norm_topk_prob=False,
    )
    | {
        "attention_bias": _FLAG_OFF,
        **_WINDOW_LIST,
        "max_window_layers": Key("pattern", keys.whole, 62, direct=False),
    },
    no_effect=_BALANCE | {"scoring_func": "the class scores by sigmoid"},
    always={"qk_norm": "head", "moe": _SIGMOID},
    aliases={"num_local_experts": "n_routed_experts"},
    fields=_dots1_fields,
    written=lambda config: _split_written(config) | _windows_written(config) | {"max_window_layers": config.num_layers},
)


FAMILIES = (
    *(ARCEE, SEED_OSS, MINISTRAL, CWM, SMOLLM3, GRANITE, HELIUM, ERNIE45, COHERE, STARCODER2, STABLELM, GLM, GLM4),
    *(OLMOE, GLM4_MOE, DOTS1),
)
