# SPDX-License-Identifier: Apache-2.0
"""Where each tensor of a model lies in foreign files, one declarative table per family and format.

A `Leaf` row says: this canonical path is that key, and its axes are rearranged so. The rearrangement is a
string like `(NH)D > DNH`: left the foreign axes, slowest first, right ours, letters from the project's
alphabet, brackets around letters that one axis holds together; lower-case letters are local to the table (`c`
= the 2 halves of a head, `j` = half a head's width). It is read in both directions, so a reader's transform
and a writer's cannot disagree. Not here: opening files. To add a family, add its rows to `TABLES`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from maxkit.errors import UserError, nearest
from maxkit.models.config import ModelConfig

Address = tuple[str, int | None]  # (canonical path without block or layer part, layer number or None)

# Conditions under which a row exists in a model.
CONDITIONS: dict[str, Callable[[ModelConfig], bool]] = {
    "always": lambda config: True,
    "untied": lambda config: not config.tie_embeddings,
    "attention_bias": lambda config: config.attention_bias,
    "attention_out_bias": lambda config: config.attention_out_bias,
    "mlp_bias": lambda config: config.mlp_bias,
}


def letter_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of every letter that a table may use."""
    return {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "c": 2,
        "j": config.head_dim // 2,
    }


@dataclass(frozen=True)
class Leaf:
    """One kind of tensor: our path, the foreign key (`{i}` = layer number), `foreign axes > our axes`."""

    path: str
    key: str
    axes: str
    when: str = "always"

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor in each layer."""
        return "{i}" in self.key


@dataclass(frozen=True)
class Rearrangement:
    """Foreign axes to canonical axes and back; both list the letters that each axis holds."""

    foreign: tuple[str, ...]
    canonical: tuple[str, ...]
    sizes: dict[str, int]

    def _shape(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[letter] for letter in axis) for axis in axes)

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """The shape in the file, in numpy order."""
        return self._shape(self.foreign)

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """The shape of the model's parameter."""
        return self._shape(self.canonical)

    def read(self, array: np.ndarray) -> np.ndarray:
        """Foreign to canonical orientation; the dtype stays."""
        return self._move(array, self.foreign, self.canonical)

    def write(self, array: np.ndarray) -> np.ndarray:
        """Canonical to foreign orientation, the inverse of `read`."""
        return self._move(array, self.canonical, self.foreign)

    def _move(self, array: np.ndarray, source: tuple[str, ...], target: tuple[str, ...]) -> np.ndarray:
        assert array.shape == self._shape(source), (array.shape, self._shape(source))
        letters, wanted = "".join(source), "".join(target)
        split = array.reshape([self.sizes[letter] for letter in letters])  # one axis a letter
        moved = split.transpose([letters.index(letter) for letter in wanted])
        result = np.empty(self._shape(target), array.dtype)
        result.reshape(moved.shape)[...] = moved  # the only copy; nothing shares memory with a mapped file
        return result


def parse_axes(axes: str, sizes: dict[str, int]) -> Rearrangement:
    """Parse `(NH)D > DNH`; a single side means that both are equal."""
    source, _, target = axes.replace(" ", "").partition(">")
    foreign, canonical = _axes(source), _axes(target or source)
    assert sorted("".join(foreign)) == sorted("".join(canonical)), axes
    return Rearrangement(foreign, canonical, sizes)


def _axes(side: str) -> tuple[str, ...]:
    """`(NH)D` -> ("NH", "D")."""
    found: list[str] = []
    group: str | None = None
    for character in side:
        if character == "(":
            group = ""
        elif character == ")":
            found.append(group or "")
            group = None
        elif group is not None:
            group += character
        else:
            found.append(character)
    return tuple(found)


class Table:
    """The rows of a family and format for one config: address -> (foreign key, rearrangement)."""

    def __init__(self, rows: tuple[Leaf, ...], config: ModelConfig) -> None:
        sizes = letter_sizes(config)
        self.entries: dict[Address, tuple[str, Rearrangement]] = {}
        for row in self._in_order(rows, config):
            path, layer, leaf = row
            self.entries[path, layer] = (leaf.key.format(i=layer), parse_axes(leaf.axes, sizes))

    @staticmethod
    def _in_order(rows: tuple[Leaf, ...], config: ModelConfig) -> Iterator[tuple[str, int | None, Leaf]]:
        present = [row for row in rows if CONDITIONS[row.when](config)]
        yield from ((row.path, None, row) for row in present if not row.per_layer)
        for layer in range(config.num_layers):
            yield from ((row.path, layer, row) for row in present if row.per_layer)

    def __getitem__(self, address: Address) -> tuple[str, Rearrangement]:
        """The foreign key and rearrangement of an address; a UserError for one the model does not have."""
        if address not in self.entries:
            path, layer = address
            paths = {path for path, _ in self.entries}
            tail = f"layer {layer} is outside the model" if path in paths else nearest(path, paths)
            raise UserError(f"this model has no tensor {path!r} (layer {layer}): {tail}")
        return self.entries[address]

    def keys(self) -> dict[str, Address]:
        """Foreign key -> address."""
        return {key: address for address, (key, _) in self.entries.items()}


