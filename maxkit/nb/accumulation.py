# SPDX-License-Identifier: Apache-2.0
"""Accumulated updates beside averaged ones, for the tutorial: how far they are apart, who counts how much.

An update here is minus the gradient (SGD with learning rate 1) as one vector, so that two of them have an angle. What
maxkit trains with is `train/step.py`; the averaging below exists nowhere else.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from maxkit.data.packing import pack
from maxkit.models.definition import ModelDefinition
from maxkit.nb.figures import COLOURS, FAINT, INK, STYLE, Figure, finish
from maxkit.objectives.next_token import NextToken
from maxkit.train.step import eval_step, train_step
from maxkit.types import Batch, TrainState, Tree

OBJECTIVE = NextToken(num_tiles=1)


def text_batch(texts: Sequence[str], seq_len: int) -> Batch:
    """A row per text, a token per byte (UTF-8); every byte but the first is a trained target.

    Raises:
        AssertionError: a text of less than two bytes or more than seq_len.
    """
    rows = [list(text.encode()) for text in texts]
    packed = pack([(row, [1] * len(row)) for row in rows], seq_len, packing=False)
    assert not packed.too_long and not packed.untrained, "every text needs 2 to seq_len bytes"
    columns: dict[str, Any] = {name: jnp.asarray(column) for name, column in packed.columns.items()}
    return Batch(**columns)


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """The rows that the training step takes together: every count-th."""
    return [jax.tree.map(operator.itemgetter(slice(number, None, count)), batch) for number in range(count)]


# --- updates ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _compiled_step(definition: ModelDefinition, accumulation: int) -> Any:
    # Not donated: several updates start from the same weights.
    return jax.jit(train_step(definition, OBJECTIVE, optax.sgd(1.0), accumulation))


def _change(definition: ModelDefinition, params: Tree, batch: Batch, accumulation: int) -> Tree:
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, optax.sgd(1.0).init(params), jax.random.key(0))
    new = _compiled_step(definition, accumulation)(state, batch)[0].params
    return jax.tree.map(jnp.subtract, new, params)


def update(definition: ModelDefinition, params: Tree, batch: Batch, accumulation: int) -> np.ndarray:
    """[P] float64: the update of maxkit's training step, which cuts the batch into `accumulation` micro-batches."""
    return _vector(_change(definition, params, batch, accumulation))


def mean_of_means(definition: ModelDefinition, params: Tree, batch: Batch, accumulation: int) -> np.ndarray:
    """[P] float64: each micro-batch's own update, with the mean over its own tokens, and then the mean of these."""
    updates = [update(definition, params, micro, 1) for micro in micro_batches(batch, accumulation)]
    return np.mean(updates, axis=0)


def token_weights(loss_mask: Any, accumulation: int) -> np.ndarray:
    """[B, T]: what a mean of means counts each token, where one big batch counts it 1; the sum is the same.

    M / (A M_m) for tokens of micro-batch m, with M trained tokens in all, M_m of them in m, and A micro-batches.
    """
    mask = np.asarray(loss_mask, np.float64)
    weights = np.zeros_like(mask)
    for number in range(accumulation):
        own = mask[number::accumulation]
        weights[number::accumulation] = own * mask.sum() / (accumulation * own.sum())
    return weights


def reweighted(batch: Batch, accumulation: int) -> Batch:
    """The batch on which maxkit's step makes the mean-of-means update: that is another loss, not a rounding error."""
    weights = token_weights(batch.loss_mask, accumulation)
    return Batch(batch.tokens, batch.targets, jnp.asarray(weights, jnp.float32), batch.segment_ids, batch.positions)


