# SPDX-License-Identifier: Apache-2.0
"""Pictures of architectures, drawn from a `ModelConfig`: blocks, layers, masks, parameters, caches, RoPE.

The numbers come from `architecture.py`; the cards look like those of `figures.py`. Colours mean one thing:
in pictures of blocks and parameters blue is attention and orange the MLP; kinds of attention have one each.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from maxkit.models.config import BlockSpec, ModelConfig, RopeScaling
from maxkit.nb import architecture
from maxkit.nb.figures import COLOURS, FAINT, INK, STYLE, Figure, finish

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = COLOURS
KINDS = {
    "full attention": BLUE,
    "sliding window": SKY,
    "chunked": GREEN,
    "full, no RoPE": ORANGE,
    "latent": VERMILLION,
    "gated delta": PURPLE,
}
PART_COLOURS = dict(zip(architecture.PARTS, (SKY, BLUE, ORANGE, VERMILLION, INK), strict=True))
GREY = "#80868b"
EMPTY: dict[str, Any] = {"facecolor": "white", "edgecolor": GREY}
NORM, MIXER, MLP = "#e8eaed", "#cfe3f2", "#fbe3c0"
WIDTH = 7.2
STREAM = 1.0  # where the residual stream runs in a panel of width 10
LINE: dict[str, Any] = {"color": INK, "lw": 1.3, "solid_capstyle": "round"}


def _cards(rows: int, columns: int, height: float, title: str, **more) -> tuple[Canvas, list[Axes]]:
    canvas = Canvas(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
    grid = canvas.subplots(rows, columns, squeeze=False, **more)
    return canvas, list(grid.flat)


# --- one block --------------------------------------------------------------------------------


def block_figure(configs: Mapping[str, ModelConfig], *, title: str, columns: int = 3) -> Figure:
    """The block of each config (of its last layer) on its residual stream, which runs upwards."""
    with matplotlib.rc_context(STYLE):
        rows = -(-len(configs) // columns)
        canvas, places = _cards(rows, columns, 0.4 + 3.3 * rows, title)
        for axes in places:
            axes.axis("off")
        told = []
        for axes, (name, config) in zip(places, configs.items(), strict=False):
            told.append(f"{name} {_draw_block(axes, name, config)}")
        return finish(canvas, f"Diagram, {title}: " + "; ".join(told) + ".")


def _draw_block(axes: Axes, name: str, config: ModelConfig) -> str:
    """One panel; what it shows, in words."""
    block = config.blocks[-1]
    axes.set_xlim(0, 10)
    axes.set_ylim(-0.7, 12.9)
    axes.set_title(name, fontsize=10.5, loc="center")
    before, after = config.norm_placement in ("pre", "both"), config.norm_placement in ("post", "both")
    mixer = (_mixer_label(config, block), MIXER)
    mlp = (_mlp_label(config, block), MLP)
    norm = [("norm", NORM)]
    axes.annotate("", (STREAM, 12.9), (STREAM, -0.4), arrowprops={"arrowstyle": "-|>", "lw": 2.4, "color": INK})
    axes.text(STREAM + 0.35, -0.5, "residual stream", fontsize=8.5, va="center")
    if config.parallel_branches == "no":
        for start, box in ((0.3, mixer), (6.2, mlp)):
            _branch(axes, before * norm + [box] + after * norm, (STREAM, 6.2), start, start + 5.3)
        return f"{config.norm_placement}-norm" if config.norm_placement != "both" else "norms on both sides"
    shared = config.parallel_branches == "one_norm"
    if shared:
        axes.plot([STREAM, 5.65, 5.65], [0.6, 0.6, 3.6], **LINE)
        _box(axes, *norm[0], 5.65, 2.1, 8.5, 0.95)
    for centre, box in ((3.5, mixer), (7.8, mlp)):
        _branch(
            axes, (not shared) * norm + [box], (5.65 if shared else STREAM, centre), 3.6 if shared else 0.6, 10.2, 4.1
        )
    return "attention and MLP side by side"


def _branch(
    axes: Axes, boxes: list[tuple[str, str]], across: tuple[float, float], low: float, high: float, width: float = 6.9
) -> None:
    """A path that leaves `across[0]` at `low`, runs upwards through the boxes, and is added to the stream at `high`."""
    start, centre = across
    axes.plot([start, centre, centre], [low, low, high], **LINE)
    axes.annotate("", (STREAM + 0.4, high), (centre, high),
                  arrowprops={"arrowstyle": "-|>", "lw": 1.3, "color": INK, "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    axes.text(STREAM, high, "+", ha="center", va="center", fontsize=9, fontweight="bold",
              bbox={"boxstyle": "circle,pad=0.12", "fc": "white", "ec": INK, "lw": 1.3})  # fmt: skip
    heights = [0.95 if colour == NORM else 2.5 for _, colour in boxes]
    gap = (high - low - sum(heights)) / (len(boxes) + 1)
    at = low + gap
    for (label, colour), height in zip(boxes, heights, strict=True):
        _box(axes, label, colour, centre, at + height / 2, width, height)
        at += height + gap


def _box(axes: Axes, label: str, colour: str, x: float, y: float, width: float, height: float) -> None:
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor=INK,
                                  linewidth=1.0, boxstyle="round,pad=0,rounding_size=0.25", zorder=3))  # fmt: skip
    axes.text(x, y, label, ha="center", va="center", fontsize=8.5, zorder=4, linespacing=1.25)


def _mixer_label(config: ModelConfig, block: BlockSpec) -> str:
    if block.mixer == "gated_delta":
        return f"gated delta rule\n{config.gated_delta.num_value_heads} heads"
    extras = {
        "q/k norm": config.qk_norm != "none",
        "soft cap": config.attention_soft_cap is not None,
        "sinks": config.attention_sinks,
        "gate": config.attention_gate,
        "biases": config.attention_bias,
    }
    extra = ", ".join(word for word, present in extras.items() if present)
    if config.mla:
        return f"latent attention\n{config.num_heads} heads, latent {config.mla.kv_rank}"
    heads = f"{config.num_heads} heads" + f", {config.num_kv_heads} kv" * (config.num_kv_heads != config.num_heads)
    return f"attention\n{heads}" + f"\n{extra}" * bool(extra)


def _mlp_label(config: ModelConfig, block: BlockSpec) -> str:
    if block.mlp == "moe":
        shared = " + shared" if config.moe.shared_mlp_dim else ""
        return f"experts\n{config.moe.experts_per_token} of {config.moe.num_experts:,}{shared}"
    return f"{'gated ' * config.mlp_gated}MLP\nwidth {config.mlp_dim:,}"


# --- all layers -------------------------------------------------------------------------------


def layer_map_figure(configs: Mapping[str, ModelConfig], *, title: str) -> Figure:
    """A row per model, a cell per layer: the upper part says how tokens mix, the lower one whether it has experts.

    The lines below a row are its layer groups: blocks of the pattern x how often it repeats.
    """
    longest = max(config.num_layers for config in configs.values())
    with matplotlib.rc_context(STYLE):
        canvas, (axes,) = _cards(1, 1, 0.95 + 0.57 * len(configs), title)
        axes.set_xlim(-0.3, longest + 0.3)
        axes.set_ylim(len(configs) - 0.1, -0.1)
        axes.spines[:].set_visible(False)
        axes.set_yticks([row + 0.27 for row in range(len(configs))], list(configs))
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("layer")
        told, seen = [], []
        for row, (name, config) in enumerate(configs.items()):
            for layer, block in enumerate(config.blocks):
                kind = architecture.layer_kind(config, block)
                seen.append(kind)
                axes.add_patch(Rectangle((layer + 0.06, row), 0.88, 0.34, color=KINDS[kind], lw=0))
                experts: dict[str, Any] = {"color": INK} if block.mlp == "moe" else EMPTY
                axes.add_patch(Rectangle((layer + 0.1, row + 0.37), 0.8, 0.11, lw=0.5, **experts))
            groups = config.layer_groups()
            for group in groups:
                _bracket(
                    axes, group.first_layer, group.num_layers, row + 0.7, f"{len(group.pattern)} × {group.repeats}"
                )
            told.append(f"{name} " + " + ".join(f"{len(g.pattern)}×{g.repeats}" for g in groups))
        handles = [Patch(color=colour, label=kind) for kind, colour in KINDS.items() if kind in seen]
        handles += [Patch(color=INK, label="experts"), Patch(**EMPTY, label="dense MLP")]
        canvas.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9.5)
        return finish(canvas, f"Map of layers, {title}: " + "; ".join(told) + ".")


def _bracket(axes: Axes, first: int, count: int, y: float, label: str) -> None:
    axes.plot([first + 0.1, first + 0.1, first + count - 0.1, first + count - 0.1], [y - 0.05, y, y, y - 0.05],
              color=INK, lw=0.9, clip_on=False)  # fmt: skip
    # A group of one or two layers is narrower than its name, which then stands to its right.
    if count > 4:
        axes.text(first + count / 2, y + 0.01, label, ha="center", va="center", fontsize=8.5,
                  bbox={"fc": "white", "ec": "none", "pad": 1.2})  # fmt: skip
    else:
        axes.text(first + count / 2, y + 0.03, label, ha="center", va="top", fontsize=8.5)


# --- who sees whom ----------------------------------------------------------------------------


def mask_figure(masks: Mapping[str, np.ndarray], *, title: str) -> Figure:
    """Each mask [T, S] as cells: a row is a token that looks, a column one that may be seen."""
    with matplotlib.rc_context(STYLE):
        canvas, places = _cards(1, len(masks), 2.45, title)
        told = []
        for axes, (name, mask) in zip(places, masks.items(), strict=True):
            mask = np.asarray(mask)
            queries, keys = mask.shape
            axes.set_title(name, fontsize=10)
            axes.set(xlim=(0, keys), ylim=(queries, 0), aspect="equal", xticks=[], yticks=[], xlabel="sees")
            axes.spines[:].set_color(GREY)
            for query, key in itertools.product(range(queries), range(keys)):
                colour = BLUE if mask[query, key] else "#f1f3f4"
                axes.add_patch(Rectangle((key + 0.06, query + 0.06), 0.88, 0.88, color=colour, lw=0))
            told.append(f"{name}: {int(mask.sum())} of {mask.size} pairs")
        places[0].set_ylabel("token")
        return finish(canvas, f"Attention masks, {title}: " + "; ".join(told) + ".")


# --- where the parameters are -----------------------------------------------------------------


def parameters_figure(configs: Mapping[str, ModelConfig], *, title: str) -> Figure:
    """Two bars per model, as shares of all its parameters: what there is, and what one token uses."""
    with matplotlib.rc_context(STYLE):
        canvas, (axes,) = _cards(1, 1, 0.9 + 0.47 * len(configs), title)
        axes.set(xlim=(0, 1), ylim=(len(configs) - 0.25, -0.25))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_yticks([row + 0.22 for row in range(len(configs))], list(configs))
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("share of all parameters")
        told = []
        for row, (name, config) in enumerate(configs.items()):
            counts = architecture.parameter_shares(config)
            total, active, left = sum(counts.values()), architecture.active_parameters(config), 0.0
            for part, count in counts.items():
                axes.barh(row + 0.16, count / total, 0.4, left, color=PART_COLOURS[part], edgecolor="white", lw=0.6)
                left += count / total
            axes.barh(row + 0.45, active / total, 0.12, color=GREY)
            words = f"{billions(total)}" + f"\n{billions(active)} active" * (active < total)
            axes.text(1.015, row + 0.24, words, va="center", fontsize=9.5, transform=axes.get_yaxis_transform())
            told.append(f"{name} {billions(active)} of {billions(total)}")
        handles = [Patch(color=colour, label=part) for part, colour in PART_COLOURS.items()]
        handles += [Patch(color=GREY, label="used by one token")]
        canvas.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
        return finish(canvas, f"Stacked bars, {title}, used of all: " + "; ".join(told) + ".")


def billions(count: float) -> str:
    """A number of parameters with three digits: 124M, 8.03B, 671B."""
    scaled, unit = (count / 1e9, "B") if count >= 1e9 else (count / 1e6, "M")
    return f"{scaled:.3g}{unit}"


# --- what a token costs -----------------------------------------------------------------------


def cache_figure(configs: Mapping[str, ModelConfig], *, title: str, contexts: Sequence[int]) -> Figure:
    """Kilobytes of cache per token of context, in bfloat16, against the length of the context."""
    with matplotlib.rc_context(STYLE):
        canvas, (axes,) = _cards(1, 1, 4.2, title)
        _plot_area(axes, "tokens in the context", "cache per token (KiB, bfloat16)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(contexts, [f"{n // 1024}K" for n in contexts])
        axes.yaxis.set_major_formatter("{x:g}")
        curves = {
            name: [architecture.cache_bytes(config, n) / n / 1024 for n in contexts] for name, config in configs.items()
        }
        _labelled_lines(axes, list(contexts), curves)
        axes.set_xlim(contexts[0], contexts[-1])
        told = [f"{name} {c[0]:.0f} to {c[-1]:.0f} KiB" for name, c in curves.items()]
        return finish(
            canvas, f"Line chart, {title}, from {contexts[0]:,} to {contexts[-1]:,} tokens: " + "; ".join(told) + "."
        )


def _plot_area(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def _labelled_lines(axes: Axes, x: Sequence[float], curves: Mapping[str, Sequence[float]]) -> None:
    """Lines whose names stand at their right ends, moved apart where they would touch (on a logarithmic axis)."""
    styles = itertools.cycle(("-", "--"))
    ends = sorted((values[-1], name) for name, values in curves.items())
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    step, places, at = np.log2(high / low) / 15, {}, -np.inf
    for value, name in ends:
        at = max(np.log2(value), at + step)
        places[name] = 2.0**at
    for (name, values), colour, style in zip(curves.items(), itertools.cycle(COLOURS), styles, strict=False):
        axes.plot(x, values, color=colour, lw=2, ls=style)
        leader = {"arrowstyle": "-", "color": colour, "lw": 1.2, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(name, (x[-1], values[-1]), (1.02, places[name]), textcoords=axes.get_yaxis_transform(),
                      color=INK, fontsize=9.5, va="center", annotation_clip=False, arrowprops=leader)  # fmt: skip


# --- RoPE -------------------------------------------------------------------------------------


def rope_figure(
    scalings: Mapping[str, RopeScaling], *, dim: int, theta: float, trained: int, longest: int, title: str
) -> Figure:
    """By how much each pair of dimensions is slowed down, against its wavelength in tokens before scaling."""
    plain = architecture.rope_frequencies(dim, theta, None, longest)
    wavelength = 2 * np.pi / plain
    with matplotlib.rc_context(STYLE):
        canvas, (axes,) = _cards(1, 1, 4.2, title)
        _plot_area(axes, "wavelength of a pair before scaling (tokens)", "slowed down by")
        axes.set_xscale("log")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}×")
        told = []
        for (name, scaling), colour, style in zip(scalings.items(), COLOURS, itertools.cycle(("-", "--", "-.", ":"))):
            slower = plain / architecture.rope_frequencies(dim, theta, scaling, longest)
            axes.plot(wavelength, slower, color=colour, ls=style, lw=2, label=name, marker="o", ms=2.5)
            told.append(f"{name} {slower[0]:.2g} to {slower[-1]:.2g} times")
        axes.axvline(trained, color=INK, lw=1.2, ls="--")
        axes.annotate(
            "trained length ", (trained, 1), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=9.5
        )
        axes.legend(frameon=False, fontsize=9.5, loc="upper left", bbox_to_anchor=(0.0, 0.93))
        return finish(canvas, f"Line chart, {title}, shortest to longest wave: " + "; ".join(told) + ".")
