# SPDX-License-Identifier: Apache-2.0
"""One training step taken apart for the tutorial: its shapes, products and bytes, counted here and asked of XLA.

What is counted: a matrix product written as an einsum takes 2 x the sizes of all its letters (a multiplication and an
addition for each combination of indices), backward twice that; an array takes its shape. What XLA says is read from the
traced program (`cost_analysis`) and from the compiled one (`memory_analysis`). Dense decoders with plain attention.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import optax
from flax import nnx
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch

from maxkit.models.config import Execution, ModelConfig
from maxkit.models.definition import ModelDefinition
from maxkit.models.layers import Projection
from maxkit.nb.cards import Card, table
from maxkit.nb.figures import COLOURS, FAINT, INK, STYLE, Figure, finish
from maxkit.objectives.next_token import NextToken
from maxkit.train.step import compile_train_step, train_step
from maxkit.types import Batch, TrainState

OBJECTIVE = NextToken(num_tiles=1)
OPTIMIZER = optax.adamw(3e-3)
LAYERS = "attention projections", "attention, token by token", "MLP"
PARTS = (*LAYERS, "output head")
KINDS = "MLP", "attention weights", "the stream and heads"
POLICIES = ("none", "dots", "full")
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = COLOURS


# --- shapes and products ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product of the forward pass: its einsum, the shape of its result, FLOPs of the `layers` it occurs in."""

    name: str
    part: str
    einsum: str
    shape: tuple[int, ...]
    layers: int
    flops: int


def products(config: ModelConfig, rows: int, length: int, keys: int | None = None) -> list[Product]:
    """Every product of the forward pass, in its order, for rows x length tokens that look at `keys` (their own number).

    Attention is counted as the reference kernel computes it: every query with every key, masked or not.
    """
    sizes = {
        "B": rows,
        "T": length,
        "S": keys or length,
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.mlp_dim,
    }
    sizes |= {"N": config.num_heads, "K": config.num_kv_heads, "H": config.head_dim}

    def product(name: str, part: str, einsum: str, layers: int = 1) -> Product:
        result = einsum.partition("->")[2]
        flops = 2 * layers * math.prod(sizes[letter] for letter in set(einsum) - set(",->"))
        return Product(name, part, einsum, tuple(sizes[letter] for letter in result), layers, flops)

    definition, depth = ModelDefinition(config), config.num_layers
    # The weights' einsums are those of the model itself.
    model = nnx.merge(definition.graphdef, definition.tree(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype)))
    written = {
        node.path.removeprefix("layers/"): f"{node.inputs},{node.letters}->{node.outputs}"
        for _, node in nnx.iter_graph(model)
        if isinstance(node, Projection)
    }
    found = [product(n, LAYERS[0], written[f"attention/{n}"], depth) for n in ("query", "key", "value")]
    found += [
        product("scores", LAYERS[1], "BTNH,BSNH->BNTS", depth),
        product("weighted values", LAYERS[1], "BNTS,BSNH->BTNH", depth),
        product("out", LAYERS[0], written["attention/out"], depth),
    ]
    found += [
        product(n, LAYERS[2], written[f"mlp/{n}"], depth) for n in ("gate", "up", "down") if f"mlp/{n}" in written
    ]
    return [*found, product("logits", PARTS[3], "BTD,VD->BTV")]


def shapes_table(listed: Sequence[Product], *, title: str) -> Card:
    """From tokens to the loss: what each product makes, and its millions of FLOPs forward."""
    (rows, length), width = listed[0].shape[:2], listed[-1]

    def row(what: str, letters: str, shape: Sequence[int], layers: int | None, flops: int) -> dict[str, Any]:
        shown = "×".join(map(str, shape)) or "one number"
        written = letters.replace("->", "→")  # one sign: a hyphen would break in a narrow column
        return {"what": what, "einsum": written, "result": shown, "layers": layers, "MFLOPs": round(flops / 1e6, 1)}

    stream = next(p.shape for p in listed if p.einsum.endswith("->BTD"))
    shown = [row("tokens", "BT", (rows, length), None, 0), row("embedding (looked up)", "BT->BTD", stream, None, 0)]
    shown += [row(p.name, p.einsum, p.shape, p.layers if p is not width else None, p.flops) for p in listed]
    return table([*shown, row("loss", "BTV,BT->", (), None, 0)], title=title)