def apart(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Update `a` beside `b`: cosine of their angle, ratio of their sizes, size of the difference relative to b."""
    sizes = np.linalg.norm(a), np.linalg.norm(b)
    return {
        "cosine": float(a @ b / (sizes[0] * sizes[1])),
        "size": float(sizes[0] / sizes[1]),
        "difference": float(np.linalg.norm(a - b) / sizes[1]),
    }


def losses_after(
    definition: ModelDefinition,
    params: Tree,
    batches: Sequence[Batch],
    tests: Mapping[str, Batch],
    learning_rate: float,
) -> dict[str, float]:
    """{name: loss in nats per token of the test batch} after one SGD update per training batch."""
    for batch in batches:
        change = _change(definition, params, batch, 1)
        params = jax.tree.map(lambda p, c: p + learning_rate * c, params, change)
    evaluate = eval_step(definition, OBJECTIVE)
    return {n: float(evaluate(params, t, None, OBJECTIVE.weights(t))["loss"]) for n, t in tests.items()}


def _vector(tree: Tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


# --- pictures ---------------------------------------------------------------------------------


def votes_figure(loss_mask: Any, accumulation: int, *, title: str) -> Figure:
    """Every trained token as a cell, coloured by what it counts: in one big batch, and in a mean of means."""
    mask = np.asarray(loss_mask)
    panels = {"one big batch": mask, f"mean of {accumulation} means": token_weights(mask, accumulation)}
    width = max(int(np.flatnonzero(mask.any(axis=0)).max()) + 1, 1)
    top = float(max(2.0, *(p.max() for p in panels.values())))
    norm = matplotlib.colors.TwoSlopeNorm(1.0, 0.0, top)
    colours = matplotlib.colormaps["RdBu"]
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 1.15 + 0.24 * 2 * len(mask)), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        for axes, (name, weights) in zip(canvas.subplots(2, 1), panels.items(), strict=True):
            for row, column in zip(*np.nonzero(mask), strict=True):
                colour = colours(norm(weights[row, column]))
                axes.add_patch(Rectangle((column, row + 0.08), 0.94, 0.84, facecolor=colour, edgecolor=INK, lw=0.25))
            for row, of_row in enumerate(weights):
                says = f"{int((mask[row] > 0).sum())} tokens × {of_row.max():.2f}"
                axes.text(np.flatnonzero(mask[row]).max() + 2, row + 0.5, says, va="center", fontsize=8.5)
            axes.set_xlim(-0.5, width + 15)
            axes.set_ylim(len(mask), 0)
            axes.set_yticks(np.arange(len(mask)) + 0.5, [f"row {row}" for row in range(len(mask))], fontsize=8.5)
            axes.tick_params(length=0)
            axes.set_xticks([])
            axes.spines[:].set_visible(False)
            axes.set_title(name, fontsize=10.5, loc="left")
        votes = token_weights(mask, accumulation)[mask > 0]
        told = f"in a mean of {accumulation} means {votes.min():.2f} to {votes.max():.2f}"
        return finish(canvas, f"Diagram, {title}: every token counts 1 in one big batch; {told}.")


def directions_figure(
    true: np.ndarray, same: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray], *, title: str
) -> Figure:
    """Updates as arrows: along the true update, and away from it (in whatever direction that is), true size 1."""
    unit = float(np.linalg.norm(true))
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 4.4), layout="constrained", facecolor="white")
        axes = canvas.add_subplot(facecolor="white")
        axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
        end = _in_plane(true, true, unit)
        _arrow(axes, end, COLOURS[0], " = ".join(same), (0.012, -0.055), 3.4)
        for name, vector in same.items():
            assert np.allclose(_in_plane(vector, true, unit), end, atol=0.01), f"{name} is not the same update"
        told = []
        ends = [_in_plane(vector, true, unit) for vector in (true, *others.values())]
        for colour, (name, vector) in zip(COLOURS[1:], others.items(), strict=False):
            point = _in_plane(vector, true, unit)
            degrees = np.degrees(np.arctan2(point[1], point[0]))
            label = f"{name}\n{degrees:.0f}° off, {np.hypot(*point):.2f} × as long"
            shift = 0.06 if point[1] == max(y for _, y in ends) else -0.06
            _arrow(axes, point, colour, label, (0.03, shift), 2.2)
            told.append(f"{name} {degrees:.0f} degrees off and {np.hypot(*point):.2f} times as long")
        axes.set_xlim(0, 1.5 * max(1.0, *(x for x, _ in ends)))
        axes.set_ylim(-0.16, 1.2 * max(0.5, *(y for _, y in ends)))
        axes.set_aspect("equal")
        axes.set_xlabel("along the true update")
        axes.set_ylabel("away from it")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        return finish(canvas, f"Arrows, {title}: the same for {', '.join(same)}; " + "; ".join(told) + ".")


def _in_plane(vector: np.ndarray, true: np.ndarray, unit: float) -> tuple[float, float]:
    along = float(vector @ true / unit)
    return along / unit, float(np.sqrt(max(vector @ vector - along**2, 0.0))) / unit


def _arrow(
    axes: Axes, end: tuple[float, float], colour: str, label: str, shift: tuple[float, float], lw: float
) -> None:
    style = {"arrowstyle": "-|>", "lw": lw, "color": colour, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 16}
    axes.annotate("", end, (0, 0), arrowprops=style)
    axes.text(end[0] + shift[0], end[1] + shift[1], label, color=colour, fontsize=9, va="center", fontweight="bold")
