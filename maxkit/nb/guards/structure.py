# SPDX-License-Identifier: Apache-2.0
"""Guards of the shape of a notebook: its file, the order of its cells, headings, tags, and that it is one clean run."""

import re
from collections.abc import Iterator

from maxkit.nb.guards.freshness import STAMP
from maxkit.nb.guards.notebook import Notebook, Problem, images, shown_text, tags_of
from maxkit.nb.metadata import notebook_metadata

TAGS = frozenset({"parameters", "nbval-ignore-output", "hide-input", "hide-output", "hide-cell", "thumbnail"})
MAX_BYTES = 500_000  # larger ones are slow to open and to show in a review
RUN_AGAIN = "run maxkit refresh"


def file_format(book: Notebook) -> Iterator[Problem]:
    """Ids of their own, a Python kernel, nothing of widgets or runners, not too large (the schema: `read_notebook`)."""
    ids = [cell.get("id") for cell in book.node.cells]
    for number, name in enumerate(ids, 1):
        if name in ids[: number - 1]:
            yield book.problem(number, f"the cell id {name!r} is used twice", "give each cell its own")
    kernel = book.node.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        yield book.problem(None, f"the kernel is {kernel!r}, not 'python3'", RUN_AGAIN)
    known = notebook_metadata(book.entry)
    if unknown := sorted(set(book.node.metadata) - {*known, STAMP}):
        yield book.problem(None, f"left-over metadata: {', '.join(unknown)}", f"{RUN_AGAIN} --text")
    if (size := book.path.stat().st_size) > MAX_BYTES:
        yield book.problem(None, f"{size:,} bytes, more than {MAX_BYTES:,}", "show fewer or simpler outputs")


def hosting(book: Notebook) -> Iterator[Problem]:
    """Colab and Kaggle are asked for the accelerator that the registry names, and Kaggle for a network."""
    for name, value in notebook_metadata(book.entry).items():
        if name in ("accelerator", "colab", "kaggle") and book.node.metadata.get(name) != value:
            yield book.problem(None, f"its metadata do not say {name}: {value}", f"{RUN_AGAIN} --text")


def cell_order(book: Notebook) -> Iterator[Problem]:
    """Parameters, setup, then what is bound; what is expected can fail, and the run ends with it."""
    code = list(book.cells("code"))
    tagged = [number for number, cell in book.cells() if "parameters" in tags_of(cell)]
    if len(tagged) != 1 or not code or tagged[0] != code[0][0]:
        yield book.problem(
            tagged[-1] if tagged else None,
            f"{len(tagged)} cells are tagged parameters" if len(tagged) != 1 else "code stands before the parameters",
            "tag exactly the first code cell",
        )
    if not any("maxkit.nb.check_all()" in cell.source for _, cell in code):
        yield book.problem(None, "nothing can fail: no maxkit.nb.check_all()", "state results with maxkit.nb.expect")
    if not any("maxkit.nb.expect(" in cell.source or ".expect(" in cell.source for _, cell in code):
        yield book.problem(None, "nothing is expected: no maxkit.nb.expect(...)", "state what the run must reach")
    if not book.is_recipe:
        return
    bound = f"maxkit.bind({book.path.stem!r})".replace("'", '"')
    third = code[2] if len(code) > 2 else (None, None)
    if third[1] is None or not third[1].source.startswith(f"cfg = {bound}"):
        yield book.problem(third[0], f"the cell after the setup is not cfg = {bound}", "bind the parameters there")
    if not any(re.search(r"\.finish\(", cell.source) for _, cell in code):
        yield book.problem(None, "no run.finish(...): the run leaves no record", "write it before check_all")


