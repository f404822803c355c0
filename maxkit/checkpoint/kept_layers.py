# SPDX-License-Identifier: Apache-2.0
"""Some layers of a checkpoint as a shallower model of its own: how a student starts from its teacher. No JAX.

The layers are evenly spaced, the first and the last among them. Every second layer is how DistilBERT begins (Sanh et
al. 2019, arXiv 1910.01108, section 2). The ends are kept because they do what no other layer does: the first reads
embeddings, the last writes what the final norm and the head expect, and dropping it hurts most (Gromov et al. 2024,
arXiv 2403.17887, section 4.1).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError
from maxkit.formats.contents import WEIGHTS, Address
from maxkit.models.config import ModelConfig


def evenly_spaced(num_layers: int, count: int) -> tuple[int, ...]:
    """`count` of the numbers 0 to num_layers - 1, ascending, the first and the last among them; of one, the first."""
    gaps, length = max(count - 1, 1), num_layers - 1
    return tuple((2 * i * length + gaps) // (2 * gaps) for i in range(count))


def shallower(config: ModelConfig, count: int, where: object) -> tuple[ModelConfig, tuple[int, ...]]:
    """(the architecture with `count` of the layers, their numbers in `config`).

    Raises:
        UserError: the model has fewer layers, or a layer would get a place whose kind of block it is not.
    """
    if count > config.num_layers:
        raise UserError(f"student_layers={count}: {where} has num_layers={config.num_layers}; give at most that many")
    if not _fits(config, count):
        allowed = ", ".join(str(n) for n in range(1, config.num_layers + 1) if _fits(config, n))
        raise UserError(
            f"student_layers={count}: layers {', '.join(map(str, evenly_spaced(config.num_layers, count)))} of {where} "
            f"are not the kinds of blocks that a model of {count} layers has there; allowed: {allowed}"
        )
    return config.model_copy(update={"num_layers": count}), evenly_spaced(config.num_layers, count)


def _fits(config: ModelConfig, count: int) -> bool:
    kept = tuple(config.blocks[number] for number in evenly_spaced(config.num_layers, count))
    return config.model_copy(update={"num_layers": count}).blocks == kept


class KeptLayers:
    """The weights of `count` evenly spaced layers of `contents`, and what lies outside layers, as `Contents`.

    Layers are numbered anew; the rest is read as it is, one tensor at a time.

    Raises:
        UserError: as `shallower`.
    """

    slots = (WEIGHTS,)
    optimizer = None

    def __init__(self, contents: Any, count: int, where: object):
        self._contents = contents
        self.config, self.numbers = shallower(contents.config, count, where)
        kept = f"{', '.join(map(str, self.numbers))} of {contents.config.num_layers}"
        self.facts = {**contents.facts, "layers kept": kept}
        self._known = set(contents.addresses())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._contents, name)

    def tokenizer(self) -> Tokenizer | None:
        """The source's."""
        return self._contents.tokenizer()

    def addresses(self, slot: str = WEIGHTS) -> list[Address]:
        """What lies outside layers, then what each kept layer has."""
        place = {number: layer for layer, number in enumerate(self.numbers)}
        outside = [address for address in self._contents.addresses() if address[1] is None]
        return outside + [(path, place[n]) for path, n in self._contents.addresses() if n in place]

    def shape(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._contents.shape(path, self._number(layer))

    def dtype(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.dtype:
        """The stored dtype of a tensor."""
        return self._contents.dtype(path, self._number(layer))

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor. Of a stack of our own the layers up to the next kept one are read too: its digest is of all."""
        if layer is not None and self._contents.format == "maxkit" and self._contents.scan_layers:
            ends = (*self.numbers, self._contents.config.num_layers)
            for number in self._passed_over(path, ends[layer] + 1, ends[layer + 1]):
                self._contents.read(path, number)
        return self._contents.read(path, self._number(layer))

    def _number(self, layer: int | None) -> int | None:
        return layer if layer is None else self.numbers[layer]

    def _passed_over(self, path: str, start: int, stop: int) -> Sequence[int]:
        return [number for number in range(start, stop) if (path, number) in self._known]
