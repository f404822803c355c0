# SPDX-License-Identifier: Apache-2.0
"""What the guards look at: notebooks as they lie on disk, and the tree that holds them."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from maxkit.config import RECIPES, RecipeEntry


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong in `file` (and its cell, counted from 1 with the texts), and what to do about it."""

    file: str
    wrong: str
    advice: str
    cell: int | None = None
    guard: str = ""

    def of(self, guard: Callable) -> "Problem":
        """The same, with the guard that found it."""
        return dataclasses.replace(self, guard=guard.__name__)

    def __str__(self) -> str:
        place = f"{self.file}, cell {self.cell}" if self.cell else self.file
        return f"{place}: {self.wrong}; {self.advice} [{self.guard}]"


@dataclasses.dataclass(frozen=True)
class Notebook:
    """A notebook; `name` is its path in the tree, `node` its content with texts joined."""

    path: Path
    name: str
    node: Any

    @property
    def is_recipe(self) -> bool:
        """Whether it lies among the recipes; otherwise it is a tutorial."""
        return self.path.parent.name == "recipes"

    @property
    def recipe(self) -> str | None:
        """The name under which the registry knows it."""
        known = (name for name, entry in RECIPES.items() if entry.notebook == self.path.name)
        return next(known, None) if self.is_recipe else None

    @property
    def entry(self) -> RecipeEntry | None:
        """Its row in the registry."""
        return RECIPES[self.recipe] if self.recipe else None

    def cells(self, kind: str | None = None) -> Iterator[tuple[int, Any]]:
        """(number, cell) of all cells, or of those that are "code" or "markdown"."""
        for number, cell in enumerate(self.node.cells, 1):
            if kind in (None, cell.cell_type):
                yield number, cell

    def problem(self, cell: int | None, wrong: str, advice: str) -> Problem:
        """A problem of this notebook."""
        return Problem(self.name, wrong, advice, cell)


@dataclasses.dataclass(frozen=True)
class Tree:
    """A checkout: its notebooks, and the Markdown files beside them."""

    root: Path
    notebooks: tuple[Notebook, ...]
    documents: tuple[Path, ...]


def tags_of(cell: Any) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def images(cell: Any) -> list[Any]:
    """The outputs of a code cell that show a picture."""
    outputs = cell.get("outputs", [])
    return [output for output in outputs if any(kind.startswith("image/") for kind in output.get("data", {}))]


def shown_text(cell: Any) -> str:
    """What a code cell printed and showed, as a reader sees it: no pictures, of a card its plain text only."""
    shown = (output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", []))
    return "\n".join(shown)


def read_notebook(path: Path, root: Path) -> Notebook | Problem:
    """The notebook, or the one problem that keeps the guards from looking into it."""
    import nbformat
    from nbformat.v4.rwbase import rejoin_lines
    from nbformat.validator import iter_validate

    name = path.relative_to(root).as_posix()
    try:
        # Not nbformat.read: it would mend what is to be found.
        content = nbformat.from_dict(json.loads(path.read_text(encoding="utf-8")))
        for error in iter_validate(content, version=4, version_minor=5):
            place = [*error.absolute_path, "", ""]
            cell = int(place[1]) + 1 if place[0] == "cells" and place[1] != "" else None
            wrong = f"not valid nbformat 4.5: {error.message[:150]}"
            return Problem(name, wrong, "write it with Jupyter", cell, guard="file_format")
        return Notebook(path, name, rejoin_lines(content))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        wrong = f"not a notebook ({type(error).__name__}: {error})"
        return Problem(name, wrong, "take it from version control or write it with Jupyter", guard="file_format")


def read_tree(root: Path) -> tuple[Tree, list[Problem]]:
    """The tree, and a problem for each notebook that cannot be read."""
    paths = sorted(root.glob("recipes/*.ipynb")) + sorted(root.glob("notebooks/*.ipynb"))
    found = [read_notebook(path, root) for path in paths]
    documents = [*root.glob("*.md"), *(p for p in root.glob("docs/**/*.md") if "_build" not in p.parts)]
    notebooks = tuple(book for book in found if isinstance(book, Notebook))
    return Tree(root, notebooks, tuple(sorted(documents))), [p for p in found if isinstance(p, Problem)]
