# SPDX-License-Identifier: Apache-2.0
"""What a plan found, as text and as JSON. No JAX."""

import dataclasses
from typing import Any

from maxkit.plan.hlo import Collective

GIB = 1 << 30
FLOPS_FORMULA = (
    "6 per weight and token, 4 for frozen ones, 2 for a teacher's, and attention over the keys that are seen; "
    "recomputation is not counted"
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM per device: params, optimizer, batch and teacher counted from shapes, the others the compiler's own.

    arguments = params + optimizer + batch + teacher (one that runs in every update) and some scalars; aliased is the
    part of the output that reuses arguments (the state is donated). temporaries is the sum of places that the compiler
    set aside, peak what is in use at the fullest moment, arguments included. Places are shared, also with arguments
    that are not needed any more, so peak can be less than the sum, and programs whose sum exceeds the HBM do compile.
    But peak also counts the chip's fast memory beside the HBM (VMEM), so of a small program it is more than the sum.
    """

    params: int
    optimizer: int
    batch: int
    arguments: int | None = None
    temporaries: int | None = None
    output: int | None = None
    aliased: int | None = None
    code: int | None = None
    teacher: int = 0
    peak: int | None = None

    @property
    def needed(self) -> int:
        """What a compiled step needs of the HBM at most: the smaller of peak and the sum."""
        return min(self.peak, self.arguments + self.temporaries + self.output - self.aliased + self.code)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The verdict of the TPU compiler on one training step.

    required_bytes, available_bytes: HBM per device (`Memory.needed`); where it does not fit, out of the compiler's
        refusal.
    flops_per_step: over all devices, counted from the architecture, see `FLOPS_FORMULA`.
    least_seconds_per_step: flops_per_step at the published dense bfloat16 peak: a bound, no prediction.
        None where no peak is known.
    attention: which kernels compute it, in how many layers, and why.
    """

    recipe: str
    topology: str
    device_kind: str
    num_devices: int
    mesh: str
    parameters: dict[str, Any]
    scan_layers: bool
    num_params: int
    tokens_per_step: int
    fits: bool
    refusal: str | None
    required_bytes: int | None
    available_bytes: int | None
    memory: Memory
    collectives: tuple[Collective, ...]
    flops_per_step: float
    least_seconds_per_step: float | None
    unsharded: tuple[str, ...]
    seconds: dict[str, float]
    versions: dict[str, str]
    attention: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(record: dict[str, Any]) -> "Plan":
        """The inverse of `to_dict`."""
        collectives = tuple(Collective(**one) for one in record["collectives"])
        rest = {"memory": Memory(**record["memory"])} | {
            name: tuple(record[name]) for name in ("unsharded", "attention")
        }
        return Plan(**record | rest | {"collectives": collectives})

    def lines(self) -> list[str]:
        """For people: the verdict first."""
        return [
            self._verdict(),
            f"{self.recipe}: {self.num_params:,} weights, {self.tokens_per_step:,} tokens per update, "
            f"layers {'scanned' if self.scan_layers else 'unrolled'}"
            + "".join(f", {name}={value}" for name, value in self.parameters.items()),
            f"{self.num_devices} x {self.device_kind}, mesh {self.mesh}",
            *(f"  {line}" for line in self.unsharded),
            *(f"attention: {line}" for line in self.attention),
            "",
            *self._memory_lines(),
            "",
            *self._collective_lines(),
            "",
            *self._work_lines(),
        ]

    def _verdict(self) -> str:
        if self.fits:
            used = _in(self.required_bytes, "GiB")
            of = f" of {_in(self.available_bytes, 'GiB')}" if self.available_bytes else ""
            return f"FITS on {self.topology}: {used}{of} GiB of HBM per device"
        if self.required_bytes:
            need, have = _in(self.required_bytes, "GiB"), _in(self.available_bytes, "GiB")
            return f"DOES NOT FIT on {self.topology}: needs {need} GiB of HBM per device, {have} are there"
        return f"DOES NOT FIT on {self.topology}: {self.refusal}"

    def _memory_lines(self) -> list[str]:
        m = self.memory
        unit = _unit(m.arguments or m.params)
        reused = f"of which {_in(m.aliased, unit)} reuse arguments"
        rows = [
            ("arguments", m.arguments, ""),
            ("  weights", m.params, ""),
            ("  optimizer state", m.optimizer, ""),
            ("  teacher", m.teacher or None, "read, neither trained nor saved"),
            ("  batch", m.batch, "what is missing to the sum is padding to the tiles of the chip"),
            ("temporaries", m.temporaries, ""),
            ("output", m.output, reused),
            ("code", m.code, ""),
            ("fullest moment", m.peak, "of HBM and fast memory together; places are shared"),
        ]
        shown = [(name, size, note) for name, size, note in rows if size is not None]
        return [f"HBM per device {unit:>15}"] + [
            f"  {name:<18} {_in(size, unit):>9}  {note}".rstrip() for name, size, note in shown
        ]

    def _collective_lines(self) -> list[str]:
        if not self.fits:
            return ["collectives: not known, the program was not built"]
        if not self.collectives:
            return ["collectives: none"]
        unit = _unit(self.collectives[0].bytes)
        return [f"collectives            ops  runs/step  {unit}/step per device"] + [
            f"  {c.opcode:<18} {c.ops:>5} {c.runs:>10} {_in(c.bytes, unit):>9}" for c in self.collectives
        ]

    def _work_lines(self) -> list[str]:
        work = f"{self.flops_per_step:.3g} FLOPs per update ({FLOPS_FORMULA})"
        if self.least_seconds_per_step is not None:
            work += f"; {self.least_seconds_per_step:.3g} s at the published bfloat16 peak, a lower bound"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        spent = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        return [work, f"compiled here, run nowhere: {spent} ({versions})"]


def _unit(size: int) -> str:
    """The unit in which a table is readable whose main row is `size`."""
    return "GiB" if size >= GIB // 10 else "MiB"


def _in(size: int | None, unit: str) -> str:
    """A size without its unit."""
    if size is None:
        return "?"
    value = size / (GIB if unit == "GiB" else GIB >> 10)
    return "<0.01" if 0 < value < 0.005 else f"{value:.2f}"
