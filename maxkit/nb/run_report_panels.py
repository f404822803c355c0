# SPDX-License-Identifier: Apache-2.0
"""What there is to draw of some runs, and what it says in words."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from maxkit.nb.cards import show
from maxkit.nb.progress import duration
from maxkit.nb.reported_run import HELD_OUT
from maxkit.nb.run_report_figures import PHASES, Bars, Curves, Panel, Series
from maxkit.nb.run_report_table import metric_label, size

if TYPE_CHECKING:
    from maxkit.nb.run_report import RunReport

LONGEST_ALT = 250  # what the guards of the notebooks allow


def panels(report: "RunReport") -> list[tuple[Panel, str]]:
    """Curves, seconds by phase and peak memory, as far as the runs have them, each with a sentence."""
    found: list[Panel] = [_curves(report, name) for name in report.curves]
    found += [panel for panel in (_times(report), _memory(report)) if panel is not None]
    return [(panel, _sentence(panel)) for panel in found]


def alt_text(report: "RunReport") -> str:
    """What the whole figure shows: as many of the panels' sentences as an alt text may hold."""
    text = f"{report.title}."
    for _, sentence in report.panels:
        if len(text) + len(sentence) + 1 <= LONGEST_ALT:
            text += f" {sentence}"
    return text


def _curves(report: "RunReport", name: str) -> Curves:
    points = {}
    for run, series in zip(report.runs, report.series, strict=True):
        scale = run.tokens_per_update if report.over == "tokens" else 1
        curve = [(float(step * scale), value) for step, value in run.curve(name)]
        if curve:
            points[series] = curve
    unit = report.measure.unit
    bare = name.removeprefix(HELD_OUT)
    ylabel = f"{bare} ({unit})" if unit and bare in (report.measure.training, report.measure.held_out) else bare
    label = metric_label(name)
    return Curves(label[0].upper() + label[1:], ylabel, "tokens" if report.over == "tokens" else "updates", points)


def _times(report: "RunReport") -> Bars | None:
    parts: dict[Series, dict[str, float]] = {}
    totals: dict[Series, str] = {}
    for run, series in zip(report.runs, report.series, strict=True):
        known = {name: run.seconds[name] for name in PHASES if run.seconds.get(name)}
        total = run.seconds.get("total", sum(known.values()))
        rest = total - sum(known.values())
        parts[series] = known | ({"the rest": rest} if rest > 0.01 * total else {})
        totals[series] = duration(total) if total else "not finished"
    return Bars("Time", parts, totals) if any(parts.values()) else None


def _memory(report: "RunReport") -> Bars | None:
    peaks = {s: run.peak_memory for run, s in zip(report.runs, report.series, strict=True)}
    if not any(peaks.values()):
        return None
    parts = {series: {"peak": float(peak or 0)} for series, peak in peaks.items()}
    return Bars("Peak memory", parts, {series: size(peak) if peak else "-" for series, peak in peaks.items()})


def _sentence(panel: Panel) -> str:
    """The last values of curves, the totals of bars; of more than three runs the ends of the range."""
    if isinstance(panel, Bars):
        sums = {run.name: (sum(parts.values()), panel.totals[run]) for run, parts in panel.parts.items()}
        sums = {name: found for name, found in sums.items() if found[0]}
        return f"{panel.title}: {_told(sums)}."
    ends = {}
    for run, points in panel.points.items():
        finite = [value for _, value in points if math.isfinite(value)]
        if finite:
            ends[run.name] = (finite[-1], show(float(f"{finite[-1]:.3g}")))
    return f"{panel.title} at the end: {_told(ends)}." if ends else f"{panel.title}: nothing finite."


def _told(values: Mapping[str, tuple[float, str]]) -> str:
    if len(values) <= 3:
        return ", ".join(f"{name} {text}" if len(values) > 1 else text for name, (_, text) in values.items())
    low, high = (choose(values, key=lambda name: values[name][0]) for choose in (min, max))
    return f"from {values[low][1]} ({low}) to {values[high][1]} ({high})"
