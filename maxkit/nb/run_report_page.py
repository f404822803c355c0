# SPDX-License-Identifier: Apache-2.0
"""Runs side by side as one page of HTML: nothing is loaded, light and dark follow the reader's system.

Figures stand in the page as SVG whose colours are replaced by the page's own, so that both themes are drawn, not
inverted. Panels lie beside each other where there is room and below each other on a phone.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maxkit.nb.cards import escape
from maxkit.nb.figures import FAINT, INK
from maxkit.nb.run_report_figures import FEW, PHASES, RUN_COLOURS, is_smoothed, panel_figure
from maxkit.nb.run_report_table import parameter
from maxkit.nb.side_by_side import Row, Section, as_html

if TYPE_CHECKING:
    from maxkit.nb.reported_run import ReportedRun
    from maxkit.nb.run_report import RunReport
    from maxkit.nb.run_report_figures import Series

GENERATOR = "maxkit report"  # how a page of ours is known
# Per colour of the figures: its name in the page, light, dark. On their grounds lines have a contrast above 3 : 1.
GREYS = dict(zip(("setup", "compile", "the rest"), ("#70757a", "#bdc1c6", "#5f6368"), strict=True))
COLOURS = {
    INK: ("ink", INK, "#e8eaed"),
    FAINT: ("faint", FAINT, "#3c4043"),
    **{PHASES[name]: (f"phase-{i}", PHASES[name], dark) for i, (name, dark) in enumerate(GREYS.items())},
    **{
        light: (f"run-{i}", light, dark)
        for i, (light, dark) in enumerate(
            zip(RUN_COLOURS, ("#5aaeea", "#f28a4b", "#2fbf94", "#e08fc0", "#e3b341", "#c9ccd1"), strict=True)
        )
    },
}
STYLE = Path(__file__).with_suffix(".css").with_stem("run_report")


def page(report: "RunReport") -> str:
    """The whole document."""
    legend = "".join(map(_chip, report.series, report.runs)) if len(report.runs) > 1 else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    every = _every_parameter(report)
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="lead">{escape(report.lead)}</p>' if report.lead else "",
        f'<ul class="runs" aria-label="Runs">{legend}</ul>' if legend else "",
        f'<section class="panels" aria-label="Figures">{_panels(report)}</section>',
        f'<section class="notes"><h2>What is missing or odd</h2><ul>{notes}</ul></section>' if notes else "",
        f'<section class="table">{_table(report)}</section>',
        f"<details><summary>All parameters</summary>{every}</details>" if every else "",
        "<footer>Made by <code>maxkit report</code>. The numbers: <code>--json</code>.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="{GENERATOR}"><link rel="icon" href="data:,">'
        f"<title>{escape(report.title)}</title><style>{_style()}</style></head>\n<body><main>"
        + "\n".join(filter(None, parts))
        + "</main></body></html>\n"
    )


def _chip(series: "Series", run: "ReportedRun") -> str:
    """A run in the legend: its line, its name, what differs, how it ended."""
    dash = ("", "7 3", "2 2")[series.place // len(RUN_COLOURS)]
    stroke = f'stroke="var(--run-{series.place % len(RUN_COLOURS)})" stroke-width="4" stroke-dasharray="{dash}"'
    told = series.legend.removeprefix(series.name).strip(" ()")
    failed = sum(not check.get("passed") for check in run.checks)
    ended = "" if run.finished else "not finished"
    ended = f"{failed} of {len(run.checks)} checks failed" if failed else ended
    small = " · ".join(filter(None, (told, ended)))
    return (
        f'<li><svg viewBox="0 0 26 6" aria-hidden="true"><path d="M0 3H26" fill="none" {stroke}/></svg>'
        f"<span>{escape(series.name)} {f'<small>{escape(small)}</small>' if small else ''}</span></li>"
    )


def _panels(report: "RunReport") -> str:
    """Each panel under its heading; curves that were smoothed say so."""
    shown = ""
    for number, (panel, sentence) in enumerate(report.panels):
        said = "Each line is a mean over a thirtieth of the curve" if is_smoothed(panel) else ""
        said += "; behind it single updates." if said and len(report.runs) <= FEW else "." if said else ""
        drawn = _inline(panel_figure(panel, sentence).svg, f"p{number}-", sentence)
        shown += f"<figure><h2>{escape(panel.title)}</h2>{drawn}{f'<p>{said}</p>' if said else ''}</figure>"
    return shown


def _inline(svg: str, prefix: str, label: str) -> str:
    """A figure of matplotlib as part of a page: ids of its own, the page's colours, no ground, no metadata."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>", "", svg, flags=re.S)
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]+)"[^>]*>', rf'<svg role="img" aria-label="{escape(label)}" viewBox="\1">', svg
    )
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}", svg)
    svg = svg.replace("fill: #ffffff", "fill: none")
    for colour, (name, _, _) in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()


def _table(report: "RunReport") -> str:
    heads = [escape(name) for name in report.columns]
    return _scroll(as_html(report.columns, report.sections, heads=heads), "Side by side")


def _every_parameter(report: "RunReport") -> str:
    """All parameters of all runs, in the order of the first that has them."""
    names = dict.fromkeys(name for run in report.runs for name in run.parameters)
    rows = [Row(name, [_value(run.parameters, name) for run in report.runs]) for name in names]
    if not rows:
        return ""
    return _scroll(as_html(report.names, [Section("parameters", rows)]), "All parameters")


def _value(parameters: Mapping[str, Any], name: str) -> str:
    return parameter(parameters[name]) if name in parameters else "not recorded"


def _scroll(table: str, label: str) -> str:
    """A table that may be wider than the page, for hands, mice and keys."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">{table}</div>'


def _style() -> str:
    light, dark = (" ".join(f"--{c[0]}: {c[which]};" for c in COLOURS.values()) for which in (1, 2))
    return STYLE.read_text(encoding="utf-8").replace("LIGHT", light).replace("DARK", dark)
