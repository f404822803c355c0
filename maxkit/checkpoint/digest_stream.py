# SPDX-License-Identifier: Apache-2.0
"""The digest of an array that never exists as a whole: parts are added as they come, in any order. No JAX.

The formula is in `digest_numpy.py`.
"""

import math
from typing import Any

import numpy as np

from maxkit.checkpoint import digest_numpy


class RunningDigest:
    """The digest of an array of this shape and dtype, of which the parts are given with `add`."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.words = digest_numpy.words_per_element(dtype)
        self._inner = digest_numpy.inner_words(tuple(shape), self.words)
        self._missing = math.prod(shape)
        self._sums = [0, 0]

    def add(self, part: np.ndarray, start: int = 0) -> None:
        """Add the elements from number `start` (in C order) on; no element may be given twice."""
        words = digest_numpy.as_words(part)
        self._missing -= part.size
        first = start * self.words
        while words.size:
            outer, offset = divmod(first, self._inner)
            taken = min(words.size, self._inner - offset)
            for lane, value in enumerate(digest_numpy.lane_sums(words[:taken], offset, outer)):
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