def headings(book: Notebook) -> Iterator[Problem]:
    """One title, at the very top; deeper levels without gaps; none twice."""
    found = list(markdown_headings(book))
    titles = [number for number, level, _ in found if level == 1]
    if titles != [1]:
        yield book.problem(titles[-1] if titles else 1, f"{len(titles)} titles (# ...)", "begin with exactly one")
    if len([level for _, level, _ in found if level == 2]) < 2:
        yield book.problem(None, "fewer than two sections (## ...)", "give the steps headings")
    previous, seen = 0, set()
    for number, level, text in found:
        if level > previous + 1 and previous:
            yield book.problem(number, f"heading {text!r} skips a level", f"make it {'#' * (previous + 1)}")
        if text in seen:
            yield book.problem(number, f"heading {text!r} occurs twice", "its link would be ambiguous: rename one")
        seen.add(text)
        previous = level


def markdown_headings(book: Notebook) -> Iterator[tuple[int, int, str]]:
    """(cell, level, text) of each heading."""
    from maxkit.nb.guards.links import parse

    for number, cell in book.cells("markdown"):
        yield from ((number, level, text) for level, text in parse(cell.source).headings)


def known_tags(book: Notebook) -> Iterator[Problem]:
    """Only tags that something reads; a recipe has one thumbnail, and it is a picture."""
    thumbnails = []
    for number, cell in book.cells():
        for tag in tags_of(cell):
            if tag not in TAGS:
                yield book.problem(number, f"unknown tag {tag!r}", f"allowed: {', '.join(sorted(TAGS))}")
            elif cell.cell_type != "code":
                yield book.problem(number, f"tag {tag!r} on a text", "tag code cells only")
        if cell.cell_type == "code" and "NBVAL_" in cell.source:
            yield book.problem(number, "a NBVAL_ comment", "tag the cell nbval-ignore-output, where readers see it")
        if "thumbnail" in tags_of(cell):
            thumbnails.append(number)
            if not images(cell):
                yield book.problem(number, "the thumbnail shows no picture", "tag a cell that draws a figure")
    if len(thumbnails) > 1 or book.is_recipe and not thumbnails:
        last = thumbnails[-1] if thumbnails else None
        yield book.problem(last, f"{len(thumbnails)} cells are tagged thumbnail", "tag the one figure for the gallery")


def exercises(book: Notebook) -> Iterator[Problem]:
    """A tutorial draws something, and asks questions whose answers are folded away."""
    if book.is_recipe:
        return
    text = "".join(cell.source for _, cell in book.cells("markdown"))
    if not text.count("<details>") == text.count("</details>") >= 3:
        wrong = f"{text.count('<details>')} folded answers, {text.count('</details>')} of them closed"
        yield book.problem(None, wrong, "end with three or more exercises, each answer in <details>...</details>")
    if not any(images(cell) for _, cell in book.cells("code")):
        yield book.problem(None, "no figure", "draw what is explained")


def clean_run(book: Notebook) -> Iterator[Problem]:
    """Every code cell ran once, from the first to the last, without an error or a word on stderr."""
    if not any(cell.get("execution_count") for _, cell in book.cells("code")):
        yield book.problem(None, "it was never run", RUN_AGAIN)
        return
    for expected, (number, cell) in enumerate(book.cells("code"), 1):
        if cell.get("execution_count") != expected:
            count = cell.get("execution_count")
            yield book.problem(number, f"execution count {count}, in one clean run it is {expected}", RUN_AGAIN)
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield book.problem(number, f"shows an error: {output.ename}", f"mend it, then {RUN_AGAIN}")
            if output.get("name") == "stderr":
                line = output.text.strip().splitlines()[0][:80]
                yield book.problem(number, f"shows text on stderr: {line!r}", f"avoid its cause, then {RUN_AGAIN}")
            if any("widget" in kind for kind in output.get("data", {})):
                yield book.problem(number, "shows a widget, which is empty on a page", "show text or a figure")
        if extra := sorted({"execution", "papermill", "widgets"} & set(cell.metadata)):
            yield book.problem(number, f"left-over metadata: {', '.join(extra)}", RUN_AGAIN)
    last = [cell for _, cell in book.cells("code") if "maxkit.nb.check_all()" in cell.source]
    if last and not re.search(r"all [1-9]\d* checks? passed", shown_text(last[-1])):
        yield book.problem(None, "its output does not say that all checks passed", RUN_AGAIN)
