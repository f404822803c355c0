# SPDX-License-Identifier: Apache-2.0
"""Numbers of sixteen bits for the tutorial: where they lie, what a computation in them loses, which updates vanish.

"In bfloat16" means here that every intermediate result is rounded, sums one term after another. numpy does exactly
that with `ml_dtypes`; a compiler may keep more digits than it was asked for, and a lesson needs what was asked for.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import ml_dtypes
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch, Rectangle

from maxkit.models import rope
from maxkit.models.config import Execution, ModelConfig
from maxkit.models.definition import ModelDefinition
from maxkit.models.layers import unit_rms
from maxkit.nb.figures import COLOURS, FAINT, INK, STYLE, Figure, finish
from maxkit.objectives.next_token import NextToken
from maxkit.ops.attention import reference_attention
from maxkit.ops.cross_entropy import cross_entropy
from maxkit.optim import make_optimizer
from maxkit.optim.config import OptimizerConfig
from maxkit.train.step import compile_train_step
from maxkit.types import Batch, TrainState

BF16: Any = ml_dtypes.bfloat16
KINDS: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": BF16}
HALF_STEP = 2.0**-8  # the most that one rounding to bfloat16 changes a number, relative to it


# --- which numbers exist ----------------------------------------------------------------------


def bits(kind: str) -> dict[str, int]:
    """How many bits are {"sign", "exponent", "fraction"}."""
    facts = ml_dtypes.finfo(KINDS[kind])
    return {"sign": 1, "exponent": facts.bits - 1 - facts.nmant, "fraction": facts.nmant}


def spacing(kind: str, x: float) -> float:
    """From the number of this kind that is nearest to x to the next larger one."""
    here = np.asarray(x).astype(KINDS[kind])
    return float(np.nextafter(here, here.dtype.type(np.inf))) - float(here)


def facts(kind: str) -> dict[str, str]:
    """A row of the table of kinds."""
    of = ml_dtypes.finfo(KINDS[kind])
    return {
        "kind": kind,
        "bits": str(of.bits),
        "largest": f"{float(of.max):.2g}",
        "smallest (normal)": f"{float(of.tiny):.2g}",
        "digits": f"{(of.nmant + 1) * np.log10(2):.1f}",
        "after 1 comes": f"{1 + spacing(kind, 1.0):.9g}",
        "after 256 comes": f"{256 + spacing(kind, 256.0):.9g}",
    }


def numbers_figure(ranges: Sequence[tuple[float, float]], *, title: str) -> Figure:
    """The bits of each kind, and a stroke for every number that it has between two numbers, for each range."""
    colours = dict(zip(("sign", "exponent", "fraction"), (INK, COLOURS[1], COLOURS[0]), strict=True))
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 4.1), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        rows: Any = canvas.subfigures(2, 1, height_ratios=(1, 1.15))
        top: Axes = rows[0].subplots()
        for y, kind in enumerate(KINDS):
            place = 0
            for name, count in bits(kind).items():
                for _ in range(count):
                    box = Rectangle((place, y + 0.12), 0.92, 0.76, facecolor=colours[name], edgecolor="white", lw=0.5)
                    top.add_patch(box)
                    place += 1
        top.set(xlim=(0, 32), ylim=(3, 0), xticks=[], yticks=np.arange(3) + 0.5)
        top.legend(handles=[Patch(color=c, label=n) for n, c in colours.items()], frameon=False, fontsize=9,
                   loc="lower right", bbox_to_anchor=(1, 0.02))  # fmt: skip
        counts = []
        for axes, (low, high) in zip(
            rows[1].subplots(1, len(ranges), sharey=True, squeeze=False)[0], ranges, strict=True
        ):
            counts.append([_strokes(axes, y, kind, low, high) for y, kind in enumerate(KINDS)])
            axes.set(xlim=(low, high), ylim=(3, 0), yticks=np.arange(3) + 0.5)
            axes.set_xlabel(f"numbers from {low:g} to {high:g}", fontsize=9.5)
            axes.tick_params(axis="x", labelsize=9)
        for axes in canvas.axes:
            axes.set_yticklabels(KINDS, fontsize=9.5)
            axes.tick_params(axis="y", length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
        top.spines["bottom"].set_visible(False)
        told = [
            f"from {low:g} to {high:g} there are {', '.join(f'{n:,} in {k}' for k, n in zip(KINDS, of, strict=True))}"
            for (low, high), of in zip(ranges, counts, strict=True)
        ]
        return finish(canvas, f"Diagram, {title}: numbers " + "; ".join(told) + ".")


def _strokes(axes: Axes, y: int, kind: str, low: float, high: float) -> int:
    """Draw the numbers of a kind, or a solid band where they are closer than pixels; how many there are."""
    step = spacing(kind, low)
    count = round((high - low) / step) + 1
    if count > 200:
        axes.add_patch(Rectangle((low, y + 0.15), high - low, 0.7, facecolor=COLOURS[0]))
    else:
        axes.vlines(low + step * np.arange(count), y + 0.15, y + 0.85, color=COLOURS[0], lw=1.6 if count < 40 else 0.9)
    return count


# --- what a computation loses -----------------------------------------------------------------


def running_sum(values: Any, kind: Any) -> np.ndarray:
    """The sum over the last axis, one term after another, each partial sum rounded to `kind`."""
    return np.add.accumulate(np.asarray(values).astype(kind), axis=-1)[..., -1]


def part_errors(seed: int = 0) -> dict[str, tuple[float, float]]:
    """{part of a training step: (error when all of it is bfloat16, error as maxkit does it)}.

    Errors are the largest deviation from the same formula in float64, relative to its largest value. All begin from
    the same bfloat16 inputs, as a model with bfloat16 activations does.
    """
    draw = np.random.default_rng(seed)
    return {
        "RMS norm of 4,096 channels": _norm(draw),
        "product of 4,096 terms": _product(draw),
        "RoPE, positions up to 8,191": _rope(draw),
        "attention over 4,096 keys": _attention(draw),
        "loss, vocabulary of 49,152": _loss(draw),
        "gradients of 512 micro-batches": _accumulated(draw),
        "Adam's mean of squares": _moment(),
    }


def _apart(got: Any, exact: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(got).astype(np.float64) - exact)) / np.max(np.abs(exact)))


def _normal(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return draw.standard_normal(shape).astype(BF16)


def _rope(draw: np.random.Generator) -> tuple[float, float]:
    dim, theta, positions = 64, 1e4, np.arange(0, 8192, 13)
    x = _normal(draw, dim)

    def turned(kind: Any) -> np.ndarray:
        frequencies = (theta ** -(np.arange(0, dim, 2) / dim)).astype(kind)
        angles = positions.astype(kind)[:, None] * frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = x.astype(kind)[: dim // 2], x.astype(kind)[dim // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    rotations = rope.rotations(jnp.asarray(positions)[None], dim, theta, None, 8192)
    rows = jnp.broadcast_to(jnp.asarray(x), (1, len(positions), 1, dim))
    exact = turned(np.float64)
    return _apart(turned(BF16), exact), _apart(rope.rotate(rows, *rotations)[0, :, 0], exact)


def _norm(draw: np.random.Generator) -> tuple[float, float]:
    x = _normal(draw, 4096)

    def normed(kind: Any) -> np.ndarray:
        wide = x.astype(kind)
        return wide / np.sqrt(running_sum(wide * wide, kind) / kind(len(x)))

    exact = normed(np.float64)
    return _apart(normed(BF16), exact), _apart(unit_rms(jnp.asarray(x), 0.0), exact)


def _attention(draw: np.random.Generator) -> tuple[float, float]:
    keys, dim = 4096, 64
    query, key, value = _normal(draw, dim), _normal(draw, keys, dim), _normal(draw, keys, dim)

    def attended(kind: Any) -> np.ndarray:
        logits = running_sum(key.astype(kind) * query.astype(kind), kind) * kind(dim**-0.5)
        weights = np.exp(logits - np.max(logits))
        weights = weights / running_sum(weights, kind)
        return running_sum((weights[:, None] * value.astype(kind)).T, kind)

    q, k, v = (jnp.asarray(x).reshape(1, -1, 1, dim) for x in (query, key, value))
    ours = reference_attention(q, k, v, jnp.ones((1, 1, keys), bool), scale=dim**-0.5)
    exact = attended(np.float64)
    return _apart(attended(BF16), exact), _apart(ours[0, 0, 0], exact)


def _loss(draw: np.random.Generator) -> tuple[float, float]:
    tokens, dim, vocab = 32, 64, 49152
    hidden, table = _normal(draw, tokens, dim), (0.3 * draw.standard_normal((vocab, dim))).astype(BF16)
    targets = draw.integers(0, vocab, tokens)
    scores = hidden.astype(np.float64) @ table.astype(np.float64).T

    def mean(kind: Any) -> np.ndarray:
        logits = scores.astype(kind)
        top = np.max(logits, axis=-1, keepdims=True)
        lse = np.log(running_sum(np.exp(logits - top), kind)) + top[:, 0]
        return running_sum(lse - logits[np.arange(tokens), targets], kind) / kind(tokens)

    mask = jnp.ones((1, tokens), jnp.float32)
    ours, _ = cross_entropy(jnp.asarray(hidden)[None], jnp.asarray(table), jnp.asarray(targets)[None], mask)
    exact = mean(np.float64)
    return _apart(mean(BF16), exact), _apart(ours / tokens, exact)


def _moment() -> tuple[float, float]:
    """Gradients of 1, and then calmer ones of 0.1: 3,000 updates each. Only what is kept between updates is rounded."""
    cfg = OptimizerConfig(learning_rate=1e-3, adam_b2=0.999, gradient_clipping_threshold=0.0)
    gradients = np.repeat([1.0, 0.1], 3000)

    def mean(kind: Any) -> np.ndarray:
        moment = kind(0)
        for square in gradients**2:
            moment = kind(0.999 * float(moment) + 0.001 * square)
        return np.asarray(moment)

    weights = {"kernel": jnp.ones((1, 1), jnp.bfloat16)}
    optimizer = make_optimizer(cfg, len(gradients), {"kernel": "DF"})

    def update(state: Any, gradient: jax.Array) -> tuple[Any, None]:
        return optimizer.update({"kernel": gradient.reshape(1, 1)}, state, weights)[1], None

    state, _ = jax.lax.scan(update, optimizer.init(weights), jnp.asarray(gradients, jnp.bfloat16))
    exact = mean(np.float64)
    return _apart(mean(BF16), exact), _apart(state[0].nu["kernel"][0, 0], exact)


def _accumulated(draw: np.random.Generator) -> tuple[float, float]:
    gradients = np.exp(2 * draw.standard_normal((64, 512))).astype(BF16)
    exact = running_sum(gradients, np.float64)
    return _apart(running_sum(gradients, BF16), exact), _apart(running_sum(gradients, np.float32), exact)


def _product(draw: np.random.Generator) -> tuple[float, float]:
    x, w = _normal(draw, 4096), _normal(draw, 4096, 16)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    ours = jnp.einsum("D,DF->F", jnp.asarray(x), jnp.asarray(w), preferred_element_type=jnp.float32)
    return _apart(running_sum((x[:, None] * w).T, BF16), exact), _apart(ours.astype(jnp.bfloat16), exact)


def errors_figure(errors: Mapping[str, tuple[float, float]], *, title: str) -> Figure:
    """A row per part: its error in bfloat16 and as maxkit does it, on a logarithmic axis."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 1.5 + 0.36 * len(errors)), layout="constrained", facecolor="white")
        axes = canvas.add_subplot(facecolor="white")
        axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
        axes.axvline(HALF_STEP, color=INK, linestyle=":", linewidth=1.2)
        axes.text(HALF_STEP, -0.72, "one rounding to bfloat16  ", fontsize=9, ha="right", va="center")
        for y, (naive, ours) in enumerate(errors.values()):
            axes.plot([ours, naive], [y, y], color=FAINT, linewidth=3, zorder=1)
            axes.plot(ours, y, "o", color=COLOURS[0], markersize=8, zorder=2)
            axes.plot(naive, y, "s", color=COLOURS[1], markersize=8, zorder=2)
        axes.plot([], [], "o", color=COLOURS[0], label="as maxkit does it")
        axes.plot([], [], "s", color=COLOURS[1], label="all in bfloat16")
        axes.set_xscale("log")
        axes.set_yticks(range(len(errors)), list(errors), fontsize=9.5)
        axes.set_ylim(len(errors) - 0.5, -1.2)
        axes.set_xlabel("largest error, relative to the largest value (float64 is right)", fontsize=9.5)
        canvas.legend(frameon=False, fontsize=9.5, loc="outside lower right", ncols=2)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="x", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        worst, best = max(n for n, _ in errors.values()), max(o for _, o in errors.values())
        told = (
            f"{len(errors)} parts: all in bfloat16 up to {100 * worst:.0f} % off, as maxkit does it {100 * best:.1f} %"
        )
        return finish(canvas, f"Dots, {title}, {told} at most.")


