# SPDX-License-Identifier: Apache-2.0
"""A MaxText or Tunix checkpoint of which nobody says what it computes, as far as its names go: to compare two of them.

Roots, wrappers and layouts are taken away; tensors keep MaxText's names and orientation: it is
`decoder/layers/mlp/wi_0/kernel` of layer 3, whether a row of a stack, an entry of `layers_3` or of `layers/3`. No JAX.
"""

import re
from typing import Any

import numpy as np

from maxkit.checkpoint import inspect
from maxkit.checkpoint.layout import Address
from maxkit.formats import maxtext_tree
from maxkit.formats.contents import WEIGHTS
from maxkit.formats.maxtext.layout import sort_keys
from maxkit.formats.orbax_arrays import OrbaxArrays

_ONE_LAYER = re.compile(r"(?P<group>decoder/(?:\w+_)?layers)[_/](?P<number>\d+)/(?P<rest>.+)")
_CYCLE = re.compile(r"(?P<group>decoder/layers)/layers?_(?P<number>\d+)/(?P<rest>.+)")
_REMAINDER = re.compile(r"decoder/layers_remainder/layers_(?P<number>\d+)/(?P<rest>.+)")
_STACK = re.compile(r"(?P<group>decoder/(?:\w+_)?layers)/(?P<rest>.+)")


class RawContents:
    """Tensors by (MaxText's name without the layer, layer); `config` is None."""

    config = None

    def __init__(self, path: Any):
        place = inspect.find(path)
        self._arrays = OrbaxArrays(place.path / place.item if place.item else place.path)
        found = sort_keys(self._arrays.leaves, place.item)
        guess = maxtext_tree.recognise(self._arrays.shapes, place.item)
        self.format, self.optimizer, self.scan_layers = found.format, found.optimizer, guess.scan_layers
        self.slots, self.facts = (WEIGHTS, *(slot for slot in found.trees if slot != WEIGHTS)), {}
        self._found = found
        axes = [group["layer_axis"] for group in guess.groups if group["layer_axis"] is not None]
        self.scan_axis = axes[0] if axes else 1
        self._places = {slot: self._sorted(tree) for slot, tree in found.trees.items()}
        self._held: tuple[str, np.ndarray] | None = None

    def _sorted(self, tree: dict[str, str]) -> dict[Address, tuple[str, int | None]]:
        """{address: (key, row of its stack)}."""
        cycle = 1 + max((int(m["number"]) for m in map(_CYCLE.fullmatch, tree) if m), default=0)
        places: dict[Address, tuple[str, int | None]] = {}
        stacked = 0
        for name, key in tree.items():
            if match := _REMAINDER.fullmatch(name):
                continue
            if (match := _CYCLE.fullmatch(name)) or (match := _STACK.fullmatch(name) if self._is_stack(name) else None):
                first, step = (int(match["number"]), cycle) if "number" in match.groupdict() else (0, 1)
                rows = self._arrays.leaves[key].shape[self.scan_axis]
                for row in range(rows):
                    places[f"{match['group']}/{match['rest']}", row * step + first] = key, row
                stacked = max(stacked, rows * step)
            elif match := _ONE_LAYER.fullmatch(name):
                places[f"{match['group']}/{match['rest']}", int(match["number"])] = key, None
            else:
                places[name, None] = key, None
        for name, key in tree.items():
            if match := _REMAINDER.fullmatch(name):
                # Behind the stacked cycles; an axis of one cycle is kept there as well.
                row = 0 if self.scan_layers and self._has_axis(key, match["rest"], places) else None
                places[f"decoder/layers/{match['rest']}", stacked + int(match["number"])] = key, row
        return places

    def _is_stack(self, name: str) -> bool:
        return bool(self.scan_layers) and not _ONE_LAYER.fullmatch(name)

    def _has_axis(self, key: str, rest: str, places: dict) -> bool:
        other = next((k for (path, _), (k, _) in places.items() if path == f"decoder/layers/{rest}"), None)
        return other is not None and len(self._arrays.leaves[key].shape) == len(self._arrays.leaves[other].shape)

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """The step and counters, by MaxText's names."""
        return {name: self._arrays.read(key) for name, key in self._found.scalars.items()}

    def addresses(self, slot: str = WEIGHTS) -> list[Address]:
        """Every tensor of a slot."""
        return list(self._places.get(slot, {}))

    def shape(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> tuple[int, ...]:
        """The stored shape, without the axis of layers."""
        key, row = self._places[slot][path, layer]
        shape = self._arrays.leaves[key].shape
        return shape if row is None else shape[: self.scan_axis] + shape[self.scan_axis + 1 :]

    def dtype(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.dtype:
        """The stored dtype."""
        return self._arrays.leaves[self._places[slot][path, layer][0]].dtype

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor as it is stored."""
        key, row = self._places[slot][path, layer]
        if self._held is None or self._held[0] != key:
            self._held = None
            self._held = key, self._arrays.read(key)
        return self._held[1] if row is None else np.take(self._held[1], row, axis=self.scan_axis)

    def missing_keys(self) -> list[str]:
        """Unknown."""
        return []

    def unused_keys(self) -> list[str]:
        """What has no place among weights, statistics and counters."""
        return list(self._found.unknown)

    def ignored_keys(self) -> dict[str, str]:
        """Random numbers and the like."""
        return dict(self._found.ignored)
