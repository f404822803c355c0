# SPDX-License-Identifier: Apache-2.0
"""Dense families that differ from Llama by a few keys: Llama, Mistral, Qwen2, Qwen3.

Checked against transformers 5.23 (`models/<name>/configuration_<name>.py`, `modeling_<name>.py`).
"""

from typing import Any

from maxkit.formats.hf_config import keys
from maxkit.formats.hf_config.family import (
    Family,
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
    window = values["sliding_window"] if values["use_sliding_window"] else None
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
    "sliding_window": Key("pattern", keys.count, 4096, nullable=True, direct=False),
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
    refused={"use_mrope": Only((None, False), "positions of images"), "rope_interleaved": Only((None, False), "")},
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
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)
