# SPDX-License-Identifier: Apache-2.0
"""Guards of freshness: the outputs are those of the code beside them, and of the run whose record is kept.

`maxkit refresh` writes a stamp into the notebook's metadata: digests of its code cells, of its outputs and of the run's
record. Of the code, what Python makes of it counts: a comment may change without a new run, a default may not. The
setup cell does not count: it must be `SETUP_CELL` anyway, and where maxkit is installed it does nothing. What a change
of the package does to an output only an execution can tell: the tests do that.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from maxkit.nb.guards.notebook import Notebook, Problem, shown_text
from maxkit.nb.setup_cell import SETUP_CELL

STAMP = "maxkit"  # the key in the notebook's metadata
FIELDS = ("recipe", "parameters", "explicit", "steps_done", "metrics", "checks", "seconds", "environment")


def stamp(node: Any, record: Mapping[str, Any] | None) -> dict[str, str]:
    """The digests of a notebook that has just run, and of its run's record."""
    cells = [cell for cell in node.cells if cell.cell_type == "code"]
    parts: dict[str, Any] = {
        "code": [meaning(cell.source) for cell in cells if cell.source != SETUP_CELL],
        "outputs": [cell.get("outputs", []) for cell in cells],
    }
    return {name: digest(part) for name, part in (parts | ({"record": record} if record else {})).items()}


def meaning(source: str) -> Any:
    """Equal for sources that differ in comments and layout only; what is not plain Python counts as it is written."""
    try:
        return _content(ast.parse(source))
    except SyntaxError:
        return source


def _content(node: Any) -> Any:
    """A syntax tree as JSON can hold it; without empty fields, of which every version of Python has its own."""
    if isinstance(node, list):
        return [_content(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: _content(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
    return [type(node).__name__, fields]


def digest(content: Any) -> str:
    """16 digits of the SHA-256 of something that JSON can hold."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stamp_current(book: Notebook) -> Iterator[Problem]:
    """The code and the outputs are what they were at the end of the last run."""
    held = book.node.metadata.get(STAMP, {})
    if not held:
        yield book.problem(None, "no stamp of a clean run", f"run maxkit refresh {book.name}")
        return
    now = stamp(book.node, None)
    if held.get("code") != now["code"]:
        yield book.problem(None, "code was edited after the last run", f"run maxkit refresh {book.name}")
    if held.get("outputs") != now["outputs"]:
        yield book.problem(None, "outputs were edited after the last run", f"run maxkit refresh {book.name}")


def run_record(book: Notebook) -> Iterator[Problem]:
    """One record of a recipe is that of the run whose outputs are shown, and all are of today's defaults."""
    if book.entry is None:
        return
    renew = f"run maxkit refresh {book.name}"
    shown = None
    for file in sorted((book.path.parent / "results").glob(f"{book.recipe}-*.json")):
        name = f"results/{file.name}"
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            missing = [field for field in FIELDS if field not in record]
        except (ValueError, TypeError) as error:
            yield book.problem(None, f"{name} is not a record: {error}", renew)
            continue
        if missing:
            yield book.problem(None, f"{name} lacks {', '.join(missing)}", renew)
            continue
        own = digest(record) == book.node.metadata.get(STAMP, {}).get("record")
        shown = record if own else shown
        yield from (book.problem(None, f"{name}: {wrong}", renew) for wrong in _wrong(book, record, own))
    if shown is None:
        yield book.problem(None, "results/ holds no record of the run whose outputs are shown", renew)
        return
    said = [int(n) for _, cell in book.cells("code") for n in re.findall(r"all (\d+) checks? passed", shown_text(cell))]
    if said != [len(shown["checks"])]:
        wrong = f"the notebook shows {said or 'no'} passed checks, the record has {len(shown['checks'])}"
        yield book.problem(None, wrong, renew)


def _wrong(book: Notebook, record: Mapping[str, Any], own: bool) -> Iterator[str]:
    """What is wrong with a record; one of other hardware may lack fields that are new, and may have given some."""
    assert book.entry is not None
    if record["recipe"] != book.recipe:
        yield f"it is of recipe {record['recipe']!r}"
    if own and record["explicit"]:
        yield f"its run was given {', '.join(record['explicit'])}, the notebook's has all defaults"
    today, then = book.entry.config().model_dump(mode="json"), record["parameters"]
    names = today.keys() | then.keys() if own else (today.keys() & then.keys()) - record["explicit"].keys()
    if differs := sorted(name for name in names if today.get(name, ...) != then.get(name, ...)):
        yield f"its run had other defaults than today's: {', '.join(differs)}"
    if not record["checks"] or not all(check["passed"] for check in record["checks"]):
        yield "its checks did not all pass"
