# SPDX-License-Identifier: Apache-2.0
"""Guards of the parameters: the cell holds literals only, and of a recipe it says what the configuration says."""

import io
import tokenize
from collections.abc import Iterator

from maxkit.nb.bind import read_cell
from maxkit.nb.guards.notebook import Notebook, Problem, tags_of
from maxkit.nb.parameters_cell import BEGIN, END, parameters_details, parameters_source

ADVICE = "change the configuration, not the cell, then run maxkit refresh"


def parameters_cell(book: Notebook) -> Iterator[Problem]:
    """Literals with a comment each; of a recipe the names, order, defaults and meanings of its configuration."""
    for number, cell in book.cells("code"):
        if "parameters" not in tags_of(cell):
            continue
        found, problems = read_cell(cell.source)
        for problem in problems:
            yield book.problem(number, problem, "give a plain value")
        if book.entry is None:
            if len(_comments(cell.source)) < len(found):
                yield book.problem(number, "a parameter without a comment", "say in a word what it is")
            continue
        yield from (book.problem(number, wrong, ADVICE) for wrong in _differences(book, cell.source, dict(found)))


def parameters_table(book: Notebook) -> Iterator[Problem]:
    """The table of all parameters is the one that the configuration gives today."""
    if book.entry is None:
        return
    held = [(number, cell.source) for number, cell in book.cells("markdown") if BEGIN in cell.source]
    if len(held) != 1:
        yield book.problem(None, f"{len(held)} tables of parameters", f"write {BEGIN} and {END} in one text cell")
    expected = parameters_details(book.entry.config).splitlines()
    for number, source in held:
        table = (BEGIN + source.partition(BEGIN)[2].partition(END)[0] + END).splitlines()
        if table != expected:
            row = next((a for a, b in zip(table, expected, strict=False) if a != b), "its length")
            yield book.problem(number, f"the table of parameters is not that of today: {row[:80]}", ADVICE)


def _differences(book: Notebook, source: str, held: dict) -> Iterator[str]:
    assert book.entry is not None
    expected = parameters_source(book.entry.config, source.splitlines()[0])
    today = dict(read_cell(expected)[0])
    if missing := [name for name in today if name not in held]:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        yield f"the parameters cell lacks {', '.join(missing[:8])}{more}"
    if unknown := [name for name in held if name not in today]:
        yield f"the parameters cell holds {', '.join(unknown)}, which the configuration does not know"
    for name in today.keys() & held.keys():
        if (type(held[name]), held[name]) != (type(today[name]), today[name]):
            yield f"{name} is {held[name]!r} in the cell and {today[name]!r} in the configuration"
    if held.keys() == today.keys():
        if list(held) != list(today):
            yield "the parameters stand in another order than maxkit refresh writes them"
        comments, meanings = _comments(source), _comments(expected)
        if comments != meanings:
            differs = [a for a, b in zip(comments, meanings, strict=False) if a != b]
            yield f"a comment is not the meaning of the field: {differs[0] if differs else 'one is missing'}"


def _comments(source: str) -> list[str]:
    """The comments beside values; the formatter may have moved them to other lines. The title is none of them."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    return [token.string for token in tokens if token.start != (1, 0)]
