# SPDX-License-Identifier: Apache-2.0
"""Sharding on simulated devices for the tutorial: who holds what, and what a training step sends, in numbers and drawn.

Every picture is read from the arrays' own shardings and from the compiled program (`plan/hlo.py`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, Sharding
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch, Rectangle

from maxkit import mesh as meshes
from maxkit.errors import UserError
from maxkit.models.config import Execution, ModelConfig
from maxkit.models.definition import ModelDefinition
from maxkit.nb.architecture import random_values
from maxkit.nb.figures import COLOURS, FAINT, INK, STYLE, Figure, finish
from maxkit.nb.scan_tour import random_batch
from maxkit.objectives.next_token import NextToken
from maxkit.train.step import train_step
from maxkit.types import TrainState

OPCODES = dict(zip(("all-gather", "reduce-scatter", "all-reduce", "all-to-all"), COLOURS, strict=False))


def simulate_devices(count: int) -> list[jax.Device]:
    """Make the CPU look like `count` devices; each is a part of this process with memory of its own.

    Raises:
        UserError: JAX has already counted its devices, which it does once.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)  # first: it is refused when JAX has started
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        pass  # it has started; what it found may be enough
    if jax.device_count() != count or jax.default_backend() != "cpu":
        found = f"{jax.device_count()} {jax.default_backend()} devices"
        raise UserError(f"{count} CPU devices are asked for, but JAX has started with {found}: restart the kernel")
    return jax.devices()


# --- who holds what ---------------------------------------------------------------------------


def parts(sharding: Sharding, shape: Sequence[int]) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """{the part of an array, as (start, stop) of each dimension: the numbers of the devices that hold it}."""
    held: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for device, index in sharding.devices_indices_map(tuple(shape)).items():
        part = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
        held.setdefault(part, []).append(int(getattr(device, "id")))  # noqa: B009 - its stub lacks it
    return held


def held_bytes(definition: ModelDefinition, mesh: Mesh) -> int:
    """The bytes of the weights that one device holds."""
    return sum(
        p.dtype.itemsize * math.prod(meshes.weight_sharding(p.letters, p.shape, mesh).shard_shape(p.shape))
        for p in definition.parameters.values()
    )


def holdings_figure(
    descriptions: Sequence[str], arrays: Mapping[str, tuple[str, Sequence[int]]], *, title: str
) -> Figure:
    """A row per array, {name: (letters, shape)}, a column per mesh: its parts and the devices that hold each.

    Letters that begin with B are activations, others weights; two dimensions each.
    """
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 0.6 + 1.95 * len(arrays)), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        grid = canvas.subplots(len(arrays), len(descriptions), squeeze=False)
        told = []
        for row, (name, (letters, shape)) in enumerate(arrays.items()):
            for axes, description in zip(grid[row], descriptions, strict=True):
                mesh = meshes.make_mesh(description)
                sharding: NamedSharding = meshes.weight_sharding(letters, shape, mesh)
                if letters.startswith("B"):
                    sharding = meshes.batch_sharding(mesh)
                held = parts(sharding, shape)
                _draw_parts(axes, held, shape)
                axes.set_title(description if row == 0 else "", fontsize=10, family="monospace")
                told.append(len(held))
            grid[row][0].set_ylabel(f"{name}\n{letters[0]} = {shape[0]}", fontsize=9)
            for axes in grid[row]:
                axes.set_xlabel(f"{letters[1]} = {shape[1]}", fontsize=8.5, labelpad=2)
        split = [told[i : i + len(descriptions)] for i in range(0, len(told), len(descriptions))]
        words = [f"{name} in {', '.join(map(str, counts))} parts" for name, counts in zip(arrays, split, strict=True)]
        return finish(canvas, f"Diagram, {title}: for {', '.join(descriptions)}: {'; '.join(words)}.")


