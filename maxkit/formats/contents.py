# SPDX-License-Identifier: Apache-2.0
"""What any checkpoint holds, brought to one form: tensors by canonical address, optimizer statistics beside them.

Every reader is a `Contents`; every writer takes one. So converting is reading one and writing the other, leaf by leaf,
and comparing is walking two of them. No JAX here. The address of a tensor is (`layers/<path below the block>`, layer
number) or (path, None), whatever the layout on disk (docs/design/005-one-decoder.md).
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from maxkit.data.tokenizer import Tokenizer
from maxkit.models.config import ModelConfig

Address = tuple[str, int | None]  # (path without block or layer part, layer number or None)
WEIGHTS = "params"  # the slot of the weights themselves


class Contents(Protocol):
    """An opened checkpoint. Tensors are read when asked for, one layer at a time, in canonical orientation."""

    format: str
    config: ModelConfig
    scan_layers: bool | None  # how the file is laid out; None where the format has no layout
    optimizer: str | None  # "adamw" | "adam_pax" | "sgd" | "muon" | ..., None without optimizer state
    slots: tuple[str, ...]  # "params", then one per statistic that the optimizer keeps per parameter ("mu", "nu")
    scalars: dict[str, np.ndarray]  # "step", "count", ...: what belongs to no parameter
    facts: dict[str, str]  # what the weights had been through and the config now says: {"query scale": "..."}

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that came with it."""

    def addresses(self, slot: str = WEIGHTS) -> Iterable[Address]:
        """Every tensor of that slot that is there (Muon keeps `nu` only for some parameters)."""

    def shape(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> tuple[int, ...]:
        """The canonical shape, without reading."""

    def dtype(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.dtype:
        """The stored dtype, without reading."""

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor in canonical orientation and stored dtype."""

    def missing_keys(self) -> list[str]:
        """Tensors that the model needs and that are not stored, by their foreign name."""

    def unused_keys(self) -> list[str]:
        """Stored tensors that the model does not use."""

    def ignored_keys(self) -> dict[str, str]:
        """Stored tensors that are no part of the model (RNG state, masks, ...), each with the reason."""