def flops_by_part(listed: Iterable[Product]) -> dict[str, int]:
    """{part: FLOPs of the forward pass}."""
    found = dict.fromkeys(PARTS, 0)
    for product in listed:
        found[product.part] += product.flops
    return found


def recomputed(listed: Sequence[Product], remat_policy: str) -> int:
    """FLOPs that the backward pass does over again: nothing; the products without weights; whole layers."""
    parts = {"none": (), "dots": LAYERS[1:2], "full": LAYERS}[remat_policy]
    # Of a whole layer nothing needs the last product again: its result goes into the stream, its inputs are kept.
    again = [p for p in listed if p.part in parts and not (remat_policy == "full" and p.name == "down")]
    return sum(p.flops for p in again)


# --- what XLA counts --------------------------------------------------------------------------


def state_shapes(definition: ModelDefinition) -> TrainState:
    """The training state as shapes: nothing is computed."""
    return jax.eval_shape(_state, definition.shapes)


def first_state(definition: ModelDefinition, seed: int) -> TrainState:
    """The state before the first update."""
    return _state(definition.init(seed))


def _state(params: Any) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, {}, OPTIMIZER.init(params), jax.random.key(0))


def traced_flops(config: ModelConfig, batch: Batch, *, remat_policy: str = "none") -> dict[str, float]:
    """FLOPs by XLA's own count: "forward", "forward and backward", "whole step". Traced, not compiled.

    Unrolled: a loop's body is counted once, however often it runs.
    """
    definition = ModelDefinition(config, Execution(scan_layers=False, remat_policy=remat_policy))

    def loss(params: Any) -> jax.Array:
        return OBJECTIVE(definition.merge(params), batch, None, OBJECTIVE.weights(batch)).loss

    step, state = train_step(definition, OBJECTIVE, OPTIMIZER), state_shapes(definition)
    lowered = {
        "forward": jax.jit(loss).lower(state.params),
        "forward and backward": jax.jit(jax.grad(loss)).lower(state.params),
        "whole step": jax.jit(step).lower(state, batch),
    }
    return {name: float(program.cost_analysis()["flops"]) for name, program in lowered.items()}


# --- bytes ------------------------------------------------------------------------------------


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_bytes(definition: ModelDefinition) -> dict[str, int]:
    """What the step is given, and the gradients, which it makes."""
    state = state_shapes(definition)
    adam = state.opt_state[0]
    return {
        "weights": nbytes(state.params),
        "mean of gradients": nbytes(adam.mu),
        "mean of squares": nbytes(adam.nu),
        "gradients": nbytes(state.params),
    }


def kept_bytes(config: ModelConfig, batch: Batch, remat_policy: str) -> dict[str, int]:
    """What differentiation keeps of the forward pass for the backward pass, without the weights: {kind: bytes}.

    These are the arrays that `jax.vjp`'s second result holds on to. By kind: those with the MLP's width, with a query
    and a key axis, and all others.
    """
    definition = ModelDefinition(config, Execution(remat_policy=remat_policy))

    def backward(params: Any, batch: Batch) -> Any:
        weights = OBJECTIVE.weights(batch)
        return jax.vjp(lambda p: OBJECTIVE(definition.merge(p), batch, None, weights).loss, params)[1]

    weights = {p.shape for p in definition.parameters.values()}
    found, length = dict.fromkeys(KINDS, 0), batch.tokens.shape[1]
    for leaf in jax.tree.leaves(jax.eval_shape(backward, definition.shapes, batch)):
        if leaf.shape in weights:
            continue
        squared = leaf.shape.count(length) >= 2
        kind = KINDS[1] if squared else KINDS[0] if config.mlp_dim in leaf.shape else KINDS[2]
        found[kind] += leaf.size * leaf.dtype.itemsize
    return found


