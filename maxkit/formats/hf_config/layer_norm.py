# SPDX-License-Identifier: Apache-2.0
"""Decoders with LayerNorm: GPT-2, whose architecture is also that of GPT-3.

Checked against transformers 5.23 (`models/gpt2`).
"""

from typing import Any

from maxkit.formats.hf_config import keys
from maxkit.formats.hf_config.family import Family, Values
from maxkit.formats.hf_config.keys import Key, Only
from maxkit.models.config import ModelConfig


def _gpt2_fields(values: Values) -> dict[str, Any]:
    width, heads = values["n_embd"], values["n_head"]
    if width % heads:
        raise ValueError(f"n_embd={width} must be a multiple of n_head={heads}")
    scale = {} if values["scale_attn_weights"] else {"attention_scale": 1.0}
    return scale | {"mlp_dim": values["n_inner"] or 4 * width}


def _gpt2_written(config: ModelConfig) -> dict[str, Any]:
    activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
    return {
        "n_inner": None if config.mlp_dim == 4 * config.embed_dim else config.mlp_dim,
        "scale_attn_weights": config.attention_scale is None,
        "activation_function": activation,
        "n_ctx": config.max_seq_len,
    }


_SUMMARY = "of classification heads, which a causal language model lacks"
GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    keys={
        "vocab_size": Key("vocab_size", keys.count, 50257),
        "n_positions": Key("max_seq_len", keys.count, 1024),
        "n_embd": Key("embed_dim", keys.count, 768),
        "n_layer": Key("num_layers", keys.layer_count, 12),
        "n_head": Key("num_heads", keys.count, 12),
        "n_inner": Key("mlp_dim", keys.count, None, nullable=True, direct=False),
        "activation_function": Key("activation", keys.activation, "gelu_tanh"),
        "layer_norm_epsilon": Key("norm_eps", keys.number, 1e-5),
        "scale_attn_weights": Key("attention_scale", keys.flag, True, direct=False),
        "tie_word_embeddings": Key("tie_embeddings", keys.flag, True),
    },
    no_effect={
        "n_ctx": "an old name; the class reads n_positions",
        "reorder_and_upcast_attn": "the same function in another order",
        **dict.fromkeys(
            "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout".split(),
            _SUMMARY,
        ),
    },
    refused={"scale_attn_by_inverse_layer_idx": Only((None, False), "every layer would have another scale")},
    always={
        "norm": "layer",
        "norm_bias": True,
        "position": "learned",
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_gated": False,
        "mlp_bias": True,
    },
    rope=None,
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    fields=_gpt2_fields,
    written=_gpt2_written,
)
FAMILIES = (GPT2,)
