# SPDX-License-Identifier: Apache-2.0
"""A family: the keys of its config.json, and how they become a `ModelConfig` and back.

Most keys are a field of `ModelConfig` and are read and written by one row. What does not follow key by key is
`fields` (keys to fields) and `written` (fields to keys). Whether a config can be said in a family's words is found by
writing and reading it back (`reader.config_json`), so a family lists nothing that it cannot say.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from maxkit.formats.hf_config import keys
from maxkit.formats.hf_config.keys import Key, Only
from maxkit.models.config import BlockSpec, ModelConfig

Values = Mapping[str, Any]


@dataclass(frozen=True)
class RopeKeys:
    """How a family spells RoPE.

    theta, partial: the class's defaults; partial None where the class turns all of a head. by_layer_type: full and
    sliding layers have tables of their own, the sliding ones with the default base `local_theta`, which `local_key`
    changes in the old spelling. table: the class's own scaling where the file has no RoPE at all. original: the class's
    own length before scaling, which stands beside the table and so wins. names: other names of kinds.
    """

    theta: float = 10000.0
    partial: float | None = None
    by_layer_type: bool = False
    local_theta: float = 10000.0
    local_key: str | None = None
    table: dict[str, Any] | None = None
    original: int | None = None
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One family of models. `name` is `ModelConfig.family`, and the model_type of transformers if that is "".

    keys, no_effect, refused: the three lists; every key of a file is in one of them or in the shared ones of `keys.py`.
    always: fields that are the same for all models of the family. fields, written: see above; both may be partial.
    other_model_types: model types of files that the same class reads. own_code: entries of `auto_map` that are known
    to compute what the class of transformers computes. wrapper: (architecture, model_type, keys beside text_config) of
    a multimodal model whose text part this is. required_ids: token ids for which the class takes no null.
    """

    name: str
    architecture: str
    keys: dict[str, Key]
    no_effect: dict[str, str] = field(default_factory=dict)
    refused: dict[str, Only] = field(default_factory=dict)
    always: dict[str, Any] = field(default_factory=dict)
    fields: Callable[[Values], dict[str, Any]] | None = None
    written: Callable[[ModelConfig], dict[str, Any]] | None = None
    rope: RopeKeys | None = field(default_factory=RopeKeys)
    aliases: dict[str, str] = field(default_factory=dict)
    model_type: str = ""
    other_model_types: tuple[str, ...] = ()
    own_code: frozenset[str] = frozenset()
    quantized: tuple[str, ...] = ()
    required_ids: tuple[str, ...] = ()
    wrapper: tuple[str, str, dict[str, str]] | None = None


def sizes(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None,
    max_position_embeddings: int,
    rms_norm_eps: float = 1e-6,
    head_dim: int | None = None,
    tie_word_embeddings: bool = False,
    act: str = "hidden_act",
    activation: str = "silu",
    kv_null: bool = True,
) -> dict[str, Key]:
    """The keys that nearly every decoder has, with the defaults of its configuration class.

    Absent heads of keys and values are those of the queries; an absent head_dim is hidden_size // heads.
    """
    return {
        "vocab_size": Key("vocab_size", keys.count, vocab_size),
        "hidden_size": Key("embed_dim", keys.count, hidden_size),
        "intermediate_size": Key("mlp_dim", keys.count, intermediate_size),
        "num_hidden_layers": Key("num_layers", keys.layer_count, num_hidden_layers),
        "num_attention_heads": Key("num_heads", keys.count, num_attention_heads),
        "num_key_value_heads": Key("num_kv_heads", keys.count, num_key_value_heads, nullable=kv_null),
        "head_dim": Key("head_dim", keys.count, head_dim, nullable=True),
        "max_position_embeddings": Key("max_seq_len", keys.count, max_position_embeddings),
        "rms_norm_eps": Key("norm_eps", keys.number, rms_norm_eps),
        "tie_word_embeddings": Key("tie_embeddings", keys.flag, tie_word_embeddings),
        act: Key("activation", keys.activation, activation),
    }


def without_activation(**given: Any) -> dict[str, Key]:
    """`sizes` of a family whose activation is fixed."""
    return {name: key for name, key in sizes(**given).items() if name != "hidden_act"}


def window_blocks(types: tuple[str, ...], window: int | None, **sliding: Any) -> tuple[BlockSpec, ...]:
    """A block per layer type, `window` (and what else is said of them) on the sliding ones."""
    allowed = ("sliding_attention", "full_attention")
    unknown = sorted(set(types) - set(allowed))
    if unknown:
        raise ValueError(f"layer_types: {unknown[0][:60]!r} is not supported: allowed are {', '.join(allowed)}")
    if window is None and "sliding_attention" in types:
        raise ValueError("layer_types has sliding_attention, but sliding_window is not set")
    full, local = BlockSpec(), BlockSpec(sliding_window=window, **sliding)
    return tuple(local if kind == "sliding_attention" else full for kind in types)


def layer_types(values: Values, default: Callable[[int], str]) -> tuple[str, ...]:
    """The list of the file, or the class's own; its length must be that of the model."""
    count = values["num_hidden_layers"]
    types = values.get("layer_types")
    if types is None:
        return tuple(default(i) for i in range(count))
    if len(types) != count:
        raise ValueError(f"layer_types has {len(types)} entries for num_hidden_layers={count}")
    return types


def one_window(config: ModelConfig) -> int | None:
    """The window of the sliding blocks; ValueError where they have several."""
    windows = {block.sliding_window for block in config.blocks} - {None}
    if len(windows) > 1:
        raise ValueError(f"blocks with different sliding windows ({', '.join(map(str, sorted(windows)))})")
    return min(windows, default=None)


def written_layer_types(config: ModelConfig) -> list[str]:
    """`layer_types` of full and sliding blocks."""
    return ["sliding_attention" if block.sliding_window else "full_attention" for block in config.blocks]
