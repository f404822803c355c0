# SPDX-License-Identifier: Apache-2.0
"""Adapters kept apart from the model they belong to, with that model: one `Contents` of both. No JAX.

A folder of peft (`formats/peft.py`) is our adapter-only checkpoint as well. It names its base model, so `maxkit.load`
needs no more than the folder; `base=` says where else the model is.
"""

from pathlib import Path
from typing import Any

import numpy as np

from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError
from maxkit.formats import peft
from maxkit.formats.contents import WEIGHTS, Address
from maxkit.formats.peft import PeftReader

ADAPTERS = ("lora_a", "lora_b")  # the last parts of their paths


def is_adapter(path: str) -> bool:
    """Whether a tensor is a factor of an adapter."""
    return path.rpartition("/")[2] in ADAPTERS


def is_adapter_folder(path: Any) -> bool:
    """Whether a folder holds adapters and no model."""
    return (path / peft.CONFIG).is_file()


class Adapted:
    """The weights of `base`, without adapters of its own, and those of a folder beside them.

    Raises:
        UserError: the folder is damaged, or its adapters are not of this model.
    """

    format = "peft"
    slots = (WEIGHTS,)
    optimizer = None

    def __init__(self, path: Path, base: Any, base_name: str):
        self._adapters = PeftReader(path, base.config)
        self._base, self.path, self.base_name = base, path, base_name
        self.lora = self._adapters.lora
        quantized = getattr(base, "lora", None) is not None and base.lora.base_weight_dtype
        if quantized:
            self.lora = self.lora.model_copy(update={"base_weight_dtype": quantized})
        self.config, self.scan_layers = base.config, base.scan_layers
        self.scalars: dict[str, np.ndarray] = {}
        self.facts = {**base.facts, "base model": base_name, **self._adapters.facts}
        self._own = dict.fromkeys(self._adapters.addresses())

    def tokenizer(self) -> Tokenizer | None:
        """The one beside the adapters, else the base model's."""
        beside = (self.path / "tokenizer.json").is_file()
        return Tokenizer.load(self.path) if beside else self._base.tokenizer()

    def addresses(self, slot: str = WEIGHTS) -> list[Address]:
        """The base model's, then the adapters'."""
        return [a for a in self._base.addresses() if not is_adapter(a[0])] + list(self._own)

    def shape(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> tuple[int, ...]:
        """The canonical shape."""
        return self._of(path, layer).shape(path, layer)

    def dtype(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.dtype:
        """The stored type."""
        return self._of(path, layer).dtype(path, layer)

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor."""
        return self._of(path, layer).read(path, layer)

    def _of(self, path: str, layer: int | None) -> Any:
        return self._adapters if (path, layer) in self._own else self._base

    def missing_keys(self) -> list[str]:
        """Of the base model."""
        return self._base.missing_keys()

    def unused_keys(self) -> list[str]:
        """Of the base model."""
        return self._base.unused_keys()

    def ignored_keys(self) -> dict[str, str]:
        """Of the base model."""
        return self._base.ignored_keys()


def refuse_base(path: object, base: object) -> None:
    """Refuse `base=` for what is no folder of adapters."""
    if base is not None:
        raise UserError(f"base={base}: {path} is a model, not adapters of one: leave base out")


def base_name(contents: Any, where: object) -> str | None:
    """The model that adapters of `contents` are to be loaded with: the one they were trained on, else where it is."""
    manifest = getattr(contents, "manifest", None)
    if manifest is not None and manifest.parent:
        return str(manifest.parent)
    named = getattr(contents, "base_name", None) or getattr(contents, "source", None)
    return str(named) if named else None if str(where) == "memory" else str(where)
