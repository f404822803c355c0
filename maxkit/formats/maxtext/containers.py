# SPDX-License-Identifier: Apache-2.0
"""Which container of a MaxText tree holds which layer: one table, scanned, unrolled and with numbers for names.

A `Run` is a number of consecutive layers that lie in containers of one pattern. In a pattern

    {n}  is the layer's number, counted from where the run begins
    {c}  its place in a cycle of layers that are scanned together, n % cycle
    {b}  the number of that cycle, n // cycle

and a scanned run stacks its cycles on one more axis of every array (`param_scan_axis`, 1 by default; on axis 0 of what
is no parameter). A nested run has all layers of a cycle but the last in one container, on a second axis behind the
first. Leaf names below a container: `rows.py`.
"""

from typing import Any, NamedTuple

from maxkit.models.config import ModelConfig


class Run(NamedTuple):
    """`num_layers` layers in containers named by `pattern`. suffixes: of the layers that one container merges.

    last: of a nested run, the container of the last layer of every cycle.
    """

    pattern: str
    num_layers: int
    stacked: bool
    cycle: int = 1
    suffixes: tuple[str, ...] = ("",)
    last: str | None = None

    def slot(self, n: int) -> "Slot":
        """Where layer number `n` of the run is."""
        b, c = divmod(n, self.cycle)
        is_last = self.last is not None and c == self.cycle - 1
        name = self.last if self.last is not None and is_last else self.pattern.format(n=n, c=c, b=b)
        rows, lengths = ((b,), (self.num_layers // self.cycle,)) if self.stacked else ((), ())
        if self.last is not None and not is_last:
            rows, lengths = (*rows, c), (*lengths, self.cycle - 1)
        return Slot(f"decoder/{name}", self.suffixes[n % len(self.suffixes)], rows, lengths)


class Slot(NamedTuple):
    """Where a layer is: container, suffix of its leaves, row on each layer axis, and these axes' lengths."""

    container: str
    suffix: str
    rows: tuple[int, ...]
    lengths: tuple[int, ...]


Scheme = tuple[Run, ...]

_PAIR = ("_local", "_global")  # of Gemma 2's two layers in one container
# Decoder blocks whose scanned layers are cycles of the named ones.
CYCLES = {"gemma3": 6, "gpt_oss": 2, "olmo3": 4, "llama4": 1, "qwen3_next": 4}


def cycle_of(block: str, settings: dict[str, Any]) -> int:
    """How many layers are scanned together: `inhomogeneous_layer_cycle_interval`, or what the block does without it."""
    interval = int(settings.get("inhomogeneous_layer_cycle_interval", 1))
    return interval if interval > 1 else CYCLES.get(block, 1)


def schemes(block: str, config: ModelConfig, cycle: int) -> dict[str, Scheme]:
    """{"scanned" | "unrolled" | "numbered": runs} of a model; the first is what is written. cycle: `cycle_of`.

    "numbered" is the form of plain NNX state: a mapping from the layer's number, which Orbax gives back as text.
    "scanned flat" is how releases up to 0.2.4 scanned Qwen3-Next.
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
    whole = count // cycle * cycle
    if block == "qwen3_next":
        nested = Run("layers/local_layers", whole, True, cycle, last="layers/global_layer")
        rest = Run("layers_remainder/local_layers", count - whole, True)
        flat = {} if count % cycle else {"scanned flat": (Run("layers/layer_{c}", count, True, cycle),)}
        return {"scanned": (nested, rest), **flat, **unrolled}
    rest = Run("layers_remainder/layers_{n}", count - whole, False)
    return {"scanned": (Run("layers/layers_{c}", whole, True, cycle), rest), **unrolled}


def slots(scheme: Scheme) -> list[Slot]:
    """One for each layer of the model, in order."""
    return [run.slot(n) for run in scheme for n in range(run.num_layers)]