# --- updates that vanish ----------------------------------------------------------------------


def unmoved(weights: np.ndarray, rate: float, kind: Any) -> float:
    """The share of weights that are what they were after each was moved by `rate` of its own sign."""
    held = weights.astype(kind)
    moved = (held.astype(np.float64) + rate * np.sign(weights)).astype(kind)
    return float(np.mean(moved == held))


def vanishing_figure(weights: np.ndarray, update: float, steps: int, rates: Sequence[float], *, title: str) -> Figure:
    """One weight that is moved many times, and the share of all weights that one update of a size does not move."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 3.6), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        left, right = canvas.subplots(1, 2)
        kinds = {"float32": (np.float32, COLOURS[0]), "bfloat16": (BF16, COLOURS[1])}
        moves = np.concatenate([[1.0], np.full(steps, update)])
        master, path = (np.add.accumulate(moves.astype(kind)) for kind, _ in kinds.values())
        left.plot(master, color=COLOURS[0], linewidth=2, label="float32")
        left.plot(path.astype(np.float64), color=COLOURS[1], linewidth=2, label="bfloat16")
        left.plot(master.astype(BF16).astype(np.float64), color=COLOURS[2], linewidth=1.4,
                  label="float32, read\nas bfloat16", drawstyle="steps-post")  # fmt: skip
        left.set_title(f"one weight, +{update:g} each time", loc="left", fontsize=10)
        left.set_xlabel("updates", fontsize=9.5)
        for name, (kind, colour) in kinds.items():
            right.plot(rates, [unmoved(weights, rate, kind) for rate in rates], color=colour, linewidth=2, label=name)
        right.set_xscale("log")
        right.set_title("share of weights that do not move", loc="left", fontsize=10)
        right.set_xlabel("size of the update", fontsize=9.5)
        right.set_ylim(-0.03, 1.03)
        for axes in (left, right):
            axes.legend(frameon=False, fontsize=8.5)
            axes.tick_params(labelsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(True, color=FAINT, linewidth=0.7)
            axes.set_axisbelow(True)
        end = float(path[-1])
        told = (
            f"after {steps} times {update:g} a bfloat16 weight of 1 is {end:g}, a float32 one {float(master[-1]):.3f}"
        )
        return finish(canvas, f"Lines, {title}: {told}; small updates move no bfloat16 weight at all.")


# --- a model trained in each ------------------------------------------------------------------


def train(
    config: ModelConfig, batch: Batch, *, weights: str, dtype: str, rate: float, steps: int, seed: int = 0
) -> tuple[list[dict[str, float]], TrainState]:
    """Losses of Adam on one batch (rows with "step" and "loss"), and the last state.

    weights, dtype: what weights are kept in, and what activations are computed in. The initial values are the same
    for every choice, up to their rounding.
    """
    definition = ModelDefinition(config, Execution(dtype=dtype), weight_dtype=weights)  # type: ignore[arg-type]
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=rate, learning_rate_schedule="constant", warmup_steps_fraction=0.0, weight_decay=0.0
        ),
        steps,
        definition.letters,
    )
    params = definition.init(seed)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params), jax.random.key(0))
    step = compile_train_step(definition, NextToken(num_tiles=1), optimizer)
    history = []
    for number in range(1, steps + 1):
        state, metrics = step(state, batch, None)
        history.append({"step": number, "loss": float(metrics["loss"])})
    return history, state


OPERATIONS = {
    "dot_general": "matrix products (their inputs)",
    "exponential": "softmax, loss; gates of the MLP",
    "log": "loss",
    "rsqrt": "norms",
    "cosine": "RoPE",
    "sqrt": "optimizer",
}


def operations(config: ModelConfig, batch: Batch, dtype: str) -> list[dict[str, Any]]:
    """How often each of `OPERATIONS` stands in the program of a training step, on float32 and on bfloat16 numbers."""
    definition = ModelDefinition(config, Execution(dtype=dtype))  # type: ignore[arg-type]
    optimizer = make_optimizer(OptimizerConfig(), 1, definition.letters)
    params = definition.shapes
    scalar: Any = jax.ShapeDtypeStruct((), "int32")
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = TrainState(scalar, params, {}, jax.eval_shape(optimizer.init, params), key)
    step = compile_train_step(definition, NextToken(num_tiles=1), optimizer)
    text = step.lower(state, batch, None).as_text()
    rows = []
    for name, use in OPERATIONS.items():
        found = re.findall(rf"stablehlo\.{name}\b.* : \(?tensor<[\dx]*(f32|bf16)>", text)
        rows.append({"operation": name, "used in": use, "bfloat16": found.count("bf16"), "float32": found.count("f32")})
    return rows


def kinds_of(state: TrainState) -> dict[str, str]:
    """{part of a training state: the kinds of its arrays}; counters left out."""
    parts = {"weights": state.params, "optimizer": state.opt_state}
    return {
        name: ", ".join(sorted({str(x.dtype) for x in jax.tree.leaves(tree) if x.ndim})) for name, tree in parts.items()
    }


def state_bytes(definition: ModelDefinition) -> dict[str, int]:
    """What training with Adam keeps: {"weights", "gradients", "moments"} in bytes."""
    trained, _ = definition.split_trainable(definition.shapes)
    leaves = jax.tree.leaves(trained)
    return {
        "weights": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(definition.shapes)),
        "gradients": sum(x.size * x.dtype.itemsize for x in leaves),
        "moments": sum(2 * x.size * 4 for x in leaves),
    }