def compiled_step(
    config: ModelConfig, batch: Batch, *, remat_policy: str = "none", accumulation: int = 1, donate: bool = True
) -> jax.stages.Compiled:
    """The step of maxkit's trainer for these shapes, scanned; `donate` False keeps the old state."""
    definition = ModelDefinition(config, Execution(remat_policy=remat_policy))
    step = compile_train_step(definition, OBJECTIVE, OPTIMIZER, accumulation)
    if not donate:
        step = jax.jit(train_step(definition, OBJECTIVE, OPTIMIZER, accumulation))
    return step.lower(state_shapes(definition), batch).compile()


def reserved_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What the compiler reserves: "arguments", "results" that are not written over them, "temporary", and "all"."""
    found = compiled.memory_analysis()
    arguments, results = found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
    temporary = found.temp_size_in_bytes
    return {
        "arguments": arguments,
        "results": results,
        "temporary": temporary,
        "all": arguments + results + temporary,
    }


# --- pictures ---------------------------------------------------------------------------------


def flops_figure(rows: Mapping[str, Sequence[Product]], *, title: str) -> Figure:
    """{name: its products}: a bar of shares by part for each, and its FLOPs for one token."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 1.25 + 0.42 * len(rows)), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        axes = canvas.subplots()
        colours = dict(zip(PARTS, (SKY, BLUE, ORANGE, INK), strict=True))
        told = []
        for y, (name, listed) in enumerate(rows.items()):
            flops, tokens = flops_by_part(listed), math.prod(listed[0].shape[:2])
            total, left = sum(flops.values()), 0.0
            for part, count in flops.items():
                share = count / total
                axes.barh(y, share, 0.66, left, color=colours[part], edgecolor="white", lw=0.8)
                if share >= 0.06:
                    ink = INK if part in (LAYERS[0], LAYERS[2]) else "white"
                    axes.text(left + share / 2, y, f"{share:.0%}", ha="center", va="center", fontsize=9, color=ink)
                left += share
            axes.text(1.015, y, _per_token(total / tokens), va="center", fontsize=9.5)
            told.append(f"{name} {flops[LAYERS[1]] / total:.0%}")
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        handles = [Patch(color=colour, label=part) for part, colour in colours.items()]
        canvas.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9, handlelength=1.2)
        return finish(canvas, f"Stacked bars, {title}; attention token by token takes: " + "; ".join(told) + ".")


def _per_token(flops: float) -> str:
    scaled, unit = (flops / 1e9, "G") if flops >= 1e9 else (flops / 1e6, "M")
    return f"{scaled:,.1f} {unit} per token"


def memory_figure(rows: Mapping[str, tuple[Mapping[str, int], int]], *, title: str) -> Figure:
    """{name: (counted bytes by kind, bytes that the compiler reserves)}: counted as colours, the rest as work space."""
    palette = ("#4d5156", "#80868b", "#bdc1c6", GREEN, ORANGE, BLUE, SKY)
    kinds = list(dict.fromkeys(kind for counted, _ in rows.values() for kind in counted))
    colours = dict(zip(kinds, palette, strict=False))
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 1.75 + 0.5 * len(rows)), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        axes = canvas.subplots()
        told = []
        for y, (name, (counted, reserved)) in enumerate(rows.items()):
            left = 0.0
            for kind, count in counted.items():
                axes.barh(y, count / 1e6, 0.62, left, color=colours[kind], edgecolor="white", lw=0.6)
                left += count / 1e6
            axes.barh(y, reserved / 1e6 - left, 0.62, left, facecolor="white", edgecolor=INK, lw=0.9, hatch="///")
            axes.text(reserved / 1e6, y, f"  {reserved / 1e6:,.0f} MB", va="center", fontsize=9.5)
            told.append(f"{name} {left:.0f} of {reserved / 1e6:.0f}")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set(xlim=(0, 1.14 * max(reserved for _, reserved in rows.values()) / 1e6), ylim=(len(rows) - 0.5, -0.5))
        axes.set_xlabel("MB")
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(True, axis="x", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        handles = [Patch(facecolor=colour, label=kind) for kind, colour in colours.items()]
        handles.append(Patch(facecolor="white", edgecolor=INK, hatch="///", label="work space"))
        canvas.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9, handlelength=1.3)
        return finish(canvas, f"Stacked bars, {title}; MB counted of MB reserved: " + "; ".join(told) + ".")
