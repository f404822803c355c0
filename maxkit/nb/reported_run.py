# SPDX-License-Identifier: Apache-2.0
"""Runs read back: a run folder (`report.json`, `metrics.jsonl`, checkpoints), or a record alone.

A run that has not finished has no record yet: its curves are those of its metrics file, its parameters those of its
newest checkpoint. What a run does not tell is named in its `gaps`; only what is no run at all is refused.
"""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maxkit.checkpoint import inspect
from maxkit.checkpoint.manifest import read_manifest
from maxkit.config import RECIPES
from maxkit.errors import UserError
from maxkit.nb.record import REPORT
from maxkit.train.metrics import METRICS_FILE, read_metrics

HELD_OUT = "held_out/"
AT_STEP = re.compile(rf"({HELD_OUT}.+)_at_(\d+)")


class Record(BaseModel):
    """What is read of a `report.json`; fields that are not known here are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    recipe: str
    parameters: dict[str, Any]
    explicit: dict[str, str] = Field(default_factory=dict)
    steps_done: int = 0
    steps_this_run: int = 0
    metrics: dict[str, Any] = Field(default_factory=dict)
    checks: list[dict[str, Any]] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """One run: its record, its rows of metrics, and what is missing.

    name: short, and different from those of the other runs. path: as it was given. recipe: None where nothing says it.
    history: rows of `metrics.jsonl`, each with its `step`. gaps: sentences.
    """

    name: str
    path: str
    recipe: str | None
    finished: bool
    steps_done: int
    parameters: dict[str, Any]
    explicit: dict[str, str]
    metrics: dict[str, Any]
    checks: list[dict[str, Any]]
    seconds: dict[str, float]
    environment: dict[str, Any]
    history: list[dict[str, float]]
    gaps: tuple[str, ...]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(update, value) of a metric; those of the held-out examples also from the record."""
        points = {int(row["step"]): row[name] for row in self.history if name in row}
        for key, value in self.metrics.items():
            match = AT_STEP.fullmatch(key)
            if match and match[1] == name:
                points[int(match[2])] = number(value)
        return sorted(points.items())

    def curve_names(self) -> list[str]:
        """Every metric that has a curve."""
        names = [name for row in self.history for name in row if name != "step"]
        names += [match[1] for key in self.metrics if (match := AT_STEP.fullmatch(key))]
        return list(dict.fromkeys(names))

    @property
    def tokens_per_update(self) -> int | None:
        """Of all hosts, padding too; None where the recipe has no such thing."""
        sizes = [self.parameters.get(name) for name in ("batch_size", "seq_len")]
        return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None

    @property
    def seconds_per_update(self) -> float | None:
        """The median, without the first update; None where no times were logged."""
        times = [row["perf/step_s"] for row in self.history[1:] if "perf/step_s" in row]
        return statistics.median(times) if times else None

    @property
    def tokens_per_second(self) -> float | None:
        """The record's, else the median of the rows."""
        rates = [row["perf/tokens_per_s"] for row in self.history[1:] if "perf/tokens_per_s" in row]
        recorded = self.metrics.get("perf/tokens_per_s")
        return number(recorded) if recorded is not None else statistics.median(rates) if rates else None

    @property
    def peak_memory(self) -> int | None:
        """Bytes, of the fullest device or, on a CPU, of the process."""
        peaks = [row["perf/peak_memory_bytes"] for row in self.history if "perf/peak_memory_bytes" in row]
        recorded = self.metrics.get("perf/peak_memory_bytes")
        return int(recorded) if recorded is not None else int(max(peaks)) if peaks else None


def read_runs(paths: Sequence[str | Path]) -> list[ReportedRun]:
    """The runs at `paths`: folders, or records (`.json`).

    Raises:
        UserError: none are given, one is no run, one is given twice, or they are of different recipes.
    """
    if not paths:
        raise UserError("report: give one run folder or more, such as runs/sft")
    places = [_place(path) for path in paths]
    for place, path in zip(places, paths, strict=True):
        if places.count(place) > 1:
            raise UserError(f"report: {str(path)!r} is given twice")
    runs = [_read(*each) for each in zip(places, _names(places), map(str, paths), strict=True)]
    recipes = {run.recipe: run for run in runs if run.recipe}
    if len(recipes) > 1:
        told = ", ".join(f"{run.path} ({recipe})" for recipe, run in recipes.items())
        raise UserError(f"report: these runs are of different recipes, give those of one: {told}")
    return runs


