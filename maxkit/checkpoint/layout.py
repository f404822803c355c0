# SPDX-License-Identifier: Apache-2.0
"""Where a tensor's address lies in a tree of ours, scanned or unrolled, and back. No JAX.

An address is (`layers/<path below the block>`, layer number), or (path, None) outside layers; a place is (path of the
leaf, row of its axis 0, None where the leaf is the tensor). docs/design/005-one-decoder.md has both layouts.
"""

import re
from typing import NamedTuple

from maxkit.errors import UserError
from maxkit.formats.contents import Address
from maxkit.models.config import ModelConfig

_LEAF = re.compile(r"(?P<group>[a-z0-9_]+)/(?P<kind>block|layer)_(?P<number>\d+)/(?P<rest>.+)")


class Place(NamedTuple):
    """A leaf and the row in it that holds one layer; row None: the whole leaf."""

    leaf: str
    row: int | None


class Layout:
    """The two directions for one architecture."""

    def __init__(self, config: ModelConfig, scan_layers: bool):
        self.scan_layers, self.num_layers = scan_layers, config.num_layers
        self._groups = {group.name: group for group in config.layer_groups(scan_layers)}
        self._block_of: dict[int, tuple[str, int, int]] = {}  # layer -> group, block of the pattern, row
        if scan_layers:
            for group in self._groups.values():
                for block in range(len(group.pattern)):
                    for row, layer in enumerate(group.layer_numbers(block)):
                        self._block_of[layer] = (group.name, block, row)

    def place(self, path: str, layer: int | None) -> Place:
        """Where a tensor is.

        Raises:
            UserError: the model has no such layer.
        """
        if layer is None:
            return Place(path, None)
        if not 0 <= layer < self.num_layers:
            raise UserError(f"{path}: layer {layer} does not exist in a model of num_layers={self.num_layers}")
        rest = path.removeprefix("layers/")
        if not self.scan_layers:
            return Place(f"layers/layer_{layer}/{rest}", None)
        group, block, row = self._block_of[layer]
        return Place(f"{group}/block_{block}/{rest}", row)

    def rows(self, leaf: str) -> int | None:
        """How many layers a leaf stacks, None for a leaf that is one tensor."""
        match = _LEAF.fullmatch(leaf)
        return self._groups[match["group"]].repeats if match and match["kind"] == "block" else None

    def addresses(self, leaf: str) -> list[Address]:
        """The addresses of what a leaf holds, in the order of its rows.

        Raises:
            UserError: the name is that of no group, block or layer of this model in this layout.
        """
        match = _LEAF.fullmatch(leaf)
        if match is None:
            return [(leaf, None)]
        path, number, group = f"layers/{match['rest']}", int(match["number"]), self._groups.get(match["group"])
        if match["kind"] == "layer" and not self.scan_layers and group and number < self.num_layers:
            return [(path, number)]
        if match["kind"] == "block" and self.scan_layers and group and number < len(group.pattern):
            return [(path, layer) for layer in group.layer_numbers(number)]
        raise UserError(
            f"{leaf}: this model has no such {match['kind']} with scan_layers={self.scan_layers}; "
            "the record of the checkpoint contradicts its tree"
        )