# Both formats of the Llama family. GGUF files of this family (and only of this one) store the rows of query
# and key for a RoPE that turns neighbouring pairs: row order (head, pair, half) instead of our (head, half,
# pair).
_LAYER = "model.layers.{i}."
_LLAMA_HF = (
    Leaf("embed/table", "model.embed_tokens.weight", "VD"),
    Leaf("final_norm/scale", "model.norm.weight", "D"),
    Leaf("output/kernel", "lm_head.weight", "VD", when="untied"),
    Leaf("layers/attention_norm/scale", _LAYER + "input_layernorm.weight", "D"),
    Leaf("layers/attention/query/kernel", _LAYER + "self_attn.q_proj.weight", "(NH)D > DNH"),
    Leaf("layers/attention/query/bias", _LAYER + "self_attn.q_proj.bias", "(NH) > NH", when="attention_bias"),
    Leaf("layers/attention/key/kernel", _LAYER + "self_attn.k_proj.weight", "(KH)D > DKH"),
    Leaf("layers/attention/key/bias", _LAYER + "self_attn.k_proj.bias", "(KH) > KH", when="attention_bias"),
    Leaf("layers/attention/value/kernel", _LAYER + "self_attn.v_proj.weight", "(KH)D > DKH"),
    Leaf("layers/attention/value/bias", _LAYER + "self_attn.v_proj.bias", "(KH) > KH", when="attention_bias"),
    Leaf("layers/attention/out/kernel", _LAYER + "self_attn.o_proj.weight", "D(NH) > NHD"),
    Leaf("layers/attention/out/bias", _LAYER + "self_attn.o_proj.bias", "D", when="attention_out_bias"),
    Leaf("layers/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight", "D"),
    Leaf("layers/mlp/gate/kernel", _LAYER + "mlp.gate_proj.weight", "FD > DF"),
    Leaf("layers/mlp/gate/bias", _LAYER + "mlp.gate_proj.bias", "F", when="mlp_bias"),
    Leaf("layers/mlp/up/kernel", _LAYER + "mlp.up_proj.weight", "FD > DF"),
    Leaf("layers/mlp/up/bias", _LAYER + "mlp.up_proj.bias", "F", when="mlp_bias"),
    Leaf("layers/mlp/down/kernel", _LAYER + "mlp.down_proj.weight", "DF > FD"),
    Leaf("layers/mlp/down/bias", _LAYER + "mlp.down_proj.bias", "D", when="mlp_bias"),
)
_LLAMA_GGUF = (
    Leaf("embed/table", "token_embd.weight", "VD"),
    Leaf("final_norm/scale", "output_norm.weight", "D"),
    Leaf("output/kernel", "output.weight", "VD", when="untied"),
    Leaf("layers/attention_norm/scale", "blk.{i}.attn_norm.weight", "D"),
    Leaf("layers/attention/query/kernel", "blk.{i}.attn_q.weight", "(Njc)D > DN(cj)"),
    Leaf("layers/attention/query/bias", "blk.{i}.attn_q.bias", "(Njc) > N(cj)", when="attention_bias"),
    Leaf("layers/attention/key/kernel", "blk.{i}.attn_k.weight", "(Kjc)D > DK(cj)"),
    Leaf("layers/attention/key/bias", "blk.{i}.attn_k.bias", "(Kjc) > K(cj)", when="attention_bias"),
    Leaf("layers/attention/value/kernel", "blk.{i}.attn_v.weight", "(KH)D > DKH"),
    Leaf("layers/attention/value/bias", "blk.{i}.attn_v.bias", "(KH) > KH", when="attention_bias"),
    Leaf("layers/attention/out/kernel", "blk.{i}.attn_output.weight", "D(NH) > NHD"),
    Leaf("layers/attention/out/bias", "blk.{i}.attn_output.bias", "D", when="attention_out_bias"),
    Leaf("layers/mlp_norm/scale", "blk.{i}.ffn_norm.weight", "D"),
    Leaf("layers/mlp/gate/kernel", "blk.{i}.ffn_gate.weight", "FD > DF"),
    Leaf("layers/mlp/gate/bias", "blk.{i}.ffn_gate.bias", "F", when="mlp_bias"),
    Leaf("layers/mlp/up/kernel", "blk.{i}.ffn_up.weight", "FD > DF"),
    Leaf("layers/mlp/up/bias", "blk.{i}.ffn_up.bias", "F", when="mlp_bias"),
    Leaf("layers/mlp/down/kernel", "blk.{i}.ffn_down.weight", "DF > FD"),
    Leaf("layers/mlp/down/bias", "blk.{i}.ffn_down.bias", "D", when="mlp_bias"),
)

TABLES: dict[tuple[str, str], tuple[Leaf, ...]] = {
    ("llama", "hf"): _LLAMA_HF,
    ("llama", "gguf"): _LLAMA_GGUF,
}


def find_table(config: ModelConfig, format: str) -> Table:
    """The table of a config's family in a format ("hf" or "gguf"). Raises UserError if there is none."""
    families = [family for family, known in TABLES if known == format]
    if (config.family, format) not in TABLES:
        raise UserError(f"family {config.family!r} cannot be stored as {format}: known are {', '.join(families)}")
    return Table(TABLES[config.family, format], config)
