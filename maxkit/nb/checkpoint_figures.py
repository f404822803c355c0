# SPDX-License-Identifier: Apache-2.0
"""Pictures of checkpoints: what weighs how much, one tree in both layouts, what a flipped bit does.

Drawn from an opened checkpoint (`checkpoint/open.py`) or an architecture, never from numbers written here; cards as in
`figures.py`. Blue is attention and orange the MLP, as in `architecture_figures.py`.
"""

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch, Rectangle

from maxkit.errors import UserError
from maxkit.formats.contents import WEIGHTS, Contents
from maxkit.models.config import Execution, ModelConfig
from maxkit.models.definition import ModelDefinition
from maxkit.nb.figures import COLOURS, FAINT, INK, STYLE, Figure, finish

BLUE, VERMILLION, GREEN, _, ORANGE, SKY = COLOURS
PARTS = {"embedding and head": SKY, "attention": BLUE, "MLP": ORANGE, "norms": INK}
WIDTH = 7.2
MONO: dict[str, Any] = {"family": "monospace", "fontsize": 8.5}


def _canvas(height: float, title: str) -> Canvas:
    canvas = Canvas(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
    return canvas


# --- what weighs how much ---------------------------------------------------------------------


def sizes_by_tensor(contents: Contents) -> dict[str, dict[str, Any]]:
    """{kind of tensor: {"layers", "shape", "params": bytes, "mu": bytes, ...}}: all layers of one path together."""
    kinds: dict[str, dict[str, Any]] = {}
    for slot in contents.slots:
        for path, layer in contents.addresses(slot):
            shape = contents.shape(path, layer, slot)
            row = kinds.setdefault(path, {"layers": 0, "shape": shape})
            row["layers"] += slot == WEIGHTS and layer is not None
            row[slot] = row.get(slot, 0) + math.prod(shape) * np.dtype(contents.dtype(path, layer, slot)).itemsize
    return kinds


def sizes_figure(contents: Contents, *, title: str, save_as: Any = None) -> Figure:
    """A bar per kind of tensor: its bytes over all layers; fainter bars behind it are the optimizer's statistics."""
    kinds = sizes_by_tensor(contents)
    slots = [slot for slot in contents.slots if any(slot in row for row in kinds.values())]
    unit, name = _unit(max(sum(row.get(slot, 0) for slot in slots) for row in kinds.values()))
    with matplotlib.rc_context(STYLE):
        canvas = _canvas(1.45 + 0.3 * len(kinds), title)
        axes = canvas.add_subplot(facecolor="white")
        for y, (path, row) in enumerate(kinds.items()):
            left = 0.0
            for shade, slot in zip((1.0, 0.45, 0.22), slots, strict=False):
                width = row.get(slot, 0) / unit
                axes.barh(y, width, 0.72, left=left, color=PARTS[_part(path)], alpha=shade, linewidth=0)
                left += width
            count = f"{row['layers']} x " if row["layers"] else ""
            axes.text(left, y, f"  {count}{list(row['shape'])}", va="center", fontsize=8.5)
        axes.set_yticks(range(len(kinds)), list(kinds), **MONO)
        axes.invert_yaxis()
        axes.margins(x=0.28, y=0.02)
        axes.set_xlim(left=0)
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="x", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        used = {_part(path) for path in kinds}
        keys = [Patch(color=colour, label=part) for part, colour in PARTS.items() if part in used]
        shades = zip((1.0, 0.45, 0.22), slots, strict=False)
        keys += [Patch(color="#5f6368", alpha=a, label=s) for a, s in shades] if len(slots) > 1 else []
        canvas.legend(handles=keys, frameon=False, fontsize=9, loc="outside lower right", ncols=min(4, len(keys)))
        totals = {slot: sum(row.get(slot, 0) for row in kinds.values()) / unit for slot in slots}
        told = ", ".join(f"{slot} {total:.4g} {name}" for slot, total in totals.items())
        largest = max(kinds, key=lambda path: kinds[path].get(WEIGHTS, 0))
        return finish(canvas, f"Bar chart, {title}: {len(kinds)} kinds of tensor, {told}; largest {largest}.", save_as)


def _unit(largest: float) -> tuple[float, str]:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= unit:
            return unit, name
    return 1.0, "bytes"


def _part(path: str) -> str:
    if path.rpartition("/")[0].endswith("norm"):
        return "norms"
    if not path.startswith("layers/"):
        return "embedding and head"
    return "MLP" if path.startswith("layers/mlp/") else "attention"


# --- one tree, two layouts --------------------------------------------------------------------


def layout_figure(config: ModelConfig, tensors: tuple[str, ...], *, title: str, save_as: Any = None) -> Figure:
    """The arrays that hold `tensors` (paths below a layer) when scanned and unrolled; a cell is one layer's part.

    Raises:
        UserError: the model has none of these tensors.
    """
    panels = {scan: _arrays(config, tensors, scan) for scan in (True, False)}
    if not all(panels.values()):
        raise UserError(f"layout_figure: no layer of this model has {', '.join(tensors)}")
    rows = max(map(len, panels.values()))
    with matplotlib.rc_context(STYLE):
        canvas = _canvas(1.35 + 0.245 * rows, title)
        for axes, (scan, arrays) in zip(canvas.subplots(1, 2), panels.items(), strict=True):
            _draw_arrays(axes, arrays, config.num_layers, rows)
            count = f"{len(arrays)} arrays" if len(arrays) > 1 else "1 array"
            axes.set_title(f"scan_layers={str(scan).lower()}: {count}", fontsize=10.5, loc="left")
        counts = " and ".join(f"scan_layers={scan} {len(arrays)} arrays" for scan, arrays in panels.items())
        first = next(iter(panels[True]))
        alt = f"Diagram, {title}: {counts} for the same {config.num_layers} layers; the first stack is {first}."
        return finish(canvas, alt, save_as)


def _arrays(config: ModelConfig, tensors: tuple[str, ...], scan: bool) -> dict[str, tuple[int, ...]]:
    """{path of an array: the layers that it holds}."""
    parameters = ModelDefinition(config, Execution(scan_layers=scan)).parameters.values()
    held = [p for p in parameters if p.layers is not None and p.address.removeprefix("layers/") in tensors]
    return {p.path: p.layers for p in sorted(held, key=lambda p: (p.layers, p.path))}


def _draw_arrays(axes: Axes, arrays: dict[str, tuple[int, ...]], num_layers: int, rows: int) -> None:
    """A row per array: its path, and below it a cell with the number of each layer it holds."""
    colours = matplotlib.colormaps["YlGnBu"](np.linspace(0.12, 0.72, num_layers))
    for y, (path, layers) in enumerate(arrays.items()):
        for place, layer in enumerate(layers):
            left = 10.8 + place * 0.95
            dark = layer > 0.7 * num_layers
            axes.add_patch(Rectangle((left, y + 0.1), 0.95, 0.8, facecolor=colours[layer], edgecolor=INK, lw=0.8))
            ink = "white" if dark else INK
            axes.text(left + 0.475, y + 0.52, str(layer), ha="center", va="center", fontsize=8, color=ink)
        axes.text(10.5, y + 0.52, path, ha="right", va="center", family="monospace", fontsize=7.4)
    axes.set_xlim(-0.4, 10.8 + 0.95 * max(4, max(map(len, arrays.values()))) + 0.1)
    axes.set_ylim(rows, 0)
    axes.axis("off")


# --- a flipped bit ----------------------------------------------------------------------------


def bits_figure(value: float, *, title: str, save_as: Any = None) -> Figure:
    """How far a float32 moves, relative to itself, when one of its 32 bits is flipped."""
    word = np.float32(value).view(np.uint32)
    flipped = (word ^ (np.uint32(1) << np.arange(32, dtype=np.uint32))).view(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):
        change = np.abs(flipped - float(np.float32(value))) / abs(value)
    change = np.where(np.isfinite(change), change, float(np.finfo(np.float32).max))
    fields = {"fraction": (0, 23, BLUE), "exponent": (23, 31, VERMILLION), "sign": (31, 32, GREEN)}
    with matplotlib.rc_context(STYLE):
        canvas = _canvas(3.6, title)
        axes = canvas.add_subplot(facecolor="white")
        axes.axhline(1.0, color=INK, lw=1, ls="--", zorder=1)
        axes.text(0, 2.5, "the value itself", fontsize=9, va="bottom")
        for name, (low, high, colour) in fields.items():
            at = np.arange(low, high)
            axes.vlines(at, 1e-9, change[at], color=colour, lw=1.2, alpha=0.5)
            axes.plot(at, change[at], "o", color=colour, ms=5, label=name)
        axes.set_yscale("log")
        axes.set_ylim(1e-8, 10 * change.max())
        axes.set_xlabel(f"bit of {value:.4g} that is flipped")
        axes.set_ylabel("change, relative to the value")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9.5, loc="upper left", bbox_to_anchor=(0, 0.93))
        ends = f"from {change.min():.1e} (last bit of the fraction) to {change.max():.1e} (highest bit of the exponent)"
        return finish(canvas, f"Dot chart, {title}: the change of one float32 of {value:.4g} is {ends}.", save_as)
