# SPDX-License-Identifier: Apache-2.0
"""`maxkit compare`: what differs between two checkpoints, whatever their formats and layouts. No JAX.

Both are walked by canonical address, tensor by tensor, so a scanned run and an unrolled Hugging Face folder meet in the
same places and no more than a few tensors are in memory. Without `values` nothing but metadata is read.

Counted as a difference: an architecture, tensors on one side only, shapes, values out of tolerance. Reported, but not
counted: dtypes, and the state of random numbers or dropout on one side only (by whole parts of the path).
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from maxkit.checkpoint.layout import Address
from maxkit.checkpoint.open import Description, open_contents, records_nothing
from maxkit.checkpoint.raw import RawContents
from maxkit.checkpoint.statement import alike
from maxkit.errors import UserError, nearest
from maxkit.formats.contents import WEIGHTS, Contents
from maxkit.formats.maxtext import maxtext_form
from maxkit.models.config import ModelConfig

ONLY = ("params", "all")
RANDOM = frozenset({"rng", "rngs", "dropout"})
_PIECE = 1 << 20  # elements compared at once: their float64 copies stay small
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Difference:
    """One tensor, scalar or setting that differs.

    kind: "config" | "only in a" | "only in b" | "shape" | "values" | "scalar". index, absolute and relative are of the
    largest absolute difference of values; count says how many elements are out of tolerance.
    """

    kind: str
    path: str
    layer: int | None = None
    slot: str = WEIGHTS
    a: Any = None
    b: Any = None
    index: tuple[int, ...] | None = None
    absolute: float | None = None
    relative: float | None = None
    count: int | None = None

    def line(self) -> str:
        """For people."""
        name = self.path if self.slot == WEIGHTS else f"{self.slot} of {self.path}"
        where = name if self.layer is None else f"{name} (layer {self.layer})"
        if self.kind != "values":
            return f"{self.kind}: {where}" + ("" if self.a is None and self.b is None else f": {self.a} | {self.b}")
        place = "" if not self.index else f" at {list(self.index)}"
        return (
            f"values: {where}{place}: {self.a} | {self.b}, largest absolute difference {self.absolute:.6g}, largest "
            f"relative {self.relative:.6g}, {self.count} elements out of tolerance"
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was found. `dtypes`: {"a type | b type": tensors}; `notes` say what was looked at and what was not."""

    a: str
    b: str
    compared: int
    values: bool
    differences: tuple[Difference, ...]
    dtypes: dict[str, int]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing counted differs."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """For programs; numbers that JSON lacks are texts."""
        found = [{k: v for k, v in dataclasses.asdict(d).items() if v is not None} for d in self.differences]
        return {
            "equal": self.equal,
            "a": self.a,
            "b": self.b,
            "compared": self.compared,
            "values": self.values,
            "differences": _plain(found),
            "dtypes": self.dtypes,
            "notes": list(self.notes),
        }

    def lines(self) -> Iterable[str]:
        """For people: the verdict first."""
        what = "values of" if self.values else "structure of"
        verdict = "equal" if self.equal else f"{len(self.differences)} differences"
        yield f"{verdict}: {what} {self.compared} tensors, {self.a} | {self.b}"
        for difference in self.differences[:_SHOWN]:
            yield difference.line()
        if self.differences[_SHOWN:]:
            yield f"and {len(self.differences) - _SHOWN} more (--json has all)"
        for pair, count in self.dtypes.items():
            yield f"dtype, not counted: {count} tensors are {pair}"
        yield from self.notes


def compare(
    a: str | Path,
    b: str | Path,
    *,
    config_a: Description = None,
    config_b: Description = None,
    values: bool = False,
    only: str = "params",
    atol: float = 1e-5,
    rtol: float = 1e-5,
) -> Comparison:
    """Compare two checkpoints by canonical address.

    Args:
        config_a, config_b: how each was made, where it does not say.
        values: read and compare the tensors; else only what metadata says.
        only: "params", or "all": optimizer state, step and counters as well.
        atol, rtol: equal is |a - b| <= atol + rtol * |b|; NaN equals NaN, infinities of one sign are equal.

    Raises:
        UserError: one of them cannot be opened or read, or an argument is none of those.
    """
    if only not in ONLY:
        raise UserError(f"only={only!r}: {nearest(only, ONLY)}")
    if not (atol >= 0 and rtol >= 0):
        raise UserError(f"atol={atol}, rtol={rtol}: tolerances are zero or more")
    one, two, notes = _open(a, b, config_a, config_b)
    found = compare_contents(one, two, names=(str(a), str(b)), values=values, only=only, atol=atol, rtol=rtol)
    return dataclasses.replace(found, notes=(*notes, *found.notes))


def _open(a: str | Path, b: str | Path, config_a: Description, config_b: Description) -> tuple[Any, Any, list[str]]:
    """Both, and a line on what stands for a description that neither the checkpoint nor the user gives."""
    silent = [config is None and records_nothing(path) for path, config in ((a, config_a), (b, config_b))]
    if all(silent):
        note = (
            "neither records what it computes: names, shapes and stored values are compared, and what a converter "
            "worked into the weights is not undone (--config-a and --config-b say what each is)"
        )
        return RawContents(a), RawContents(b), [note]
    if silent[0]:
        two = open_contents(b, config_b)
        return open_contents(a, _description_of(two)), two, [f"{a} records no architecture: read as {b} says"]
    one = open_contents(a, config_a)
    if silent[1]:
        return one, open_contents(b, _description_of(one)), [f"{b} records no architecture: read as {a} says"]
    return one, open_contents(b, config_b), []


def _description_of(contents: Contents) -> ModelConfig:
    """The config with which MaxText would hold that model; one that it held already stands for itself."""
    if contents.format in ("hf", "gguf"):
        return maxtext_form(contents.config)[0]
    return contents.config


def compare_contents(
    a: Contents,
    b: Contents,
    *,
    names: tuple[str, str] = ("a", "b"),
    values: bool = False,
    only: str = "params",
    atol: float = 1e-5,
    rtol: float = 1e-5,
) -> Comparison:
    """As `compare`, of what is open."""
    notes = _layouts(a, b, names) + _random_notes(a, b, names)
    found = []
    if a.config is not None:  # of raw checkpoints nothing is known
        b, rewritten = alike(a, b)
        notes += rewritten
        found = _configs(a, b)
    found += [Difference("only in a", key) for key in a.unused_keys()]
    found += [Difference("only in b", key) for key in b.unused_keys()]
    slots = [WEIGHTS]
    if only == "all":
        slots += sorted({*a.slots, *b.slots} - {WEIGHTS})
        found += _scalars(a, b)
    dtypes: dict[str, int] = {}
    compared = 0
    for slot in slots:
        ours, theirs = (list(x.addresses(slot)) if slot in x.slots else [] for x in (a, b))
        found += _one_sided(ours, theirs, slot)
        for path, layer in _order(a, b, ours, theirs):
            compared += 1
            one, two = (np.dtype(x.dtype(path, layer, slot)).name for x in (a, b))
            if one != two:
                dtypes[f"{one} | {two}"] = dtypes.get(f"{one} | {two}", 0) + 1
            left, right = (list(x.shape(path, layer, slot)) for x in (a, b))
            if left != right:
                found.append(Difference("shape", path, layer, slot, left, right))
            elif values:
                found += _values(a.read(path, layer, slot), b.read(path, layer, slot), path, layer, slot, atol, rtol)
    return Comparison(*names, compared, values, tuple(found), dtypes, tuple(notes))


def largest_difference(a: np.ndarray, b: np.ndarray, atol: float, rtol: float) -> dict[str, Any] | None:
    """Where two arrays of one shape differ most: index, both values, absolute, relative, count; None if they do not.

    relative is the largest |a - b| / |b| of the elements out of tolerance.
    """
    count, worst, relative, place = 0, -1.0, 0.0, 0
    one, two = a.reshape(-1), b.reshape(-1)
    for start in range(0, one.size, _PIECE):
        x, y = (_wide(part[start : start + _PIECE]) for part in (one, two))
        same = (x == y) | (np.isnan(x) & np.isnan(y))  # first: the difference of two infinities is no number
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            gap = np.where(same, 0.0, np.abs(x - y))
            gap = np.where(np.isnan(gap), np.inf, gap)
            outside = ~same & (np.isinf(gap) | (gap > atol + rtol * np.abs(y)))
            if not outside.any():
                continue
            share = np.where(outside, gap / np.abs(y), 0.0)
        share = np.where(np.isnan(share), np.inf, share)
        count += int(outside.sum())
        relative = max(relative, float(share.max()))
        at = int(np.where(outside, gap, -1.0).argmax())
        if gap[at] > worst:
            worst, place = float(gap[at]), start + at
    if not count:
        return None
    index = tuple(int(i) for i in np.unravel_index(place, a.shape)) if a.ndim else ()
    pair = {"a": _number(one[place]), "b": _number(two[place])}
    return {"index": index, "absolute": worst, "relative": relative, "count": count, **pair}


def _values(
    a: np.ndarray, b: np.ndarray, path: str, layer: int | None, slot: str, atol: float, rtol: float
) -> list[Difference]:
    found = largest_difference(np.asarray(a), np.asarray(b), atol, rtol)
    return [] if found is None else [Difference("values", path, layer, slot, **found)]


def _wide(part: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return part.astype(np.float64)


def _number(value: Any) -> Any:
    return float(value) if np.dtype(value.dtype).kind in "fV" else value.item()


def _configs(a: Contents, b: Contents) -> list[Difference]:
    """Settings in which what is computed differs.

    The name of the family chooses tables of keys; a limit on the length matters where positions are learned; layers are
    compared one by one, however they are grouped.
    """
    ours, theirs = a.config.model_dump(), b.config.model_dump()
    skipped = {"family", "leading_blocks", "pattern"} | ({"max_seq_len"} if a.config.position == "rope" else set())
    found = [
        Difference("config", name, a=ours[name], b=theirs[name])
        for name in ours
        if name not in skipped and ours[name] != theirs[name]
    ]
    kinds = zip(a.config.blocks, b.config.blocks, strict=False)
    different = [layer for layer, (one, two) in enumerate(kinds) if one != two]
    if different:
        one, two = (x.config.blocks[different[0]].model_dump(exclude_defaults=True) for x in (a, b))
        found.append(Difference("config", "kind of block", different[0], a=one, b=two, count=len(different)))
    return found


def _layouts(a: Contents, b: Contents, names: tuple[str, str]) -> list[str]:
    lines = []
    for contents, name in ((a, names[0]), (b, names[1])):
        layout = "no layout" if contents.scan_layers is None else f"scan_layers={contents.scan_layers}"
        facts = "".join(f"; {name}: {fact}" for name, fact in contents.facts.items())
        lines.append(f"{name}: {contents.format}, {layout}, optimizer {contents.optimizer or 'none'}{facts}")
    return lines


def _random_notes(a: Contents, b: Contents, names: tuple[str, str]) -> list[str]:
    """State of random numbers that only one side has."""
    ours, theirs = ({key for key in _extra(x) if RANDOM & set(key.split("/"))} for x in (a, b))
    lines = []
    for mine, other, name in ((ours, theirs, names[0]), (theirs, ours, names[1])):
        if mine and not other:
            lines.append(f"not counted: random numbers or dropout only in {name}: {', '.join(sorted(mine)[:3])}")
    return lines


def _extra(contents: Contents) -> set[str]:
    return {*contents.ignored_keys(), *contents.scalars}


def _scalars(a: Contents, b: Contents) -> list[Difference]:
    ours, theirs = a.scalars, b.scalars
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        if RANDOM & set(name.split("/")):
            continue
        one, two = (np.asarray(x[name]).tolist() if name in x else None for x in (ours, theirs))
        if one != two and not (one != one and two != two):
            found.append(Difference("scalar", name, a=one, b=two))
    return found


def _one_sided(ours: list[Address], theirs: list[Address], slot: str) -> list[Difference]:
    left, right = set(ours), set(theirs)
    found = [Difference("only in a", path, layer, slot) for path, layer in ours if (path, layer) not in right]
    return found + [Difference("only in b", path, layer, slot) for path, layer in theirs if (path, layer) not in left]


def _order(a: Contents, b: Contents, ours: list[Address], theirs: list[Address]) -> list[Address]:
    """What both have, in the order of the side whose layers are stacked: its stacks are then read once."""
    order, others = (theirs, set(ours)) if b.scan_layers and not a.scan_layers else (ours, set(theirs))
    return [address for address in order if address in others]


def _plain(value: Any) -> Any:
    """As JSON has it: NaN and infinities as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value
