# SPDX-License-Identifier: Apache-2.0
"""Plans of the TPU compiler for the tutorial: their memory and traffic drawn, three floors of a step's time.

Takes `plan.Plan`s as they are, from a compile or from `plan/examples.py`; nothing here compiles.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch

from maxkit.mesh_axes import parse_sizes
from maxkit.nb.figures import COLOURS, FAINT, INK, STYLE, Figure, finish

GIB = 1 << 30


class Rates(NamedTuple):
    """What a chip does per second at most, as its maker publishes it: FLOPs, bytes of HBM, bytes in over its links."""

    flops: float
    hbm: float
    links: float
    source: str


# The links' published rate counts both directions; half of it comes in.
RATES = {
    "TPU v5 lite": Rates(197e12, 819e9, 400e9 / 2, "https://cloud.google.com/tpu/docs/v5e"),
}


# --- memory -----------------------------------------------------------------------------------


def parts(plan: Any) -> dict[str, float]:
    """GiB of HBM per device by what they hold; where the compiler refused, all that is not counted from shapes is one.

    They add up to what is needed at the fullest moment.
    """
    memory = plan.memory
    known = {"weights": memory.params + memory.teacher, "optimizer": memory.optimizer}
    rest = plan.required_bytes - sum(known.values())
    name = "everything else" if memory.peak else "not told (refused)"
    return {part: size / GIB for part, size in (known | {name: rest}).items()}


def memory_figure(plans: Mapping[str, Any], *, title: str) -> Figure:
    """A bar per plan: what a device needs at the fullest moment, against what it has."""
    colours = {
        "weights": COLOURS[0],
        "optimizer": COLOURS[5],
        "everything else": COLOURS[4],
        "not told (refused)": FAINT,
    }
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 1.5 + 0.42 * len(plans)), layout="constrained", facecolor="white")
        axes = canvas.add_subplot(facecolor="white")
        axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
        capacity = min(plan.available_bytes for plan in plans.values()) / GIB
        used = []
        for y, plan in enumerate(plans.values()):
            start = 0.0
            for part, size in parts(plan).items():
                hatch = "////" if part.startswith("not") else None
                axes.barh(y, size, 0.64, left=start, color=colours[part], hatch=hatch, edgecolor="white", linewidth=0.6)
                used.append(part)
                start += size
            fits = "" if plan.fits else "  does not fit"
            axes.text(
                start, y, f" {start:.1f}{fits}", va="center", fontsize=9.5, color=INK if plan.fits else COLOURS[1]
            )
        axes.axvline(capacity, color=COLOURS[1], linestyle="--", linewidth=1.6)
        axes.text(
            capacity, -0.78, f"{capacity:.2f} GiB are there ", ha="right", va="center", fontsize=9, color=COLOURS[1]
        )
        axes.set_yticks(range(len(plans)), list(plans), fontsize=9.5)
        axes.set_ylim(len(plans) - 0.5, -1.15)
        axes.margins(x=0.16)
        _only_x_counts(axes, "GiB of HBM per chip")
        keys = [Patch(facecolor=c, hatch="////" if "not" in n else None, edgecolor="white", label=n)
                for n, c in colours.items() if n in used]  # fmt: skip
        canvas.legend(handles=keys, frameon=False, fontsize=9, loc="outside lower right", ncols=len(keys))
        told = [
            f"{name} {sum(parts(plan).values()):.1f}{'' if plan.fits else ' (refused)'}" for name, plan in plans.items()
        ]
        return finish(canvas, f"Bars, {title}: GiB per chip, {capacity:.2f} are there: " + ", ".join(told) + ".")


def _only_x_counts(axes: Any, label: str) -> None:
    """Horizontal bars: a grid and a label for what they measure, nothing else around them."""
    axes.set_xlim(left=0)
    axes.set_xlabel(label, fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


# --- traffic ----------------------------------------------------------------------------------


def traffic_figure(plans: Mapping[str, Any], *, title: str) -> Figure:
    """A bar per plan: what an update sends, by kind of collective, in GiB per device."""
    opcodes = sorted({kind.opcode for plan in plans.values() for kind in plan.collectives})
    colours = dict(zip(opcodes, COLOURS, strict=False))
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 1.4 + 0.4 * len(plans)), layout="constrained", facecolor="white")
        axes = canvas.add_subplot(facecolor="white")
        axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
        told = []
        for y, (name, plan) in enumerate(plans.items()):
            start = 0.0
            for kind in sorted(plan.collectives, key=lambda kind: kind.opcode):
                size = kind.bytes / GIB
                axes.barh(y, size, 0.64, left=start, color=colours[kind.opcode], edgecolor="white", linewidth=0.6)
                start += size
            axes.text(start, y, f" {start:.1f}", va="center", fontsize=9.5)
            told.append(f"{name} {start:.1f}")
        axes.set_yticks(range(len(plans)), list(plans), fontsize=9.5, family="monospace")
        axes.set_ylim(len(plans) - 0.5, -0.6)
        axes.margins(x=0.1)
        _only_x_counts(axes, "GiB per chip and update, counted as whole arrays")
        keys = [Patch(color=c, label=n) for n, c in colours.items()]
        canvas.legend(handles=keys, frameon=False, fontsize=9, loc="outside lower right", ncols=len(keys))
        return finish(canvas, f"Bars, {title}: GiB sent per chip and update: " + ", ".join(told) + ".")


# --- time -------------------------------------------------------------------------------------


def floors(plan: Any) -> dict[str, float]:
    """Three lower bounds of an update's seconds, at published rates; the step takes longer than the longest of them.

    compute: the FLOPs of the model, at the dense bfloat16 peak. memory: every argument is read and every output written
    once. links: what a device must receive, of a collective over n devices (n - 1) / n of the array, for an all-reduce
    twice that, of a permutation all; n is the smallest axis of the mesh, so that it stays a bound where axes are mixed.

    Raises:
        KeyError: no rates are known for the chip.
    """
    rates = RATES[plan.device_kind]
    group = min((size for size in mesh_sizes(plan).values() if size > 1), default=1)
    share = (group - 1) / group
    shares = {"all-reduce": 2 * share, "collective-permute": 1}
    received = sum(shares.get(kind.opcode, share) * kind.bytes for kind in plan.collectives)
    return {
        "compute": plan.flops_per_step / plan.num_devices / rates.flops,
        "memory": (plan.memory.arguments + plan.memory.output) / rates.hbm,
        "links": received / rates.links,
    }


def mesh_sizes(plan: Any) -> dict[str, int]:
    """{axis: devices} of a plan's mesh; {} on one device."""
    return dict(parse_sizes(plan.mesh)) if plan.num_devices > 1 else {}


