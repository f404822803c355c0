# SPDX-License-Identifier: Apache-2.0
"""Dense families that differ from Llama by a few keys: Mistral, Qwen2 and 3, OLMo 2 and 3, Phi-3.

Checked against transformers 5.23 (`models/<name>/configuration_<name>.py`, `modeling_<name>.py`).
"""

from typing import Any

from maxkit.formats.hf_config import keys, rope
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

NO_WINDOW = {
    "sliding_window": Only((None,), "the class has no sliding window"),
    "layer_types": Only((None,), "the class has one kind of layer"),
}


def both_biases(values: Values) -> dict[str, Any]:
    """`attention_bias` is of all four projections."""
    return {"attention_out_bias": values["attention_bias"]}


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    keys=sizes(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        max_position_embeddings=2048,
    )
    | {
        "attention_bias": Key("attention_bias", keys.flag, False),
        "mlp_bias": Key("mlp_bias", keys.flag, False),
    },
    refused=NO_WINDOW,
    fields=both_biases,
)


def _one_window_for_all(values: Values) -> dict[str, Any]:
    window = values["sliding_window"]
    kind = "full_attention" if window is None else "sliding_attention"
    return {"blocks": window_blocks((kind,) * values["num_hidden_layers"], window)}


def _written_window(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": one_window(config)}


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    keys=sizes(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )
    | {"sliding_window": Key("pattern", keys.count, 4096, nullable=True, direct=False)},
    refused={"layer_types": Only((None,), "the class gives all layers the same window")},
    fields=_one_window_for_all,
    written=_written_window,
)


def qwen_blocks(values: Values) -> dict[str, Any]:
    """Windows from layer `max_window_layers` on, unless `layer_types` says where."""
    window = (values["sliding_window"] or None) if values["use_sliding_window"] else None
    first = values["max_window_layers"]
    types = layer_types(values, lambda i: "sliding_attention" if window and i >= first else "full_attention")
    return {"blocks": window_blocks(types, window)}


def qwen_written(config: ModelConfig) -> dict[str, Any]:
    """`use_sliding_window` and what belongs to it."""
    window, types = one_window(config), written_layer_types(config)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": types.index("sliding_attention") if window else config.num_layers,
        "layer_types": types,
    }


QWEN_WINDOW = {
    "use_sliding_window": Key("pattern", keys.flag, False, direct=False),
    "sliding_window": Key("pattern", keys.whole, 4096, nullable=True, direct=False),  # 0 where it is not used
    "max_window_layers": Key("pattern", keys.whole, 28, direct=False),
    "layer_types": Key("pattern", keys.texts, None, nullable=True, direct=False),
}
_QWEN_SIZES: dict[str, Any] = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=32768,
)
QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=sizes(**_QWEN_SIZES) | QWEN_WINDOW,
    refused={
        "use_mrope": Only((None, False), "positions of images"),
    },
    always={"attention_bias": True},
    fields=qwen_blocks,
    written=qwen_written,
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=sizes(**_QWEN_SIZES, head_dim=128) | QWEN_WINDOW | {"attention_bias": Key("attention_bias", keys.flag, False)},
    always={"qk_norm": "head"},
    fields=lambda values: qwen_blocks(values) | both_biases(values),
    written=qwen_written,
)
_OLMO_SIZES: dict[str, Any] = dict(
    vocab_size=50304,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    max_position_embeddings=2048,
)
_OLMO2_ALWAYS = {"norm_placement": "post", "qk_norm": "projection"}
OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    keys=sizes(**_OLMO_SIZES, rms_norm_eps=1e-5) | {"attention_bias": Key("attention_bias", keys.flag, False)},
    refused=NO_WINDOW,
    always=_OLMO2_ALWAYS,
    fields=both_biases,
)


def _olmo3_fields(values: Values) -> dict[str, Any]:
    types = layer_types(values, lambda i: "sliding_attention" if (i + 1) % 4 else "full_attention")
    model, block = rope.fields_by_type(values["rope"])
    return both_biases(values) | model | {"blocks": window_blocks(types, values["sliding_window"], **block)}


def _olmo3_written(config: ModelConfig) -> dict[str, Any]:
    """In the old spelling where that says it all: transformers 5.0 to 5.12 do not know the new one for this family."""
    tables = rope.tables_by_type(config)
    old_will_do = config.rope_theta == 500000.0 and tables["sliding_attention"] == {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
    }
    scaling = None if config.rope_scaling is None else rope.write(config.rope_scaling, config.max_seq_len)
    spelled = {"rope_theta": config.rope_theta, "rope_scaling": scaling} if old_will_do else {"rope_parameters": tables}
    return spelled | {"sliding_window": one_window(config), "layer_types": written_layer_types(config)}


OLMO3 = Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    keys=sizes(**_OLMO_SIZES, rms_norm_eps=1e-5)
    | {
        "attention_bias": Key("attention_bias", keys.flag, False),
        "sliding_window": Key("pattern", keys.count, 4096, nullable=True, direct=False),
        "layer_types": Key("pattern", keys.texts, None, nullable=True, direct=False),
    },
    always=_OLMO2_ALWAYS,
    rope=RopeKeys(theta=500000.0, by_layer_type=True, local_theta=500000.0),
    fields=_olmo3_fields,
    written=_olmo3_written,
)


def _phi3_written(config: ModelConfig) -> dict[str, Any]:
    """Transformers 4 takes three keys in the table; the rest stands beside it or follows from the lengths."""
    written: dict[str, Any] = {"sliding_window": one_window(config)}
    if config.rope_scaling is None:
        return written | {"original_max_position_embeddings": min(4096, config.max_seq_len)}
    table = rope.write(config.rope_scaling, config.max_seq_len)
    kept = {key: table[key] for key in ("rope_type", "short_factor", "long_factor") if key in table}
    part = rope.partial(config)
    return written | {
        "original_max_position_embeddings": table.get("original_max_position_embeddings"),
        "rope_scaling": kept | {"type": kept["rope_type"]},
        "rope_parameters": kept | {"rope_theta": config.rope_theta, "partial_rotary_factor": part},
    }


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    keys=sizes(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    | {"sliding_window": Key("pattern", keys.count, None, nullable=True, direct=False)},
    refused={
        "attention_bias": Only((None, False), "the class has no biases"),
        "mlp_bias": Only((None, False), "the class has no biases"),
        "lm_head_bias": Only((None, False), "the class has no biases"),
        "full_attn_mod": Only((None, 1), "every layer is of one kind"),
        "interpolate_factor": Only((None, 1), "positions are not interpolated"),
        "layer_types": Only((None,), "the class has one kind of layer"),
    },
    rope=RopeKeys(partial=1.0, original=4096, names={"su": "longrope", "yarn": "longrope"}),
    fields=_one_window_for_all,
    written=_phi3_written,
    own_code=frozenset({"configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"}),
)
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, OLMO3, PHI3)
