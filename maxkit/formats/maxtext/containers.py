# SPDX-License-Identifier: Apache-2.0
"""Which container of a MaxText tree holds which layer: one table, scanned, unrolled and with numbers for names.

A `Run` is a number of consecutive layers that lie in containers of one pattern. In a pattern

    {n}  is the layer's number, counted from where the run begins
    {c}  its place in a cycle of layers that are scanned together, n % cycle
    {b}  the number of that cycle, n // cycle

and a scanned run stacks its cycles on one more axis of every array (`param_scan_axis`, 1 by default; on axis 0 of what
is no parameter). Leaf names below a container: `rows.py`.
"""

from typing import NamedTuple

from maxkit.models.config import ModelConfig


class Run(NamedTuple):
    """`num_layers` layers in containers named by `pattern`. suffixes: of the layers that one container merges."""

    pattern: str
    num_layers: int
    stacked: bool
    cycle: int = 1
    suffixes: tuple[str, ...] = ("",)

    @property
    def repeats(self) -> int:
        """The length of the layer axis, of a stacked run."""
        return self.num_layers // self.cycle


class Slot(NamedTuple):
    """Where a layer is: container, suffix of its leaves, row on the layer axis of `repeats` (None: no axis)."""

    container: str
    suffix: str
    row: int | None
    repeats: int


Scheme = tuple[Run, ...]

_PAIR = ("_local", "_global")  # of Gemma 2's two layers in one container
# Decoder blocks whose scanned layers are cycles of the named ones.
CYCLES = {"gemma3": 6, "gpt_oss": 2, "olmo3": 4}


def schemes(block: str, config: ModelConfig, cycle: int | None = None) -> dict[str, Scheme]:
    """{"scanned" | "unrolled" | "numbered": runs} of a model. cycle: `inhomogeneous_layer_cycle_interval`, if known.

    "numbered" is the form of plain NNX state: a mapping from the layer's number, which Orbax gives back as text.
    """
    count = config.num_layers
    if block == "deepseek":
        dense = len([spec for spec in config.blocks if spec.mlp == "dense"])
        return {
            "scanned": (Run("dense_layers", dense, True), Run("moe_layers", count - dense, True)),
            "unrolled": (Run("dense_layers_{n}", dense, False), Run("moe_layers_{n}", count - dense, False)),
            "numbered": (Run("dense_layers/{n}", dense, False), Run("moe_layers/{n}", count - dense, False)),
        }
    if block == "gemma2":
        return {
            "scanned": (Run("layers", count, True, 2, _PAIR),),
            "unrolled": (Run("layers_{b}", count, False, 2, _PAIR),),
            "numbered": (Run("layers/{b}", count, False, 2, _PAIR),),
        }
    unrolled: dict[str, Scheme] = {
        "unrolled": (Run("layers_{n}", count, False),),
        "numbered": (Run("layers/{n}", count, False),),
    }
    if block not in CYCLES:
        return {"scanned": (Run("layers", count, True),), **unrolled}
    cycle = cycle or CYCLES[block]
    whole = count // cycle * cycle
    rest = Run("layers_remainder/layers_{n}", count - whole, False)
    return {"scanned": (Run("layers/layers_{c}", whole, True, cycle), rest), **unrolled}


def slots(scheme: Scheme) -> list[Slot]:
    """One for each layer of the model, in order."""
    found = []
    for run in scheme:
        for n in range(run.num_layers):
            name = run.pattern.format(n=n, c=n % run.cycle, b=n // run.cycle)
            suffix = run.suffixes[n % len(run.suffixes)]
            found.append(Slot(f"decoder/{name}", suffix, n // run.cycle if run.stacked else None, run.repeats))
    return found