def number(value: Any) -> float:
    """A number of a record, in which nan, inf and -inf are texts; nan for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _place(path: str | Path) -> Path:
    place = Path(path).expanduser().absolute()
    if not place.exists():
        raise UserError(f"report: {str(path)!r}: no such run folder")
    return place.parent if place.name == REPORT and place.is_file() else place


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [[*place.parent.parts, place.stem if place.is_file() else place.name] for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]  # a.json beside a folder a


def _read(place: Path, name: str, path: str) -> ReportedRun:
    alone = place.is_file()
    file = place if alone else place / REPORT
    record = _record(file, path) if file.exists() else None
    history = [] if alone else _history(place, path)
    if record is None and not history:
        raise UserError(_no_run(place, path))
    gaps = list(_gaps(record, history, alone))
    if record is None:
        record, unknown = _from_checkpoint(place)
        gaps += unknown
    last = max((int(row["step"]) for row in history), default=0)
    return ReportedRun(
        name=name,
        path=path,
        recipe=record.recipe or None,
        finished=file.exists() and last <= record.steps_done,
        steps_done=max(record.steps_done, last),
        parameters=record.parameters,
        explicit=record.explicit,
        metrics=record.metrics,
        checks=record.checks,
        seconds=record.seconds,
        environment=record.environment,
        history=history,
        gaps=tuple(gaps),
    )


def _record(file: Path, path: str) -> Record:
    try:
        return Record.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"report: {path!r} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"])) or "the whole"
        raise UserError(f"report: {path!r} is not the record of a run: {where}: {wrong['msg'].lower()}") from error
    except ValueError as error:
        raise UserError(f"report: {path!r} is not the record of a run: no JSON") from error


def _history(place: Path, path: str) -> list[dict[str, float]]:
    try:
        rows = read_metrics(place)
        return [{**row, "step": int(row["step"])} for row in rows]
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        message = f"report: {path!r}: {METRICS_FILE} has a row that is not one of numbers with a step"
        raise UserError(message) from error


def _no_run(place: Path, path: str) -> str:
    said = f"report: {path!r} is no run folder"
    if place.is_file():
        return f"{said} and no record"
    inside = [p.name for p in sorted(place.iterdir()) if (p / REPORT).exists() or (p / METRICS_FILE).exists()]
    if inside:
        named = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
        return f"{said}, but holds some ({named}): give {path.rstrip('/')}/{inside[0]}, or {path.rstrip('/')}/*"
    return f"{said}: it has neither {REPORT} nor {METRICS_FILE}"


def _gaps(record: Record | None, history: Sequence[Mapping[str, float]], alone: bool) -> Iterable[str]:
    if record is None:
        yield f"not finished: no {REPORT}, so no checks and no times of the whole"
        return
    if alone and "steps" in record.parameters:
        yield "a record alone: no training curve"
    elif not history and record.steps_done:
        yield f"no {METRICS_FILE}: no training curve"
    if record.steps_this_run < record.steps_done:
        yield f"continued: its times are of the last start, {record.steps_this_run} of {record.steps_done} updates"
    last = int(history[-1]["step"]) if history else 0
    if last > record.steps_done:
        yield (
            f"not finished: {METRICS_FILE} goes on to update {last}, {REPORT} is of update {record.steps_done}, and so "
            "are its checks and times"
        )


def _from_checkpoint(place: Path) -> tuple[Record, list[str]]:
    """What the newest checkpoint tells of a run that has no record, and what nobody tells."""
    try:
        found = inspect.find(place)
        if found.kind != "maxkit":
            raise UserError("of another program")
        manifest = read_manifest(found.path)
    except UserError:
        return Record(recipe="", parameters={}), ["no checkpoint either, so its parameters are not known"]
    # The manifest does not name the recipe: its parameters do.
    kinds = [name for name, entry in RECIPES.items() if set(entry.config.model_fields) == set(manifest.config)]
    recipe = kinds[0] if len(kinds) == 1 else ""
    environment = {"packages": manifest.packages, "scan_layers": manifest.scan_layers}
    record = Record(recipe=recipe, parameters=manifest.config, explicit=manifest.explicit, environment=environment)
    return record, []