def floors_figure(plans: Mapping[str, Any], *, title: str) -> Figure:
    """Three bars per plan: the floors of an update's time, in milliseconds."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 1.5 + 0.62 * len(plans)), layout="constrained", facecolor="white")
        axes = canvas.add_subplot(facecolor="white")
        axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
        told = []
        for y, (name, plan) in enumerate(plans.items()):
            found = {kind: 1e3 * seconds for kind, seconds in floors(plan).items() if seconds}
            for number, (kind, value) in enumerate(found.items()):
                place = y + 0.26 * (number - 1)
                axes.barh(place, value, 0.24, color=COLOURS[list(FLOORS).index(kind)])
                axes.text(value, place, f" {value:,.1f}", va="center", fontsize=8.5)
            told.append(f"{name} " + ", ".join(f"{kind} {value:.0f}" for kind, value in found.items()))
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_yticks(range(len(plans)), list(plans), fontsize=9.5)
        axes.set_ylim(len(plans) - 0.45, -0.55)
        axes.set_xlabel("milliseconds per update, at least (estimated from published rates)", fontsize=9.5)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="x", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        keys = [Patch(color=COLOURS[i], label=text) for i, text in enumerate(FLOORS.values())]
        canvas.legend(handles=keys, frameon=False, fontsize=9, loc="outside lower right", ncols=3)
        return finish(canvas, f"Bars, {title}, in ms: " + "; ".join(told) + ".")


FLOORS = {"compute": "FLOPs at the peak", "memory": "state through HBM once", "links": "collectives over the links"}
