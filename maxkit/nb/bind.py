# SPDX-License-Identifier: Apache-2.0
"""From the parameter cells of a notebook to a checked config.

The assignments are read from the sources of the cells that ran (IPython's `In`), not from the globals: late
in a session these hold hundreds of other names. Only cells whose first line starts with `# Parameters`
count. papermill's injected cell has exactly that line; the recipe's own goes on with a colon and words, and
a literal there that differs from the default was edited by hand. Next to read: `config.py`.
"""

import ast
import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from maxkit.config import REFUSED, SOURCES, Parameters, find_recipe, resolve
from maxkit.nb.cards import Card, parameters_card
from maxkit.typed import convert

MARK = "# Parameters"
# Set by `maxkit run` for its kernel: {name: source} of what it injects, since papermill's cell cannot say.
SOURCES_VARIABLE = "MAXKIT__SOURCES"


def bind(recipe: str | type[Parameters], parameters: Mapping[str, Any] | None = None, **keywords: Any) -> Parameters:
    """The config of `recipe` from the notebook's parameter cells, the environment and what is passed here.

    `parameters` and `keywords` have the source "keyword" and win over the notebook's cells. In a notebook
    it shows what was given beside the defaults.

    Raises:
        UserError: unknown names, wrong types, impossible values: all of them in one line.
    """
    kind = find_recipe(recipe)
    given, problems = cell_parameters(kind, executed_cells(), _handed_over(os.environ))
    for name, value in {**(parameters or {}), **keywords}.items():
        if name in given and given[name][1] not in ("notebook", "file", "environment"):
            problems.append(f"{name} is given twice: {given[name][0]!r} ({given[name][1]}) and {value!r} (keyword)")
        given[name] = (value, "keyword")
    config = resolve(kind, given=given, problems=problems)
    _display(describe(config))
    return config


def executed_cells() -> list[str]:
    """The sources of the cells that ran in this kernel, in order; [] outside IPython."""
    module = sys.modules.get("IPython")  # not imported here: a script has no cells
    shell = module.get_ipython() if module else None
    return [str(source) for source in shell.user_ns.get("In", [])] if shell is not None else []


def cell_parameters(
    recipe: str | type[Parameters], cells: Iterable[str], handed_over: Mapping[str, str] | None = None
) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """({name: (value, source)}, problems) of the parameter cells among `cells`, in order of execution.

    A cell that ran again (same first line) counts once, where it ran last. `handed_over` are sources of
    injected names.
    """
    kind = find_recipe(recipe)
    latest: dict[str, tuple[list[tuple[str, Any]], list[str]]] = {}
    for source in cells:
        first = source.lstrip().split("\n", 1)[0].strip()
        if first.startswith(MARK):
            latest.pop(first, None)
            latest[first] = read_cell(source)
    given: dict[str, tuple[Any, str]] = {}
    problems: list[str] = []
    for first, (assignments, wrong) in latest.items():
        problems += wrong
        for name, value in assignments:
            given.pop(name, None)
            if first == MARK:
                given[name] = (value, (handed_over or {}).get(name, "papermill"))
            elif not _is_default(kind, name, value):
                given[name] = (value, "notebook")
    return given, problems


def read_cell(source: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """(assignments, problems) of one parameter cell: each line is `NAME = literal`, possibly with a type."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        return [], [f"the parameters cell is not Python: line {error.lineno}: {error.msg}"]
    assignments, problems = [], []
    for statement in body:
        target, value = _assignment(statement)
        if target is None:
            problems.append(f"the parameters cell holds only NAME = VALUE lines, not {ast.unparse(statement)!r}")
            continue
        try:
            assignments.append((target, _literal(value)))
        except ValueError:
            problems.append(f"{target} in the parameters cell must be a plain value, not {ast.unparse(value)!r}")
    return assignments, problems


def describe(config: Parameters) -> Card:
    """What was given, beside the default, with its source."""
    sources = config.explicit
    rows = [
        {
            "parameter": name,
            "value": str(getattr(config, name)),
            "default": str(type(config).model_fields[name].default),
            "source": source,
        }
        for name, source in sources.items()
    ]
    return parameters_card(config.recipe, rows, len(type(config).model_fields) - len(rows))


def _assignment(statement: ast.stmt) -> tuple[str | None, ast.expr]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value is not None:
        return statement.target.id, statement.value
    return None, ast.Constant(None)


def _literal(node: ast.expr) -> Any:
    # papermill writes infinities and nan as a call, float("inf"): the type check says what is wrong with
    # them.
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "float" and len(node.args) == 1:
        return float(ast.literal_eval(node.args[0]))
    return ast.literal_eval(node)


def _is_default(kind: type[Parameters], name: str, value: Any) -> bool:
    """Whether a literal of the recipe's own cell says what the config says anyway."""
    if name in REFUSED or name not in kind.model_fields:
        return False
    field = kind.model_fields[name]
    try:
        return convert(value, field.annotation) == field.default
    except ValueError:
        return False


def _handed_over(environ: Mapping[str, str]) -> dict[str, str]:
    text = environ.get(SOURCES_VARIABLE, "")
    sources = json.loads(text) if text else {}
    assert set(sources.values()) <= set(SOURCES), sources
    return sources


def _display(card: Card) -> None:
    module = sys.modules.get("IPython")
    if module and module.get_ipython() is not None:
        from IPython.display import display

        display(card)
