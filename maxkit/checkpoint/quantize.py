# SPDX-License-Identifier: Apache-2.0
"""Weights in the storage that a model wants (`models/quantized.py`), made or undone tensor by tensor. No JAX."""

from typing import Any

import numpy as np

from maxkit.checkpoint.layout import Address
from maxkit.formats.contents import WEIGHTS
from maxkit.models.quantized import SCALES, VALUES, dequantize, quantize, tile_of


class _Stored:
    """`contents` whose kernels are stored in another way; nothing but weights."""

    slots = (WEIGHTS,)
    optimizer = None

    def __init__(self, contents: Any):
        self._contents = contents
        self._known = dict.fromkeys(contents.addresses())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._contents, name)


class Quantized(_Stored):
    """The kernels at `paths` ({path without `/kernel`: axis of the tiles}) as `kernel_q` and `kernel_scale`."""

    def __init__(self, contents: Any, kind: str, paths: dict[str, int]):
        super().__init__(contents)
        self._kind, self._axes = kind, paths
        self._held: tuple[Address, tuple[np.ndarray, np.ndarray]] | None = None

    def addresses(self, slot: str = WEIGHTS) -> list[Address]:
        """Two for each of those kernels."""
        found = []
        for path, layer in self._known:
            stem, _, name = path.rpartition("/")
            small = name == "kernel" and stem in self._axes
            found += (
                [(f"{stem}/{x}", layer) for x in ((VALUES, SCALES) if small else (name,))] if stem else [(path, layer)]
            )
        return found

    def _kernel(self, path: str) -> tuple[str, str]:
        """(path of the kernel, which part of it) of one of the two; ("", "") for everything else."""
        stem, _, name = path.rpartition("/")
        return (f"{stem}/kernel", name) if name in (VALUES, SCALES) and stem in self._axes else ("", "")

    def shape(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> tuple[int, ...]:
        """The shape as stored."""
        kernel, part = self._kernel(path)
        if not kernel:
            return self._contents.shape(path, layer)
        shape, axis = list(self._contents.shape(kernel, layer)), self._axes[kernel.removesuffix("/kernel")]
        if part == SCALES:
            shape[axis] //= tile_of(shape[axis])
        elif self._kind == "nf4":
            shape[axis] //= 2
        return tuple(shape)

    def dtype(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.dtype:
        """The type as stored."""
        kernel, part = self._kernel(path)
        if not kernel:
            return self._contents.dtype(path, layer)
        return np.dtype("float32" if part == SCALES else "int8" if self._kind == "int8" else "uint8")

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor; a kernel is read once for both of its parts when they are asked for in turn."""
        kernel, part = self._kernel(path)
        if not kernel:
            return self._contents.read(path, layer)
        if self._held is None or self._held[0] != (kernel, layer):
            value = self._contents.read(kernel, layer)
            self._held = (kernel, layer), quantize(value, self._kind, self._axes[kernel.removesuffix("/kernel")])
        return self._held[1][part == SCALES]


class Dequantized(_Stored):
    """Quantised kernels as kernels in float32."""

    def __init__(self, contents: Any):
        super().__init__(contents)
        self._kind = contents.lora.base_weight_dtype
        self.lora = contents.lora.model_copy(update={"base_weight_dtype": ""})

    def addresses(self, slot: str = WEIGHTS) -> list[Address]:
        """A kernel in the place of its values; no scales."""
        found = [(path, layer) for path, layer in self._known if path.rpartition("/")[2] != SCALES]
        return [(f"{p.rpartition('/')[0]}/kernel" if p.endswith(f"/{VALUES}") else p, layer) for p, layer in found]

    def _parts(self, path: str, layer: int | None) -> tuple[str, str] | None:
        stem = path.rpartition("/")[0]
        parts = f"{stem}/{VALUES}", f"{stem}/{SCALES}"
        return parts if path.endswith("/kernel") and (parts[0], layer) in self._known else None

    def shape(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> tuple[int, ...]:
        """The shape of the kernel."""
        parts = self._parts(path, layer)
        if parts is None:
            return self._contents.shape(path, layer)
        shape = list(self._contents.shape(parts[0], layer))
        if self._kind == "nf4":
            shape[self._axis(parts, layer)] *= 2
        return tuple(shape)

    def _axis(self, parts: tuple[str, str], layer: int | None) -> int:
        """The axis of the tiles: the only one that values and scales have of different length."""
        values, scales = (self._contents.shape(part, layer) for part in parts)
        return next(a - len(values) for a, (x, y) in enumerate(zip(values, scales, strict=True)) if x != y)

    def dtype(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.dtype:
        """float32 of what was quantised."""
        return np.dtype(np.float32) if self._parts(path, layer) else self._contents.dtype(path, layer)

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor."""
        parts = self._parts(path, layer)
        if parts is None:
            return self._contents.read(path, layer)
        values, scales = (self._contents.read(part, layer) for part in parts)
        return dequantize(values, scales.astype(np.float32), self._kind, self._axis(parts, layer))


def stored_as(contents: Any, kind: str, paths: dict[str, int]) -> Any:
    """`contents` with the kernels at `paths` ({path: axis of the tiles}) stored as `kind` ("": as they are)."""
    lora = getattr(contents, "lora", None)
    if (lora.base_weight_dtype if lora is not None else "") == kind:
        return contents
    if lora is not None and lora.base_weight_dtype:
        contents = Dequantized(contents)
    return Quantized(contents, kind, paths) if kind else contents
