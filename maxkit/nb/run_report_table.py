# SPDX-License-Identifier: Apache-2.0
"""The table of some runs: what differs in what was asked for, what came of it, what it took."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from maxkit.config import RECIPES
from maxkit.nb.cards import expectation, show
from maxkit.nb.progress import duration
from maxkit.nb.reported_run import AT_STEP, HELD_OUT, ReportedRun, number
from maxkit.nb.side_by_side import Row, Section

if TYPE_CHECKING:
    from maxkit.nb.run_report import RunReport

IDENTITY = "run_dir"  # where a run lies is not what it does


class _Absent:
    def __repr__(self) -> str:
        return "not recorded"


ABSENT = _Absent()


def differing(parameters: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """{name: the value of each}, of the names whose values differ among those that have one."""
    found = {}
    for name in dict.fromkeys(name for given in parameters for name in given):
        values = [given.get(name, ABSENT) for given in parameters]
        kinds = {json.dumps(value, sort_keys=True, default=str) for value in values if value is not ABSENT}
        if len(kinds) > 1 and name != IDENTITY:
            found[name] = values
    return found


def parameter(value: Any) -> str:
    """A parameter's value for people: a text that is empty, and a choice that was left open, are seen as such."""
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(parameter, value)) or "none"
    return elided('""' if value == "" else str(value) if isinstance(value, _Absent) else show(value), 44)


def elided(text: str, length: int) -> str:
    """The text, or its two ends."""
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"


def metric_label(name: str) -> str:
    """A metric in words: "training loss", "held-out kl"."""
    name = re.sub(r"^held_out/", "held-out ", name)
    return "training loss" if name == "loss" else "training reward" if name == "reward" else name


def sections(report: "RunReport") -> list[Section]:
    """All sections; those that the runs say nothing on have no rows."""
    runs, extra = report.runs, [""] * (len(report.columns) - len(report.runs))

    def row(label: str, value: Callable[[ReportedRun], Any]) -> Row:
        return Row(label, [str(value(run)) for run in runs] + extra)

    facts = [row("folder", lambda run: elided(run.path, 28))]
    if any(run.steps_done or "steps" in run.parameters for run in runs):
        facts.append(row("updates", _updates))
    if any("device_kind" in run.environment or "platform" in run.environment for run in runs):
        facts.append(row("devices", _devices))
    return [
        Section("run", facts),
        _parameter_section(report),
        Section("results", _results(report)),
        Section("time", _rows(runs, TIMES, relative=True)),
        Section("memory", _rows(runs, MEMORY, relative=True)),
        Section("checks", _checks(runs, extra)),
        Section("environment that differs", _environment(runs, extra)),
    ]


def _updates(run: ReportedRun) -> str:
    total = run.parameters.get("steps")
    of = f" of {total:,}" if isinstance(total, int) and total != run.steps_done else ""
    return f"{run.steps_done:,}{of}"


def _devices(run: ReportedRun) -> str:
    environment = run.environment
    kind = environment.get("device_kind") or environment.get("platform")
    return f"{environment.get('devices', 1)} x {kind}" if kind else "-"


def _parameter_section(report: "RunReport") -> Section:
    runs = report.runs
    if len(runs) > 1:
        rows = [Row(name, [parameter(v) for v in values]) for name, values in report.differing.items()]
        extra = [""] * (len(report.columns) - len(runs))
        rows = [Row(r.label, [*r.cells, *extra]) for r in rows] or [Row("none", [""] * len(report.columns))]
        return Section("parameters that differ", rows)
    given, rows = runs[0].parameters, []
    fields = RECIPES[report.recipe].config.model_fields if report.recipe in RECIPES else {}
    for name, value in given.items():
        default = fields[name].default if name in fields else ABSENT
        if name != IDENTITY and json.dumps(value, default=str) != json.dumps(default, default=str):
            rows.append(Row(name, [parameter(value), "-" if default is ABSENT else parameter(default)]))
    return Section("parameters that are not the default", rows)


def _results(report: "RunReport") -> list[Row]:
    """First and last of each curve, then what else the records measured."""
    runs, rows = report.runs, []
    names = dict.fromkeys([HELD_OUT + report.measure.held_out, report.measure.training, *report.curves])
    for name in names:
        curves = [finite(run.curve(name)) or _recorded_ends(run, name) for run in runs]
        if any(curves):
            label = metric_label(name)
            best = report.measure.better if name == HELD_OUT + report.measure.held_out else None
            rows.append(_ends(f"{label}, first", [curve[0] if curve else None for curve in curves]))
            rows.append(_ends(f"{label}, last", [curve[-1] if curve else None for curve in curves], best=best))
    known = {"loss/first", "loss/last", "held_out/before", "held_out/after"}
    others = dict.fromkeys(
        name for run in runs for name in run.metrics if name not in known and not name.startswith("perf/")
    )
    for name in others:
        if not AT_STEP.fullmatch(name):
            rows.append(_numbers(name, [run.metrics.get(name) for run in runs]))
    return rows


def _recorded_ends(run: ReportedRun, name: str) -> list[tuple[int, float]]:
    """The first and the last update of a metric, where a record without its rows tells them."""
    ends = ((1, run.metrics.get(f"{name}/first")), (run.steps_done, run.metrics.get(f"{name}/last")))
    return finite([(step, number(value)) for step, value in ends if value is not None])


