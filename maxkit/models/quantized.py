# SPDX-License-Identifier: Apache-2.0
"""Frozen weights in 8 or 4 bits (QLoRA: Dettmers et al. 2023, arXiv 2305.14314): what is stored, and what it means.

    kernel_scale   float32, one for each tile of up to 64 weights along one axis
    kernel_q       int8: round(w / scale), scale = max |w| / 127.5
                   nf4:  the nearest of 16 codes (appendix E of the paper) to w / max |w|, two in a uint8: the low
                         half of the byte is of the first half of the axis, the high half of the second

Functions of arrays, with numpy or jax.numpy as `xp`; no JAX here. The values are those of Qwix 0.1.8, nf4 to the bit,
int8 but for the last bit of the scales (tests/unit/test_quantized_base.py). Why not Qwix: docs/design/012-lora.md.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from maxkit.errors import UserError

TILE = 64
VALUES, SCALES = "kernel_q", "kernel_scale"
CODES = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def tiled_axis(letters: str) -> int:
    """The axis (negative) that tiles lie along: one that every device has whole when it multiplies."""
    return next(letters.index(letter) - len(letters) for letter in "DQZ" if letter in letters)


def tile_of(size: int) -> int:
    """The number of weights that share a scale."""
    return max(tile for tile in range(1, TILE + 1) if size % tile == 0)


def check(size: int, kind: str, path: str) -> None:
    """Refuse an axis that cannot be cut into tiles, or not into two halves.

    Raises:
        UserError: says of which kernel.
    """
    if tile_of(size) < min(size, 16) or (kind == "nf4" and size % 2):
        raise UserError(
            f"base_weight_dtype={kind!r}: {path} has {size} weights in a row, which have no divisor of 16 to {TILE}"
            f"{' or are odd' if kind == 'nf4' else ''}: leave base_weight_dtype empty for this model"
        )


def quantize(kernel: Any, kind: str, axis: int, xp: Any = np) -> tuple[Any, Any]:
    """(values, scales) of a kernel."""
    wide = _tiled(kernel.astype(np.float32), tile_of(kernel.shape[axis]), axis)
    scales = xp.max(xp.abs(wide), axis=axis, keepdims=True) / np.float32(127.5 if kind == "int8" else 1.0)
    scales = xp.where(scales < np.sqrt(np.finfo(np.float32).tiny), np.float32(1), scales)
    wide = (wide / scales).reshape(kernel.shape)
    if kind == "int8":
        values = xp.clip(xp.round(wide), -128, 127).astype(np.int8)
    else:
        between = (CODES[1:] + CODES[:-1]) / 2
        codes = sum((wide > limit).astype(np.uint8) for limit in between)
        low, high = xp.split(codes, 2, axis=axis)
        values = low | (high << 4)
    return values, scales.squeeze(axis)


def dequantize(
    values: Any, scales: Any, kind: str, axis: int, xp: Any = np, look_up: Callable[[Any], Any] = CODES.__getitem__
) -> Any:
    """The kernel, float32. `look_up` gives the codes of numbers 0 to 15."""
    if kind == "int8":
        wide = values.astype(np.float32)
    else:
        wide = look_up(xp.concatenate([values & 15, values >> 4], axis=axis))
    tiled = _tiled(wide, wide.shape[axis] // scales.shape[axis], axis)
    return (tiled * xp.expand_dims(scales, axis)).reshape(wide.shape)


def _tiled(array: Any, tile: int, axis: int) -> Any:
    """[.., size, ..] as [.., size / tile, tile, ..]: `axis` is then the one within a tile."""
    at = array.ndim + axis
    return array.reshape(*array.shape[:at], array.shape[at] // tile, tile, *array.shape[at + 1 :])
