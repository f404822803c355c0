# SPDX-License-Identifier: Apache-2.0
"""Scanned beside unrolled for the tutorial: one training step at growing depth, compiled and run, and its picture.

Times are CPU seconds of this process, over all threads: they hardly depend on what else the machine does.
"""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from maxkit.models.config import Execution, ModelConfig
from maxkit.models.definition import ModelDefinition
from maxkit.nb.architecture import random_values
from maxkit.nb.figures import COLOURS, FAINT, STYLE, Figure, finish
from maxkit.objectives.next_token import NextToken
from maxkit.train.step import train_step
from maxkit.types import Batch, TrainState

LAYOUTS = {True: "scanned", False: "unrolled"}


def with_layers(config: ModelConfig, num_layers: int) -> ModelConfig:
    """The same model, deeper or shallower."""
    return ModelConfig.model_validate(config.model_dump() | {"num_layers": num_layers})


def random_batch(config: ModelConfig, rows: int, length: int, seed: int = 0) -> Batch:
    """Random tokens, all trained, one segment a row."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length + 1)).astype(np.int32)
    ones = jnp.ones((rows, length), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), ones.astype(jnp.float32), ones, positions)


def measure(config: ModelConfig, scan_layers: bool, batch: Batch, *, runs: int = 5) -> dict[str, Any]:
    """One training step (SGD): what it takes to compile and to run, and what it is made of.

    "trace", "compile", "step": CPU seconds to StableHLO, from there to machine code, and of the median run.
    "lines": of the StableHLO text, which is what the compiler reads. "arrays": in a checkpoint of the weights.
    "memory": bytes of temporary buffers, as the compiler planned them. "loss": of the first step.
    """
    definition = ModelDefinition(config, Execution(scan_layers=scan_layers))
    optimizer = optax.sgd(0.01)
    params = random_values(definition, 0)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params), jax.random.key(0))
    start = time.process_time()
    lowered = jax.jit(train_step(definition, NextToken(num_tiles=1), optimizer)).lower(state, batch)
    traced = time.process_time()
    compiled = lowered.compile()
    done = time.process_time()
    loss, seconds = None, []
    for _ in range(runs):
        begin = time.process_time()
        _, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        seconds.append(time.process_time() - begin)
    return {
        "layers": config.num_layers,
        "layout": LAYOUTS[scan_layers],
        "trace": traced - start,
        "compile": done - traced,
        "step": statistics.median(seconds),
        "lines": lowered.as_text().count("\n"),
        "arrays": len(definition.parameters),
        "memory": compiled.memory_analysis().temp_size_in_bytes,
        "loss": loss,
    }


def measure_depths(config: ModelConfig, depths: Iterable[int], batch: Batch) -> list[dict[str, Any]]:
    """`measure` of both layouts at each depth, shallow first; before it once for nothing, to start the compiler."""
    measure(with_layers(config, 1), True, batch, runs=1)
    return [measure(with_layers(config, n), scan, batch) for n in depths for scan in (True, False)]


def per_layer(rows: Sequence[Mapping[str, Any]], layout: str, quantity: str) -> float:
    """The slope of a straight line through `quantity` over layers."""
    return _line(rows, layout, quantity)[0]


def crossing(rows: Sequence[Mapping[str, Any]], quantity: str) -> float:
    """The number of layers at which straight lines through both layouts' `quantity` meet."""
    (flat, base), (slope, start) = (_line(rows, layout, quantity) for layout in LAYOUTS.values())
    return (base - start) / (slope - flat)


def _line(rows: Sequence[Mapping[str, Any]], layout: str, quantity: str) -> tuple[float, float]:
    """(slope, value at 0) of the straight line nearest to one layout's values."""
    x, y = np.array([(row["layers"], row[quantity]) for row in rows if row["layout"] == layout], float).T
    slope, start = np.polyfit(x, y, 1)
    return float(slope), float(start)


def depth_figure(rows: Sequence[Mapping[str, Any]], quantities: Mapping[str, str], *, title: str) -> Figure:
    """A panel per quantity, {name in `rows`: its label}: over the number of layers, a line per layout."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 3.2), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        places = canvas.subplots(1, len(quantities), squeeze=False).flat
        for axes, (name, label) in zip(places, quantities.items(), strict=True):
            for colour, marker, layout in zip(COLOURS, "os", LAYOUTS.values(), strict=False):
                points = [(row["layers"], row[name]) for row in rows if row["layout"] == layout]
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4.5, lw=1.8, label=layout)
            axes.set_title(label, loc="left", fontsize=10)
            axes.set_xlabel("layers")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(True, color=FAINT, linewidth=0.7)
            axes.set_axisbelow(True)
        canvas.legend(*canvas.axes[0].get_legend_handles_labels(), frameon=False, fontsize=9.5,
                      loc="outside lower left", ncols=2)  # fmt: skip
        deepest = max(row["layers"] for row in rows)
        last = {row["layout"]: row for row in rows if row["layers"] == deepest}
        told = [f"{label} {last['scanned'][n]:.3g} and {last['unrolled'][n]:.3g}" for n, label in quantities.items()]
        return finish(
            canvas, f"Line charts, {title}: at {deepest} layers scanned and unrolled, " + "; ".join(told) + "."
        )
