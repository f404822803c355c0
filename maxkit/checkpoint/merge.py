# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters added to the weights beside them, tensor by tensor, for formats that have no adapters. No JAX."""

from typing import Any

import numpy as np

from maxkit.checkpoint.layout import Address
from maxkit.checkpoint.quantize import stored_as
from maxkit.formats.contents import WEIGHTS

_A, _B = "lora_a", "lora_b"


class Merged:
    """The weights of `contents` with kernel + (alpha / rank) A B in place of each adapted kernel, as `Contents`.

    The sum is taken in float32 and rounded once to the kernel's type (Hu et al. 2021, arXiv 2106.09685, section 4.1).
    """

    slots: tuple[str, ...] = (WEIGHTS,)
    lora = None

    def __init__(self, contents: Any):
        self._scale = np.float32(contents.lora.scale)
        self._contents = contents = stored_as(contents, "", {})
        self._known = set(contents.addresses())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._contents, name)

    def addresses(self, slot: str = WEIGHTS) -> list[Address]:
        """All but the adapters."""
        return [a for a in self._contents.addresses() if a[0].rpartition("/")[2] not in (_A, _B)]

    def is_adapted(self, path: str, layer: int | None = None) -> bool:
        """Whether a tensor is a kernel with an adapter."""
        stem, _, name = path.rpartition("/")
        return name == "kernel" and (f"{stem}/{_A}", layer) in self._known

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor, its adapter added: A is (inputs)R, B is R(outputs), a kernel (inputs)(outputs), E first."""
        kernel = self._contents.read(path, layer)
        if not self.is_adapted(path, layer):
            return kernel
        stem = path.rpartition("/")[0]
        low, high = (self._contents.read(f"{stem}/{name}", layer).astype(np.float32) for name in (_A, _B))
        # Of experts there is one product each: the sum is over the rank alone, the first axis belongs to both.
        product = low @ high if "/experts/" in path else np.tensordot(low, high, axes=1)
        assert product.shape == kernel.shape, (path, product.shape, kernel.shape)
        return (kernel.astype(np.float32) + self._scale * product).astype(kernel.dtype)
