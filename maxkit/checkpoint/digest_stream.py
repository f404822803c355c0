# SPDX-License-Identifier: Apache-2.0
"""The digest of an array that never exists as a whole: parts are added as they come, in any order.

The formula is in `digest_numpy.py`. Large parts go through one compiled function on the CPU (numpy needs about 2 s per
GB), small ones through numpy, so that a small checkpoint is read without JAX.
"""

import functools
import math
from typing import Any

import numpy as np

from maxkit.checkpoint import digest_numpy

_PIECE = 1 << 20  # words given to the compiled function at once
_COMPILED_FROM = 4 << 20  # words of an array from which compiling pays


class RunningDigest:
    """The digest of an array of this shape and dtype, of which the parts are given with `add`."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.words = digest_numpy.words_per_element(dtype)
        self._inner = digest_numpy.inner_words(tuple(shape), self.words)
        self._missing = math.prod(shape)
        self._compiled = self._missing * self.words >= _COMPILED_FROM
        self._sums = [0, 0]

    def add(self, part: np.ndarray, start: int = 0) -> None:
        """Add the elements from number `start` (in C order) on; no element may be given twice."""
        words = digest_numpy.as_words(part)
        self._missing -= part.size
        first = start * self.words
        lanes = _lanes_compiled if self._compiled else digest_numpy.lane_sums
        while words.size:
            outer, offset = divmod(first, self._inner)
            taken = min(words.size, self._inner - offset)
            for lane, value in enumerate(lanes(words[:taken], offset, outer)):
                self._sums[lane] += value
            words, first = words[taken:], first + taken

    @property
    def complete(self) -> bool:
        """Whether every element was given."""
        return self._missing == 0

    def result(self) -> str:
        """The 16 hex digits, once everything was given."""
        assert self._missing == 0, f"{self._missing} elements were not given"
        return digest_numpy.format_lanes(*self._sums)


def digest(array: np.ndarray) -> str:
    """The digest of one array, as `digest_numpy.digest_array` gives it."""
    running = RunningDigest(array.shape, array.dtype)
    running.add(array)
    return running.result()


def _lanes_compiled(words: np.ndarray, offset: int, outer: int) -> tuple[int, int]:
    """Lane sums of words number `offset` and on of group `outer`."""
    function = _compiled_lanes()
    sums = [0, 0]
    for start in range(0, words.size, _PIECE):
        piece = words[start : start + _PIECE]
        if piece.size < _PIECE:
            rest = digest_numpy.lane_sums(piece, offset + start, outer)
            sums = [a + b for a, b in zip(sums, rest, strict=True)]
            continue
        seeds = np.array(
            [((offset + start) * c[0] + outer * c[2] + c[1]) & 0xFFFFFFFF for c in digest_numpy.LANES], np.uint32
        )
        sums = [a + int(b) for a, b in zip(sums, function(piece, seeds), strict=True)]
    return sums[0] & 0xFFFFFFFF, sums[1] & 0xFFFFFFFF


@functools.cache
def _compiled_lanes() -> Any:
    import jax
    import jax.numpy as jnp
    from jax import lax

    device = jax.local_devices(backend="cpu")[0]

    def lanes(words: Any, seeds: Any) -> Any:
        mixed = []
        for number, (step, _, _, shifts, multipliers) in enumerate(digest_numpy.LANES):
            h = lax.iota(jnp.uint32, _PIECE) * np.uint32(step) + seeds[number]
            h = h ^ words.astype(jnp.uint32)
            for shift, multiplier in zip(shifts, multipliers, strict=False):
                h = (h ^ (h >> np.uint32(shift))) * np.uint32(multiplier)
            mixed.append(h ^ (h >> np.uint32(shifts[-1])))
        zero = jnp.uint32(0)
        return lax.reduce(tuple(mixed), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), (0,))

    compiled = jax.jit(lanes)

    def on_cpu(words: np.ndarray, seeds: np.ndarray) -> Any:
        with jax.default_device(device):
            return compiled(words, seeds)

    return on_cpu
