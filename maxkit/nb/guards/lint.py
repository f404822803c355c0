# SPDX-License-Identifier: Apache-2.0
"""Guard of style: ruff on the code cells, no reminders left in any cell."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from maxkit.errors import UserError
from maxkit.nb.guards.notebook import Problem, Tree

REMINDER = re.compile(r"\b(TODO|FIXME|XXX)\b")
UNFORMATTED = re.compile(r"^(?:Would reformat:| +-->) (.+?\.ipynb)(?=:cell|$)", re.M)


def lint(tree: Tree) -> Iterator[Problem]:
    """What `ruff check` and `ruff format --check` say of the notebooks."""
    if not tree.notebooks:
        return
    names = {book.path: book.name for book in tree.notebooks}
    for row in json.loads(_ruff(tree.root, "check", "--output-format=json", *map(str, names)) or "[]"):
        wrong = f"{row['code']}: {row['message']}"
        yield Problem(names[Path(row["filename"])], wrong, "make lint shows where", row.get("cell"))
    for file in sorted(set(UNFORMATTED.findall(_ruff(tree.root, "format", "--check", *map(str, names))))):
        name = names[tree.root / file]
        yield Problem(name, "not formatted", f"run ruff format {name}, then maxkit refresh {name}")
    for book in tree.notebooks:
        for number, cell in book.cells():
            if found := REMINDER.search(cell.source):
                yield book.problem(number, f"{found[1]} is left in a cell", "do it, or open an issue")


def _ruff(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "ruff", arguments[0], "--no-cache", *arguments[1:]]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode not in (0, 1) or "No module named ruff" in done.stderr:
        raise UserError(f"ruff does not run ({done.stderr.strip()[:200]}): make setup installs it")
    return done.stdout
