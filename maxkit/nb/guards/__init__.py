# SPDX-License-Identifier: Apache-2.0
"""The guards of the notebooks: what is committed can be read, is true of today's code, and came from one clean run.

Each guard is one function that yields a `Problem` for everything it finds. Nothing is executed and JAX is not
imported, so all of them take seconds; what only an execution can tell is left to the tests. Next to read:
`notebook.py`, then any guard. Why these: docs/design/013-guards.md.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from maxkit.errors import UserError
from maxkit.nb.guards import code, figures, freshness, links, lint, parameters, project, structure
from maxkit.nb.guards.notebook import Notebook, Problem, Tree, read_notebook, read_tree

# Of one notebook; the order is that of the list a reader gets.
NOTEBOOK_GUARDS: tuple[Callable[[Notebook], Iterable[Problem]], ...] = (
    structure.file_format,
    structure.hosting,
    structure.cell_order,
    structure.headings,
    structure.known_tags,
    structure.exercises,
    structure.clean_run,
    code.setup_cell,
    code.plain_code,
    code.machine_paths,
    code.secrets,
    parameters.parameters_cell,
    parameters.parameters_table,
    figures.alt_text,
    figures.legible,
    freshness.stamp_current,
    freshness.run_record,
)
# Of several files, or of how they belong together.
TREE_GUARDS: tuple[Callable[[Tree], Iterable[Problem]], ...] = (
    lint.lint,
    links.links,
    project.registry,
    project.environments,
)
PARTIAL_GUARDS = (lint.lint, links.links)  # those that also make sense for some notebooks alone


def checkout() -> Path:
    """The folder that holds the package, the recipes and the documentation.

    Raises:
        UserError: maxkit is installed without them.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "recipes").is_dir() or not (root / "pyproject.toml").is_file():
        raise UserError(f"no recipes/ and pyproject.toml in {root}: maxkit check works on a checkout (git clone)")
    return root


def check_tree(root: Path) -> list[Problem]:
    """What all guards find in a checkout; [] when it is clean."""
    tree, unreadable = read_tree(root)
    return [*unreadable, *_run(tree, TREE_GUARDS)]


def check_notebooks(paths: Sequence[str | Path]) -> list[Problem]:
    """What the guards of single notebooks find in these.

    Raises:
        UserError: one does not exist.
    """
    notebooks, problems = [], []
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{path} does not exist; maxkit check without a name checks all notebooks")
        found = read_notebook(path.resolve(), path.resolve().parent.parent)
        (problems if isinstance(found, Problem) else notebooks).append(found)
    root = notebooks[0].path.parent.parent if notebooks else Path()
    return [*problems, *_run(Tree(root, tuple(notebooks), ()), PARTIAL_GUARDS)]


def _run(tree: Tree, tree_guards: Iterable[Callable[[Tree], Iterable[Problem]]]) -> list[Problem]:
    found = []
    for notebook in tree.notebooks:
        for guard in NOTEBOOK_GUARDS:
            found += [problem.of(guard) for problem in guard(notebook)]
    for tree_guard in tree_guards:
        found += [problem.of(tree_guard) for problem in tree_guard(tree)]
    return found
