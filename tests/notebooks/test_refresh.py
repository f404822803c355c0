# SPDX-License-Identifier: Apache-2.0
"""`maxkit refresh`: one clean run, stamped; a failed one leaves everything as it was."""

import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest

from maxkit.cli import main
from maxkit.config import RECIPES
from maxkit.nb import guards
from maxkit.nb.parameters_cell import BEGIN, END

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, *sources: str) -> Path:
    """A notebook of code cells as an editor leaves it: run out of order, with marks of other programs."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    book.metadata = {"widgets": {}, "kernelspec": {"name": "python3", "display_name": "mine", "language": "python"}}
    book.cells[0].execution_count = 7
    book.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)
    return path


def found(path: Path) -> set[str]:
    return {problem.guard for problem in guards.check_notebooks([path])}


def test_a_notebook_becomes_one_clean_stamped_run(tmp_path, capsys):
    path = write(tmp_path / "notebooks/small.ipynb", "x: int = 3  # A number", "print('a')\nprint( x  *2 )", "x*x")
    assert {"file_format", "clean_run", "stamp_current", "lint"} <= found(path)
    assert main(["refresh", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: renewed\n"
    book = nbformat.read(path, 4)
    assert [cell.execution_count for cell in book.cells] == [1, 2, 3]
    assert book.cells[1].source == 'print("a")\nprint(x * 2)'
    assert [output.text for output in book.cells[1].outputs] == ["a\n6\n"]
    assert set(book.metadata) == {"kaggle", "kernelspec", "language_info", "maxkit"}
    assert 0 < book.metadata["maxkit"]["seconds"] < 600 and book.metadata["maxkit"]["cpus"] == os.cpu_count()
    # What a renewal cannot mend remains: this is no tutorial yet.
    assert found(path) == {"cell_order", "headings", "setup_cell", "exercises"}
    assert sorted(p.name for p in path.parent.iterdir()) == ["small.ipynb"]


def test_comments_may_change_without_a_run_and_code_may_not(tmp_path, capsys):
    path = write(tmp_path / "notebooks/small.ipynb", "x: int = 3  # A number", "print(x)")
    assert main(["refresh", str(path)]) == 0
    book = nbformat.read(path, 4)
    stamped = book.metadata["maxkit"]
    book.cells[0].source = "x: int = 3      # Another word"
    nbformat.write(book, path)
    assert main(["refresh", "--text", str(path)]) == 0
    book = nbformat.read(path, 4)
    assert (book.cells[0].source, book.metadata["maxkit"]) == ("x: int = 3  # Another word", stamped)
    assert "stamp_current" not in found(path)
    book.cells[0].source = "x: int = 4  # Another word"
    nbformat.write(book, path)
    before = path.read_bytes()
    assert main(["refresh", "--text", str(path)]) == 2
    assert "its code is not that of its last run" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert "stamp_current" in found(path)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise KeyError('who')", "is left as it was: KeyError: 'who'"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "is left as it was: Kernel died"),
    ],
)
def test_a_failed_run_leaves_everything_as_it_was(tmp_path, capsys, source, says):
    path = write(tmp_path / "notebooks/small.ipynb", "x = 1  # A number", source)
    before = path.read_bytes()
    assert main(["refresh", str(path)]) == 1
    assert says in capsys.readouterr().err
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["small.ipynb"]


def test_a_recipe_gets_its_parameters_its_table_and_its_record(tmp_path, monkeypatch):
    path = tmp_path / "recipes/pretrain.ipynb"
    path.parent.mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "recipes/pretrain.ipynb", path)
    book = nbformat.read(path, 4)
    for cell in book.cells:  # as if a field had been added since
        cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith(("mesh:", "| `mesh`")))
        cell.source = cell.source.replace("# Setup: import maxkit, or", "# Setup: an older text, or")
    nbformat.write(book, path)
    assert {"setup_cell", "parameters_cell", "parameters_table", "stamp_current"} <= found(path)
    for name, value in RECIPES["pretrain"].smoke.items():  # a short run; the guard will see that it is one
        monkeypatch.setenv(f"MAXKIT_{name.upper()}", str(value))
    assert main(["refresh", str(path)]) == 0
    record = json.loads((path.parent / "results/pretrain-cpu.json").read_text())
    assert record["steps_done"] == 3 and record["explicit"]["steps"] == "environment"
    problems = guards.check_notebooks([path])
    (problem, other) = [problem for problem in problems if problem.guard == "run_record"]
    assert "its run was given" in problem.wrong and "other defaults than today's" in other.wrong
    assert {problem.guard for problem in problems} <= {"run_record", "links"}  # the docs are not beside this copy
    text = "".join(cell.source for cell in nbformat.read(path, 4).cells)
    assert "\nmesh: str = " in text and text.count(BEGIN) == text.count(END) == 1 and "| `mesh` |" in text


def test_no_such_notebook_is_refused(tmp_path, capsys):
    assert main(["refresh", str(tmp_path / "nothing.ipynb")]) == 2
    assert "is not a notebook" in capsys.readouterr().err