def _draw_parts(axes: Axes, held: Mapping[tuple[tuple[int, int], ...], list[int]], shape: Sequence[int]) -> None:
    tints = matplotlib.colormaps["YlGnBu"](np.linspace(0.12, 0.68, 8))
    for ((top, bottom), (left, right)), devices in held.items():
        colour = tints[devices[0] % 8] if len(held) > 1 else "#e8eaed"
        box = (left / shape[1], top / shape[0]), (right - left) / shape[1], (bottom - top) / shape[0]
        axes.add_patch(Rectangle(*box, facecolor=colour, edgecolor=INK, lw=0.9))
        label = f"all {len(devices)}" if len(held) == 1 else ",".join(map(str, devices))
        narrow = box[1] < 0.2 and len(label) > 2
        axes.text(box[0][0] + box[1] / 2, box[0][1] + box[2] / 2, label, ha="center", va="center", fontsize=8,
                  rotation=90 if narrow else 0, color="white" if len(held) > 1 and devices[0] > 5 else INK)  # fmt: skip
    axes.set(xlim=(-0.01, 1.01), ylim=(1.01, -0.01), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


# --- what a step sends ------------------------------------------------------------------------


def run_step(
    config: ModelConfig,
    description: str,
    read: Callable[[str], Iterable[Any]],
    *,
    rows: int,
    length: int,
    devices: int | None = None,
) -> dict[str, Any]:
    """One training step (SGD) on a mesh: "mesh", "held" bytes of weights per device, "loss", {opcode: bytes} as "sent".

    read: `plan.hlo.collectives`, which finds them in the compiled program's text; bytes per device and step, as counted
    there. The weights are the same for every mesh.
    """
    mesh = meshes.make_mesh(description, jax.devices()[:devices])
    # Unrolled: a loop's body stands once in the program, and its trips are written differently by each compiler.
    definition = ModelDefinition(config, Execution(scan_layers=False))
    optimizer = optax.sgd(0.01)
    with jax.set_mesh(mesh):
        params = jax.device_put(random_values(definition, 0), definition.shardings(mesh))
        batch = jax.device_put(random_batch(config, rows, length), meshes.batch_sharding(mesh))
        whole = meshes.replicated(mesh)
        step, key = jax.device_put((jnp.zeros((), jnp.int32), jax.random.key(0)), whole)
        state = TrainState(step, params, {}, optimizer.init(params), key)
        compiled = jax.jit(train_step(definition, NextToken(num_tiles=1), optimizer)).lower(state, batch).compile()
        loss = float(compiled(state, batch)[1]["loss"])
    found = list(read(compiled.as_text()))
    return {
        "mesh": description or "1 device",
        "tokens": rows * length,
        "held": held_bytes(definition, mesh),
        "loss": loss,
        "sent": {kind.opcode: kind.bytes for kind in found},
        "runs": {kind.opcode: kind.runs for kind in found},
    }


def traffic_figure(rows: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """For each mesh of `run_step`: the weights that a device holds, and what a step sends, by kind of collective."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 1.4 + 0.34 * len(rows)), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        left, right = canvas.subplots(1, 2, sharey=True, width_ratios=(1, 1.6))
        used = [name for name in OPCODES if any(name in row["sent"] for row in rows)]
        for y, row in enumerate(rows):
            left.barh(y, row["held"] / 1e3, 0.66, color="#80868b")
            left.text(row["held"] / 1e3, y, f" {row['held'] / 1e3:,.0f}", va="center", fontsize=9)
            start = 0.0
            for name in used:
                width = row["sent"].get(name, 0) / 1e3
                right.barh(y, width, 0.66, left=start, color=OPCODES[name])
                start += width
            right.text(start, y, f" {start:,.0f}", va="center", fontsize=9)
        left.set_yticks(range(len(rows)), [row["mesh"] for row in rows], family="monospace", fontsize=9)
        left.set_ylim(len(rows) - 0.5, -0.5)
        for axes, label in ((left, "a device holds (kB of weights)"), (right, "a step sends (kB per device)")):
            axes.set_title(label, loc="left", fontsize=10)
            axes.margins(x=0.2)
            axes.set_xlim(left=0)
            axes.tick_params(axis="y", length=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(True, axis="x", color=FAINT, linewidth=0.7)
            axes.set_axisbelow(True)
        keys = [Patch(color=OPCODES[name], label=name) for name in used]
        canvas.legend(handles=keys, frameon=False, fontsize=9, loc="outside lower right", ncols=len(keys))
        told = [f"{r['mesh']} {r['held'] / 1e3:.0f} and {sum(r['sent'].values()) / 1e3:.0f}" for r in rows]
        return finish(canvas, f"Bars, {title}: kB held and sent: " + "; ".join(told) + ".")
