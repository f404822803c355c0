# SPDX-License-Identifier: Apache-2.0
"""Paxml's GPT-3 checkpoints (MLPerf's, `checkpoint_00000200/`) as `Contents`, read only. No JAX.

One zarr array for each leaf in a folder of its name: `mdl_vars.params.<path>` for weights, for Adam's moments
`opt_states_0.no_prefix_2.m.params.<path>` (`v`: of the squares) and, of what is stacked, `opt_states_0.p#L#i-1_2.m...`
with L layers. Layers are stacked on axis 0. Layer norms hold their scale less one (`norm_scale_offset=1`).

The layout is that of MLPerf's published checkpoints, by the names and shapes that its converters document; none is at
hand to be read, so it was checked against arrays written in that form (tests/unit/test_paxml.py).
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError, nearest
from maxkit.formats import presets
from maxkit.formats.axes import Rearrangement, parse_axes
from maxkit.formats.contents import WEIGHTS, Address
from maxkit.formats.hf_config.reader import read_config
from maxkit.formats.orbax_arrays import dtype_of
from maxkit.formats.paxml_tree import MARK, find_paxml, paxml_arrays
from maxkit.formats.tables import Leaf, letter_sizes
from maxkit.models.config import ModelConfig

_LAYER = "lm.transformer.repeat.sub.x_layers_0."  # {i} stands for the layer axis, which comes first
ROWS = (
    Leaf("embed/table", "lm.softmax.logits_ffn.linear.w", "DV > VD"),
    Leaf("positions/table", "lm.position_emb.emb_var", "SD"),
    Leaf("final_norm/scale", "lm.final_ln.scale", "D"),
    Leaf("final_norm/bias", "lm.final_ln.bias", "D"),
    Leaf("layers/attention_norm/scale", "{i}layer_norm.scale", "D"),
    Leaf("layers/attention_norm/bias", "{i}layer_norm.bias", "D"),
    Leaf("layers/attention/query/kernel", "{i}self_attention.combined_qkv.w", "(*1+1+1)DNH > DNH"),
    Leaf("layers/attention/key/kernel", "{i}self_attention.combined_qkv.w", "(1+*1+1)DKH > DKH"),
    Leaf("layers/attention/value/kernel", "{i}self_attention.combined_qkv.w", "(1+1+*1)DKH > DKH"),
    Leaf("layers/attention/query/bias", "{i}self_attention.combined_qkv.b", "(*1+1+1)NH > NH"),
    Leaf("layers/attention/key/bias", "{i}self_attention.combined_qkv.b", "(1+*1+1)KH > KH"),
    Leaf("layers/attention/value/bias", "{i}self_attention.combined_qkv.b", "(1+1+*1)KH > KH"),
    Leaf("layers/attention/out/kernel", "{i}self_attention.post.w", "DNH > NHD"),
    Leaf("layers/attention/out/bias", "{i}self_attention.post.b", "D"),
    Leaf("layers/mlp_norm/scale", "{i}ff_layer.layer_norm.scale", "D"),
    Leaf("layers/mlp_norm/bias", "{i}ff_layer.layer_norm.bias", "D"),
    Leaf("layers/mlp/up/kernel", "{i}ff_layer.ffn_layer1.linear.w", "DF"),
    Leaf("layers/mlp/up/bias", "{i}ff_layer.ffn_layer1.bias.b", "F"),
    Leaf("layers/mlp/down/kernel", "{i}ff_layer.ffn_layer2.linear.w", "FD"),
    Leaf("layers/mlp/down/bias", "{i}ff_layer.ffn_layer2.bias.b", "D"),
)
_MOMENTS = {"mu": "m", "nu": "v"}


class _Place(NamedTuple):
    key: str
    rearrangement: Rearrangement
    row: int | None


class PaxmlContents:
    """One checkpoint folder. `config`: a ModelConfig, a config.json (or its folder) or a preset such as "gpt3-175b".

    Raises:
        UserError: no such checkpoint, no description, or one that the arrays contradict.
    """

    format = "paxml"
    scan_layers = True
    optimizer: str | None

    def __init__(self, path: str | Path, config: ModelConfig | str | Path | None = None) -> None:
        folder = find_paxml(Path(path))
        if folder is None:
            raise UserError(f"{path}: no Paxml checkpoint there (no {MARK})")
        self.path = folder
        self._arrays = {key: (shape, dtype_of(dtype)) for key, (shape, dtype) in paxml_arrays(folder).items()}
        if config is None:
            dim, vocab = self._arrays[MARK][0]
            layers = self._arrays.get(f"mdl_vars.params.{_LAYER}layer_norm.scale", ((0,), None))[0][0]
            raise UserError(
                f"{path}: a Paxml checkpoint does not record what its model computes. Known from its arrays: "
                f"vocab_size={vocab}, embed_dim={dim}, num_layers={layers}. Not known: norm_eps, activation, "
                "attention scale. Give config=: a config.json of the gpt2 class, or a preset (gpt3-175b)"
            )
        self.config = _describe(config)
        self.facts = {"norm offset": "the norms' scales are stored less one; norm_scale_offset=1"}
        self._places = self._make_places()
        self.slots = (WEIGHTS, *(slot for slot in _MOMENTS if self._key("embed/table", None, slot) in self._arrays))
        self.optimizer = "adam_pax" if len(self.slots) > 1 else None
        self._check()

    @property
    def dtypes(self) -> dict[str, int]:
        """{dtype: number of arrays of weights stored in it}."""
        return dict(Counter(dtype.name for key, (_, dtype) in self._arrays.items() if key.startswith("mdl_vars.")))

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """The step, and the count of Adam."""
        found = {"step": "step", "count": "opt_states_0.no_prefix_2.count"}
        return {name: self._read(key) for name, key in found.items() if key in self._arrays}

    def tokenizer(self) -> Tokenizer | None:
        """None: there is none."""
        return None

    def addresses(self, slot: str = WEIGHTS) -> list[Address]:
        """Every tensor of a slot."""
        return [address for address in self._places if self._key(*address, slot) in self._arrays]

    def shape(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> tuple[int, ...]:
        """The canonical shape."""
        return self._place(path, layer).rearrangement.canonical_shape

    def dtype(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.dtype:
        """The stored dtype."""
        return self._arrays[self._key(path, layer, slot)][1]

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor in canonical orientation and stored dtype."""
        place = self._place(path, layer)
        return place.rearrangement.read(self._read(self._key(path, layer, slot), place.row))

    def missing_keys(self) -> list[str]:
        """Weights that the model needs and that are not stored."""
        wanted = dict.fromkeys(self._key(*address, WEIGHTS) for address in self._places)
        return [key for key in wanted if key not in self._arrays]

    def unused_keys(self) -> list[str]:
        """Arrays that are no tensor of the model and of which nothing is known."""
        known = {self._key(*address, slot) for address in self._places for slot in (WEIGHTS, *_MOMENTS)}
        known |= {"step", "opt_states_0.no_prefix_2.count", *self.ignored_keys()}
        return [key for key in self._arrays if key not in known]

    def ignored_keys(self) -> dict[str, str]:
        """The counters of the other parts of Paxml's chain, and those that it keeps for each layer."""
        used = "opt_states_0.no_prefix_2.count"
        return {key: "a counter of updates" for key in self._arrays if key.endswith(".count") and key != used}

    # ------------------------------------------------------------

    def _make_places(self) -> dict[Address, _Place]:
        sizes, found = letter_sizes(self.config), {}
        for row in ROWS:
            layers: list[int | None] = list(range(self.config.num_layers)) if row.per_layer else [None]
            for layer in layers:
                key = row.key.replace("{i}", _LAYER)
                found[row.path, layer] = _Place(key, parse_axes(row.axes, sizes), layer)
        return found

    def _place(self, path: str, layer: int | None) -> _Place:
        if (path, layer) not in self._places:
            raise UserError(f"{self.path}: no tensor {path!r} (layer {layer})")
        return self._places[path, layer]

    def _key(self, path: str, layer: int | None, slot: str) -> str:
        place = self._place(path, layer)
        if slot == WEIGHTS:
            return f"mdl_vars.params.{place.key}"
        prefix = "no_prefix" if layer is None else f"p#{self.config.num_layers}#i-1"
        return f"opt_states_0.{prefix}_2.{_MOMENTS.get(slot, slot)}.params.{place.key}"

    def _check(self) -> None:
        problems: dict[str, str] = {}
        for address, place in self._places.items():
            wanted = place.rearrangement.foreign_shape
            wanted = wanted if place.row is None else (self.config.num_layers, *wanted)
            for slot in self.slots:
                key = self._key(*address, slot)
                if key in self._arrays and self._arrays[key][0] != wanted:
                    problems[key] = f"{key} is {list(self._arrays[key][0])}, not {list(wanted)}"
        if problems:
            lines = list(problems.values())
            raise UserError(f"{self.path}: {len(lines)} arrays contradict config: {'; '.join(lines[:12])}")

    def _read(self, key: str, row: int | None = None) -> np.ndarray:
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{self.path / key}/"}}
        try:
            array = ts.open(spec | {"fill_missing_data_reads": False}, open=True).result()
            return np.asarray((array if row is None else array[row]).read().result())
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path / key} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _describe(given: ModelConfig | str | Path) -> ModelConfig:
    if isinstance(given, ModelConfig):
        return given
    path = Path(given).expanduser()
    if path.exists():
        config = read_config(path / "config.json" if path.is_dir() else path)
    elif str(given) in presets.PRESETS:
        config = presets.preset_config(str(given))
    else:
        raise UserError(f"config={given}: no such file, and no such preset: {nearest(str(given), presets.PRESETS)}")
    wanted = (config.norm, config.position, config.attention_bias, config.mlp_gated)
    if wanted != ("layer", "learned", True, False):
        raise UserError(f"config={given}: a {config.family} model; Paxml's GPT-3 is one of the gpt2 class")
    return config.model_copy(update={"norm_scale_offset": 1.0})