class _Quantity(NamedTuple):
    label: str
    of: Callable[[ReportedRun], float | None]
    shown: Callable[[float], str]


def _phase(name: str) -> Callable[[ReportedRun], float | None]:
    return lambda run: run.seconds.get(name)


def _moment(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else f"{1000 * seconds:.3g} ms"


TIMES = (
    _Quantity("setup", _phase("setup"), duration),
    _Quantity("compile", _phase("compile"), duration),
    _Quantity("train", _phase("train"), duration),
    _Quantity("total", _phase("total"), duration),
    _Quantity("per update, median", lambda run: run.seconds_per_update, _moment),
    _Quantity("tokens per second", lambda run: run.tokens_per_second, lambda value: f"{value:,.0f}"),
)
MEMORY = (_Quantity("peak", lambda run: run.peak_memory, lambda value: size(value)),)


def size(value: float) -> str:
    """Bytes for people."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _rows(runs: Sequence[ReportedRun], quantities: Sequence[_Quantity], *, relative: bool) -> list[Row]:
    rows = []
    for label, of, shown in quantities:
        values = [of(run) for run in runs]
        if any(value is not None for value in values):
            cells = ["-" if value is None else shown(value) for value in values]
            rows.append(Row(label, cells + _extra(values, relative)))
    return rows


def _ends(label: str, points: Sequence[tuple[int, float] | None], *, best: Callable | None = None) -> Row:
    """A row of ends of curves; where they are not all of one update, each says of which."""
    row = _numbers(label, [point and point[1] for point in points], best=best)
    if len({point[0] for point in points if point}) <= 1:
        return row
    cells = [f"{cell} at {point[0]:,}" if point else cell for cell, point in zip(row.cells, points)]
    return Row(label, [*cells, *row.cells[len(points) :]], row.best)


def _numbers(label: str, values: Sequence[Any], *, best: Callable | None = None) -> Row:
    """A row of results; `best` (min or max) sets the best of several in bold."""
    cells = measured(*values)
    numbers = {i: number(v) for i, v in enumerate(values) if v is not None and math.isfinite(number(v))}
    chosen = best(numbers, key=numbers.__getitem__) if best and len(numbers) > 1 else None
    if chosen is not None and cells.count(cells[chosen]) > 1:  # as good as another
        chosen = None
    return Row(label, cells + _extra(values, relative=False), chosen)


def _extra(values: Sequence[Any], relative: bool) -> list[str]:
    """The last column: nothing beside one run, the difference of two."""
    if len(values) != 2:
        return [""] if len(values) == 1 else []
    first, second = (number(value) if not isinstance(value, (str, bool)) else math.nan for value in values)
    if not (math.isfinite(first) and math.isfinite(second)):
        return [""]
    if relative:
        return [f"{second / first - 1:+.0%}" if first else ""]
    if second == first:
        return ["0"]
    # What rounding hides is still no equality: its size.
    same = len(set(measured(first, second))) == 1
    return [f"{second - first:+.0e}" if same else f"{second - first:+.4g}"]


def _checks(runs: Sequence[ReportedRun], extra: Sequence[str]) -> list[Row]:
    rows = []
    for name in dict.fromkeys(str(check.get("name")) for run in runs for check in run.checks):
        found = [next((c for c in run.checks if str(c.get("name")) == name), None) for run in runs]
        rows.append(Row(name, [_check(check) for check in found] + list(extra)))
    return rows


def _check(check: Mapping[str, Any] | None) -> str:
    if check is None:
        return "-"
    value = check.get("value")
    shown = measured(value)[0]
    if check.get("passed"):
        return f"✓ {shown}"
    return f"✗ {shown} ({expectation({'expected': None, 'tolerance': None, **check})})"


def _environment(runs: Sequence[ReportedRun], extra: Sequence[str]) -> list[Row]:
    """Versions, machine, mesh, where they differ; what only some record is no difference."""
    flat = [{**run.environment, **run.environment.get("packages", {})} for run in runs]
    for facts in flat:
        facts.pop("packages", None)
    return [Row(name, [parameter(v) for v in values] + list(extra)) for name, values in differing(flat).items()]


def finite(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points of a curve without those that are nan or infinite."""
    return [(step, value) for step, value in points if math.isfinite(value)]


def measured(*values: Any) -> list[str]:
    """Results of one kind as text: of fractions four significant digits, which is what a run reproduces.

    The largest decides how many decimals all have, unless they are too different in size.
    """
    numbers = [abs(v) for v in values if isinstance(v, float) and math.isfinite(v)]
    top, least = max(numbers, default=0.0), min(filter(None, numbers), default=0.0)
    if not (1e-3 <= top < 1e5 and least >= top / 100):
        return [show(float(f"{v:.4g}")) if isinstance(v, float) else show(v) for v in values]
    decimals = max(0, 3 - math.floor(math.log10(top)))
    while decimals > 2 and all(round(v, decimals - 1) == round(v, decimals) for v in numbers):
        decimals -= 1
    return [f"{v:,.{decimals}f}" if isinstance(v, float) and math.isfinite(v) else show(v) for v in values]
