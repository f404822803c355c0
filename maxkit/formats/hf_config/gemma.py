# SPDX-License-Identifier: Apache-2.0
"""Gemma 1, 2 and 3 (text): norms that store scale - 1, scaled embeddings, soft caps, local and global layers.

Checked against transformers 5.23 (`models/gemma*/configuration_*.py`, `modeling_*.py`).
"""

from typing import Any

from maxkit.formats.hf_config import keys, rope
from maxkit.formats.hf_config.dense import both_biases
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
from maxkit.formats.hf_config.keys import Key, Only
from maxkit.models.config import ModelConfig

_BIDIRECTIONAL = {"use_bidirectional_attention": Only((None, False), "tokens would see what follows them")}
_IGNORED = "the class reads hidden_activation"


def _scaled_embedding(values: Values) -> dict[str, Any]:
    return both_biases(values) | {"embedding_scale": values["hidden_size"] ** 0.5}


GEMMA = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    keys=sizes(
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    | {
        "hidden_act": Key("activation", keys.gemma_activation, "gelu_tanh"),
        "attention_bias": Key("attention_bias", keys.flag, False),
    },
    refused=_BIDIRECTIONAL
    | {"hidden_activation": Only((None, "gelu_pytorch_tanh", "gelu"), "transformers 5 always takes the tanh form")},
    always={"norm_scale_offset": 1.0},
    fields=_scaled_embedding,
)


def query_scale(values: Values) -> dict[str, Any]:
    """`query_pre_attn_scalar` in place of head_dim under the root; None where it is head_dim."""
    scalar = values["query_pre_attn_scalar"]
    return {} if scalar == values["fields"]["head_dim"] else {"attention_scale": scalar**-0.5}


def written_query_scale(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `query_scale`."""
    scale = config.attention_scale
    if scale is None:
        return {"query_pre_attn_scalar": config.head_dim}
    if scale <= 0:
        raise ValueError(f"attention_scale={scale} is not one over the root of query_pre_attn_scalar")
    scalar = scale**-2
    whole = max(round(scalar), 1)
    return {"query_pre_attn_scalar": whole if whole**-0.5 == scale else scalar}


_GEMMA2_KEYS = {
    "hidden_activation": Key("activation", keys.activation, "gelu_tanh"),
    "attention_bias": Key("attention_bias", keys.flag, False),
    "query_pre_attn_scalar": Key("attention_scale", keys.number, 256, direct=False),
    "sliding_window": Key("pattern", keys.count, 4096, nullable=True, direct=False),
    "layer_types": Key("pattern", keys.texts, None, nullable=True, direct=False),
}


def _gemma2_fields(values: Values) -> dict[str, Any]:
    types = layer_types(values, lambda i: "full_attention" if i % 2 else "sliding_attention")
    blocks = {"blocks": window_blocks(types, values["sliding_window"])}
    return _scaled_embedding(values) | query_scale(values) | blocks


def _gemma2_written(config: ModelConfig) -> dict[str, Any]:
    return written_query_scale(config) | {
        "sliding_window": one_window(config),
        "layer_types": written_layer_types(config),
        "hidden_act": keys.write_activation(config.activation),  # transformers 4 writes both
    }


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    keys=sizes(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        act="hidden_activation",
    )
    | _GEMMA2_KEYS
    | {
        "final_logit_softcapping": Key("final_soft_cap", keys.number, 30.0, nullable=True),
        "attn_logit_softcapping": Key("attention_soft_cap", keys.number, 50.0, nullable=True),
    },
    no_effect={"hidden_act": _IGNORED, "sliding_window_size": "an old name; the class reads sliding_window"},
    refused=_BIDIRECTIONAL,
    always={"norm_scale_offset": 1.0, "norm_placement": "both"},
    fields=_gemma2_fields,
    written=_gemma2_written,
)


def _gemma3_fields(values: Values) -> dict[str, Any]:
    every = values["sliding_window_pattern"]
    types = layer_types(values, lambda i: "sliding_attention" if (i + 1) % every else "full_attention")
    model, block = rope.fields_by_type(values["rope"])
    blocks = {"blocks": window_blocks(types, values["sliding_window"], **block)}
    return _scaled_embedding(values) | query_scale(values) | model | blocks


def _gemma3_written(config: ModelConfig) -> dict[str, Any]:
    tables = rope.tables_by_type(config)
    of_all = tables["sliding_attention"]["rope_type"] != "default"  # the old spelling scales the full layers only
    scaling = None if config.rope_scaling is None or of_all else rope.write(config.rope_scaling, config.max_seq_len)
    return _gemma2_written(config) | {
        "rope_parameters": tables,
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": tables["sliding_attention"]["rope_theta"],
        "rope_scaling": scaling,
    }


GEMMA3 = Family(
    name="gemma3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys=sizes(
        vocab_size=262208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        act="hidden_activation",
    )
    | _GEMMA2_KEYS
    | {
        "final_logit_softcapping": Key("final_soft_cap", keys.number, None, nullable=True),
        "sliding_window_pattern": Key("pattern", keys.count, 6, direct=False),
        "rope_local_base_freq": Key("pattern", keys.number, None, nullable=True, direct=False),
    },
    no_effect={"hidden_act": _IGNORED, "_sliding_window_pattern": "the class's own note of sliding_window_pattern"},
    refused=_BIDIRECTIONAL | {"attn_logit_softcapping": Only((None,), "the class has it and never applies it")},
    always={"norm_scale_offset": 1.0, "norm_placement": "both", "qk_norm": "head"},
    rope=RopeKeys(theta=1e6, by_layer_type=True, local_theta=10000.0, local_key="rope_local_base_freq"),
    fields=_gemma3_fields,
    written=_gemma3_written,
    wrapper=(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        dict.fromkeys(
            "vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index".split(),
            "of the images, which only the multimodal model sees",
        ),
    ),
)
FAMILIES = (GEMMA, GEMMA2, GEMMA3)
