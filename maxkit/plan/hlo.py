# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler's texts say: the collectives of a program, and why one does not fit. No JAX.

A count of words would be wrong in every direction: an asynchronous collective is written as a start, a done
and steps fused into the work between them; reduce-scatter exists only as a fusion called all-reduce-scatter;
a loop's body stands there once. What belongs together shares a channel number, so channels are counted, and
a loop's trip count is read from its condition.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable

OPCODES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# The others carry their width in their name: f32, s8, f8e4m3fn.
_BITS = {"pred": 8, "bf16": 16}
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_COLLECTIVE = re.compile(rf"\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ({'|'.join(OPCODES)})(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|bf16|[suf](\d+)\w*)\[([\d,]*)\]")
# Both wordings of libtpu: the total in one sentence, and "Used 20.1G of 15.75G hbm".
_NO_ROOM = (
    re.compile(r"memory required[^(]*\(([\d.]+[KMGTP]?)\) exceeds available HBM \(([\d.]+[KMGTP]?)"),
    re.compile(r"Used ([\d.]+[KMGTP]?) of ([\d.]+[KMGTP]?) hbm", re.IGNORECASE),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication: how often it stands in the program, runs in a step, and what a step moves.

    bytes: per device and step, of the whole arrays: gathered for all-gather, before scattering for
    reduce-scatter, the array itself for the others.
    """

    opcode: str
    ops: int
    runs: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The collectives of an optimised HLO module, most bytes first."""
    computations, entry = _computations(text)
    runs = _runs(computations, entry)
    found: dict[tuple[str, str, str], int] = {}  # (opcode, where it loops, channel) to bytes
    under_way: dict[tuple[str, str, str], int] = {}  # the same of steps fused into other work
    homes = _homes(computations, entry)
    for name, lines in computations.items():
        seen = under_way if name.startswith("async_collective_fusion") else found
        for line in lines:
            match = _COLLECTIVE.match(line)
            if match is None or name not in homes:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            opcode = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[3]
            key = (opcode, homes[name], channel[1] if channel else match[1])
            seen[key] = max(seen.get(key, 0), _bytes(match[2], started=f"{match[3]}-start(" in line))
    # What begins and ends outside a loop may be under way in its body: it does not run again in every turn.
    begun = {(opcode, channel) for opcode, _, channel in found}
    found |= {key: size for key, size in under_way.items() if (key[0], key[2]) not in begun}
    kinds = []
    for opcode in OPCODES:
        mine = {key: size for key, size in found.items() if key[0] == opcode}
        if mine:
            times = [runs[home] for _, home, _ in mine]
            moved = sum(runs[home] * size for (_, home, _), size in mine.items())
            kinds.append(Collective(opcode, len(mine), sum(times), moved))
    return sorted(kinds, key=lambda kind: -kind.bytes)


def out_of_memory(message: str) -> tuple[int, int] | None:
    """(required, available) bytes of HBM out of a RESOURCE_EXHAUSTED message; None for other messages."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _NO_ROOM:
        match = pattern.search(message)
        if match:
            return _size(match[1]), _size(match[2])
    return None


def _size(text: str) -> int:
    """`15.75G` in bytes; the compiler counts in powers of 1024."""
    unit = text[-1] if text[-1].isalpha() else ""
    return round(float(text.removesuffix(unit)) * 1024 ** " KMGTP".index(unit or " "))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """{name: its lines} and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            lines = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


def _callees(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        yield from _CALLED.findall(line)
        for group in _BRANCHES.findall(line):
            yield from re.findall(r"[\w.\-]+", group)


def _loops(computations: dict[str, list[str]]) -> dict[str, int]:
    """{body: trip count}; a loop that does not count up to a constant is taken to run once."""
    trips = {}
    for lines in computations.values():
        for line in lines:
            match = _WHILE.search(line)
            if match:
                condition = "\n".join(computations.get(match[1], ()))
                limits = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", condition)
                counted = len(limits) == 1 and "direction=LT" in condition
                trips[match[2]] = int(limits[0]) if counted else 1
    return trips


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often a step runs each computation that is the entry or the body of a loop."""
    trips, runs = _loops(computations), defaultdict(int)

    def visit(name: str, times: int) -> None:
        times *= trips.get(name, 1)
        if name == entry or name in trips:
            runs[name] += times
        for callee in _callees(computations.get(name, ())):
            visit(callee, times)

    visit(entry, 1)
    return runs


def _homes(computations: dict[str, list[str]], entry: str) -> dict[str, str]:
    """{computation: the innermost loop body that it is part of, or the entry}, of what the entry reaches."""
    trips, homes = _loops(computations), {}
    queue = [(entry, entry)]
    while queue:
        name, home = queue.pop()
        if name in homes:
            continue
        home = name if name in trips else home
        homes[name] = home
        queue += [(callee, home) for callee in _callees(computations.get(name, ()))]
    return homes


def _bytes(shape: str, *, started: bool) -> int:
    """Of the arrays of a shape; a started operation shows operands and results, the larger is the whole."""
    sizes = [
        math.prod(int(dim) for dim in dims.split(",") if dim) * (_BITS.get(kind) or int(bits)) // 8
        for kind, bits, dims in _ARRAY.findall(shape)
    ]
    return max(sizes, default=0) if started else sum(sizes)
