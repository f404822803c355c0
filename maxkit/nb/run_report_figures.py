# SPDX-License-Identifier: Apache-2.0
"""Runs side by side as figures: curves, seconds by phase, peak memory. One figure for a notebook, or panel by panel.

Eighteen runs are told apart: six colours, each with a contrast above 3 : 1 on white, times three kinds of line.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from maxkit.nb.figures import FAINT, STYLE, Figure, finish

RUN_COLOURS = ("#0072b2", "#d55e00", "#00845f", "#b3568c", "#a67300", "#444746")
RUN_LINES = ("-", (0, (4, 1.6)), (0, (1, 1.3)))
# Setup, compilation and the rest are greys, so that training stands out.
PHASES = {"setup": "#9aa0a6", "compile": "#5f6368", "train": "#0072b2", "the rest": "#c4c7cc"}
SMOOTHED_FROM = 60  # points
FEW = 3  # runs whose single updates are drawn behind the means
WIDE, PANEL = 7.2, 4.2  # inches


class Series(NamedTuple):
    """A run's line or bar: its name, what the legend adds to it, and its place among the runs."""

    name: str
    legend: str
    place: int

    @property
    def colour(self) -> str:
        """One of six."""
        return RUN_COLOURS[self.place % len(RUN_COLOURS)]

    @property
    def line(self) -> Any:
        """Solid, dashed from the seventh run on, dotted from the thirteenth."""
        return RUN_LINES[self.place // len(RUN_COLOURS)]


class Curves(NamedTuple):
    """A chart: per run its (x, value) points; nan breaks a line."""

    title: str
    ylabel: str
    xlabel: str
    points: dict[Series, list[tuple[float, float]]]


class Bars(NamedTuple):
    """A bar per run, of one part or several: {run: {part: value}}; a run without parts says why."""

    title: str
    parts: dict[Series, dict[str, float]]
    totals: dict[Series, str]


Panel = Curves | Bars


def runs_figure(title: str, panels: Sequence[Panel], alt: str) -> Figure:
    """All panels on one card: curves above, bars below, a legend between them where there are several runs."""
    rows = [[p for p in panels if isinstance(p, kind)] for kind in (Curves, Bars)]
    rows = [row for row in rows if row]
    runs = sorted({run for panel in panels for run in _runs(panel)}, key=lambda run: run.place)
    several = len(runs) > 1 and isinstance(rows[0][0], Curves)
    columns = max(1, min(len(runs), 4, 105 // (max(len(run.legend) for run in runs) + 8)))
    heights = [2.6 if isinstance(row[0], Curves) else _bars_height(len(runs)) for row in rows]
    if several:
        heights.insert(0, 0.06 + 0.19 * -(-len(runs) // columns))
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(WIDE, 0.35 + sum(heights)), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
        areas = iter(canvas.add_gridspec(len(heights), 1, height_ratios=heights))
        if several:
            _draw_legend(canvas.add_subplot(next(areas)), runs, columns)
        for area, row in zip(areas, rows, strict=True):
            weights = [1.45 if i == 0 and isinstance(p, Bars) and len(row) > 1 else 1 for i, p in enumerate(row)]
            places = area.subgridspec(1, len(row), width_ratios=weights)
            for i, panel in enumerate(row):
                _draw(canvas.add_subplot(places[0, i]), panel, named=i == 0)
        return finish(canvas, alt)


def panel_figure(panel: Panel, alt: str) -> Figure:
    """One panel as a figure of its own, for a page that lays them out itself and has its own headings and legend."""
    height = 2.65 if isinstance(panel, Curves) else _bars_height(len(panel.parts))
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(PANEL, height), layout="constrained", facecolor="white")
        _draw(canvas.subplots(), panel, named=True, titled=False)
        return finish(canvas, alt)


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a thirtieth of the curve around each point, over less at its ends; nan stays, and counts nothing."""
    given = np.asarray(values, dtype=float)
    half = len(given) // 60
    means = []
    for i, value in enumerate(given):
        reach = min(half, i, len(given) - 1 - i)
        around = given[i - reach : i + reach + 1]
        means.append(float(np.mean(around[np.isfinite(around)])) if math.isfinite(value) else math.nan)
    return means


def is_smoothed(panel: Panel) -> bool:
    """Whether lines of it are means."""
    return isinstance(panel, Curves) and any(len(points) >= SMOOTHED_FROM for points in panel.points.values())


def _draw_legend(axes: Axes, runs: Sequence[Series], columns: int) -> None:
    lines = [Line2D([], [], color=run.colour, linestyle=run.line, linewidth=2) for run in runs]
    axes.axis("off")
    tight = {"frameon": False, "borderaxespad": 0, "borderpad": 0, "columnspacing": 1.4, "handlelength": 2.4}
    names = [run.legend for run in runs]
    axes.legend(lines, names, loc="upper left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, fontsize=9, **tight)


def _runs(panel: Panel) -> list[Series]:
    return list(panel.points if isinstance(panel, Curves) else panel.parts)


def _bars_height(runs: int) -> float:
    return 0.85 + 0.24 * runs


def _draw(axes: Axes, panel: Panel, *, named: bool, titled: bool = True) -> None:
    if isinstance(panel, Curves):
        _draw_curves(axes, panel)
    else:
        _draw_bars(axes, panel, named)
    if titled:
        axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.set_facecolor("white")


def _draw_curves(axes: Axes, panel: Curves) -> None:
    few = len(panel.points) <= FEW
    for run, points in panel.points.items():
        if not points:
            continue
        at = [x for x, _ in points]
        shown = values = [v if math.isfinite(v) else math.nan for _, v in points]
        if len(points) >= SMOOTHED_FROM:
            shown = smoothed(values)
            if few:
                axes.plot(at, values, color=run.colour, linewidth=0.8, alpha=0.28)
        marker = "o" if len(points) <= 30 else None
        # Between the two ends of a record nothing is known: the line only joins them.
        joined = len(points) == 2 < max(map(len, panel.points.values()))
        width = 0.7 if joined else 1.8
        axes.plot(at, shown, color=run.colour, linestyle=run.line, linewidth=width, marker=marker, markersize=3.2)
    finite = [v for points in panel.points.values() for _, v in points if math.isfinite(v)]
    if finite and min(finite) > 0 and max(finite) > 50 * min(finite):
        axes.set_yscale("log")
    axes.set_xlabel(panel.xlabel, fontsize=9.5)
    axes.set_ylabel(panel.ylabel, fontsize=9.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if panel.xlabel == "tokens" else "{x:,.0f}")
    axes.grid(True, color=FAINT, linewidth=0.7)


def _draw_bars(axes: Axes, panel: Bars, named: bool) -> None:
    places = range(len(panel.parts))
    names = list(dict.fromkeys(name for parts in panel.parts.values() for name in parts))
    ends = [0.0] * len(panel.parts)
    for name in names:
        values = [parts.get(name, 0.0) for parts in panel.parts.values()]
        colours = [PHASES.get(name) or run.colour for run in panel.parts]
        axes.barh(places, values, left=ends, height=0.62, color=colours, label=name)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    for place, (end, text) in enumerate(zip(ends, panel.totals.values(), strict=True)):
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [run.name for run in panel.parts] if named else [""] * len(panel.parts))
    axes.set_ylim(len(panel.parts) - 0.4, -0.6)  # the first run on top
    axes.set_xlim(0, (max(ends) or 1.0) * 1.32)  # room for the totals
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False)
    if set(names) & set(PHASES):
        tight = {
            "frameon": False,
            "borderaxespad": 0.2,
            "columnspacing": 1.0,
            "handlelength": 0.9,
            "handletextpad": 0.4,
        }
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.02), ncols=4, fontsize=8.5, **tight)
