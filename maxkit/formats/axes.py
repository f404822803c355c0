# SPDX-License-Identifier: Apache-2.0
"""The notation for how a tensor of ours lies in a foreign one: `foreign axes > our axes`.

One character is one axis; brackets hold what one axis holds together, slowest first. A letter stands for a size
(`tables.letter_sizes`), `1` for the size one. A sum is a concatenation, of which the part behind `*` is meant:

    VD                      the same axes on both sides
    (NH)D > DNH             rows are (head, dimension of a head); ours is the transpose, with the heads apart
    (*NH+KH+KH)D > DNH      query, key and value one below the other (Phi-3); this is the query
    (N(n+*v))Z > ZNv        every head holds a part of n rows, then one of v rows (DeepSeek); this is the second
    ED(f(*1+1)) > EDf       the columns 0, 2, 4, ... (gpt-oss); `ED(*f+f)` would be the first half of the columns
    (k(h+h+*gu+gu))D > D(kg)u   brackets on our side: key head and head within it are one axis

The same text is read in both directions, so a reader's transform and a writer's cannot disagree. Not here: which
tensors there are (`tables.py`).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sum:
    """What a pair of brackets holds: one product, or several of which `chosen` is meant."""

    terms: "tuple[tuple[str | Sum, ...], ...]"
    chosen: int


@dataclass(frozen=True)
class Rearrangement:
    """Foreign axes to ours and back. `sizes` gives every letter's size."""

    foreign: tuple[str | Sum, ...]
    canonical: tuple[str | Sum, ...]
    sizes: dict[str, int]

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """The shape in the file, in numpy order, all parts together."""
        return tuple(self._size(axis) for axis in self.foreign)

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """The shape of the model's parameter."""
        return tuple(self._size(axis) for axis in self.canonical)

    @property
    def is_whole(self) -> bool:
        """Whether the foreign tensor holds nothing else."""
        return math.prod(self.foreign_shape) == math.prod(self.canonical_shape)

    def read(self, array: np.ndarray) -> np.ndarray:
        """Foreign to canonical, as an array of its own: nothing shares memory with a mapped file."""
        result = np.empty(self.canonical_shape, array.dtype)
        self.read_into(result, array)
        return result

    def read_into(self, result: np.ndarray, array: np.ndarray) -> None:
        """Foreign `array` into canonical `result`, which may be of another type."""
        ours, theirs = self._views(result, array)
        ours[...] = theirs

    def write(self, array: np.ndarray) -> np.ndarray:
        """Canonical to foreign, the inverse of `read`, where the foreign tensor holds nothing else."""
        assert self.is_whole, "part of a tensor: write_into"
        result = np.empty(self.foreign_shape, array.dtype)
        self.write_into(result, array)
        return result

    def write_into(self, result: np.ndarray, array: np.ndarray) -> None:
        """Canonical `array` to its place in the foreign `result`; what belongs to others stays."""
        ours, theirs = self._views(array, result)
        theirs[...] = ours

    def _views(self, ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both arrays, with one axis for each letter, in the order of our letters."""
        assert ours.shape == self.canonical_shape, (ours.shape, self.canonical_shape)
        assert theirs.shape == self.foreign_shape, (theirs.shape, self.foreign_shape)
        letters, wanted = letters_of(self.foreign), letters_of(self.canonical)
        return self._view(ours, self.canonical), self._view(theirs, self.foreign).transpose(
            [letters.index(letter) for letter in wanted]
        )

    def _size(self, factor: str | Sum) -> int:
        if isinstance(factor, Sum):
            return sum(math.prod(map(self._size, term)) for term in factor.terms)
        return 1 if factor == "1" else self.sizes[factor]

    def _view(self, array: np.ndarray, factors: tuple[str | Sum, ...]) -> np.ndarray:
        view, axis = array, 0
        for factor in factors:
            view, axis = self._split(view, axis, factor)
        assert np.may_share_memory(view, array) or not array.size  # splitting an axis never copies
        return view

    def _split(self, view: np.ndarray, axis: int, factor: str | Sum) -> tuple[np.ndarray, int]:
        """`view` with one axis per letter of `factor` at `axis`, and the number of the axis behind them."""
        if isinstance(factor, str):
            return (view.squeeze(axis), axis) if factor == "1" else (view, axis + 1)
        lengths = [math.prod(map(self._size, term)) for term in factor.terms]
        start = sum(lengths[: factor.chosen])
        view = view[(slice(None),) * axis + (slice(start, start + lengths[factor.chosen]),)]
        term = factor.terms[factor.chosen]
        view = view.reshape(view.shape[:axis] + tuple(map(self._size, term)) + view.shape[axis + 1 :])
        for part in term:
            view, axis = self._split(view, axis, part)
        return view, axis


def letters_of(factors: tuple[str | Sum, ...]) -> str:
    """The letters that `factors` leave after choosing."""
    found = ""
    for factor in factors:
        found += letters_of(factor.terms[factor.chosen]) if isinstance(factor, Sum) else factor.replace("1", "")
    return found


def parse_axes(axes: str, sizes: dict[str, int]) -> Rearrangement:
    """Read the notation; a single side means that both are equal."""
    return Rearrangement(*_parse_sides(axes), sizes)


@functools.lru_cache(maxsize=1024)
def _parse_sides(axes: str) -> tuple[tuple[str | Sum, ...], tuple[str | Sum, ...]]:
    source, _, target = axes.replace(" ", "").partition(">")
    foreign, canonical = _parse(source), _parse(target or source)
    assert sorted(letters_of(foreign)) == sorted(set(letters_of(canonical))) == sorted(letters_of(canonical)), axes
    return foreign, canonical


def _parse(side: str) -> tuple[str | Sum, ...]:
    terms, rest = _parse_terms(side)
    assert not rest and len(terms.terms) == 1 and side.count("(") == side.count(")"), side
    return terms.terms[0]


def _parse_terms(text: str) -> tuple[Sum, str]:
    """The sum that `text` begins with, and what is left behind its closing bracket."""
    terms: list[list[str | Sum]] = [[]]
    chosen: list[int] = []
    while text:
        character, text = text[0], text[1:]
        if character == ")":
            break
        if character == "+":
            terms.append([])
        elif character == "*":
            chosen.append(len(terms) - 1)
        elif character == "(":
            inner, text = _parse_terms(text)
            terms[-1].append(inner)
        else:
            terms[-1].append(character)
    assert len(chosen) == (len(terms) > 1), "one part of a sum is starred, and only of a sum"
    return Sum(tuple(map(tuple, terms)), chosen[0] if chosen else 0), text
