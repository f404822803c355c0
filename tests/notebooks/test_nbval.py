# SPDX-License-Identifier: Apache-2.0
"""nbval, strict: what a run today prints and shows is what is committed, numbers within a tolerance.

Tutorials run whole. A recipe runs up to its last cell whose output is promised (those after it are tagged
nbval-ignore-output): its data, its model, its plan; the training after that is the subject of `test_recipes.py`.
"""

import resource
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.nbval_tolerance import same

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS, RECIPES = (sorted((ROOT / name).glob("*.ipynb")) for name in ("notebooks", "recipes"))
CPU_SECONDS = 90  # of all threads: about half that on two cores that do nothing else


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def promised(path: Path) -> nbformat.NotebookNode:
    """The notebook up to its last cell with an output that is not ignored."""
    book = nbformat.read(path, 4)
    strict = [
        i
        for i, cell in enumerate(book.cells)
        if cell.get("outputs") and "nbval-ignore-output" not in cell.metadata.get("tags", [])
    ]
    assert strict, f"{path.name} promises no output at all"
    if path.parent.name == "recipes":
        book.cells = book.cells[: strict[-1] + 1]
    return book


def nbval(path: Path) -> subprocess.CompletedProcess:
    """In the folder of the notebook, where it may write."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.nbval_tolerance"]
    command += ["--rootdir", str(path.parent), "--nbval", "--nbval-current-env", "--nbval-cell-timeout=600", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("path", [*TUTORIALS, *RECIPES], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_committed_outputs_are_those_of_today(tmp_path, capsys, monkeypatch, path):
    if path.parent.name == "notebooks":  # some of them show how long it takes to compile
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    book = promised(path)
    nbformat.write(book, tmp_path / path.name)
    before = cpu_seconds()
    done = nbval(tmp_path / path.name)
    used = cpu_seconds() - before
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    cells = sum(cell.cell_type == "code" for cell in book.cells)
    assert f"{cells} passed" in done.stdout
    with capsys.disabled():
        print(f"\nnbval {path.parent.name}/{path.stem}: {cells} cells, {used:.0f} s of CPU", end="")
    assert used < CPU_SECONDS, "tag what is dear, and what comes after it, nbval-ignore-output"


def test_a_wrong_digit_and_a_wrong_word_are_seen(tmp_path):
    cells = [nbformat.v4.new_code_cell(source, execution_count=i) for i, source in enumerate(("1 / 3", "'a'", "7"), 1)]
    for cell, shown in zip(cells, ("0.3334", "'a'", "7"), strict=True):
        cell.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": shown}, execution_count=1)]
    path = tmp_path / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert nbval(path).returncode == 0
    for cell, wrong in zip(cells, ("0.3433", "'b'", "8"), strict=True):
        cell.outputs[0].data["text/plain"] = wrong
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    done = nbval(path)
    assert done.returncode == 1 and "3 failed" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("loss 2.3141", "loss 2.3139", True),
        ("loss 2.31", "loss 2.32", False),
        ("3 rows", "4 rows", False),
        ("1,234.5 tokens", "1,234.6 tokens", True),
        ("a  0.5\n------", "a 0.49999\n-----", True),
        ("1e-05", "1.0001e-05", True),
        ("v2.1", "v2.2", False),
        ("3.0", "nan", False),
        ("7", "7 8", False),
        (
            '<b style="color:#1e8e3e;margin:0">ok</b>',
            '<b style="color:#2aa64a;color:color-mix(a,b);margin:0">ok</b>',
            True,
        ),
        ('<b style="color:#1e8e3e">ok</b>', '<b style="color:#1e8e3e">no</b>', False),
    ],
)
def test_what_counts_as_the_same(one, other, equal):
    assert same(one, other) is same(other, one) is equal
