# SPDX-License-Identifier: Apache-2.0
"""`maxkit.bind` in real kernels: papermill, plain nbclient, late re-runs, and outside a notebook."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import papermill
import pytest

import maxkit
from maxkit.config import RECIPES, Sft
from maxkit.errors import UserError
from maxkit.nb.bind import SOURCES_VARIABLE, cell_parameters

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = Sft()
STEPS = f"steps: int = {DEFAULT.steps}"
PARAMETERS = f"""\
# Parameters: change them here, or with papermill -p NAME VALUE.
{STEPS}  # updates of the run
scan_layers = None  # true, false, or as the checkpoint says
learning_rate: float = {DEFAULT.learning_rate}
mesh: str = ""  # as in "fsdp:4,tensor:2"
"""
BIND = "import maxkit\ncfg = maxkit.bind('sft')"
TELL = "import json\nprint('bound', json.dumps([cfg.model_dump(mode='json'), cfg.explicit]))"


def write(path: Path, cells: Sequence[str]) -> Path:
    """A notebook of code cells; the first is the one that papermill replaces."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


def bound(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What the last cell of an executed notebook told."""
    text = "".join(o.get("text", "") for o in nbformat.read(path, 4).cells[-1].outputs)
    return tuple(json.loads(text.removeprefix("bound ")))


def by_command(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    source, out = write(tmp_path / "in.ipynb", [PARAMETERS, BIND, TELL]), tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(source), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


def by_client(tmp_path: Path, cells: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    path = write(tmp_path / "in.ipynb", cells)
    notebook = nbclient.NotebookClient(nbformat.read(path, 4), kernel_name="python3").execute()
    nbformat.write(notebook, path)
    return bound(path)


@pytest.mark.parametrize(
    "options",
    [
        ("-p", "scan_layers", "false"),
        ("-p", "scan_layers", "False"),
        ("-p", "scan_layers", "0"),
        ("-y", "scan_layers: no"),
    ],
)
def test_papermills_false_is_false(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = by_command(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    parameters, explicit = bound(tmp_path / "out.ipynb")
    assert parameters["scan_layers"] is False and explicit == {"scan_layers": "papermill"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ("scan_layer", "false"),
            "UserError: sft: unknown parameter 'scan_layer' (papermill): did you mean 'scan_layers'?",
        ),
        (("steps", "many"), "UserError: sft: steps='many' (papermill): must be a whole number"),
        (("learning_rate", "nan"), "UserError: sft: learning_rate=nan (papermill): must be a finite number"),
    ],
)
def test_a_mistake_ends_the_run_with_a_clear_last_line(tmp_path: Path, options: tuple[str, ...], line: str) -> None:
    done = by_command(tmp_path, "-p", *options)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == line


def test_typed_values_of_the_api_and_a_later_run_of_the_output(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.ipynb", [PARAMETERS, BIND, TELL]), tmp_path / "out.ipynb"
    values = {"steps": DEFAULT.steps, "scan_layers": True, "mesh": "fsdp:1", "learning_rate": 7e-4}
    papermill.execute_notebook(source, out, values, progress_bar=False)
    parameters, explicit = bound(out)
    assert {name: parameters[name] for name in values} == values
    assert explicit == dict.fromkeys(parameters.keys() & values.keys(), "papermill")  # steps too: it was given
    # An output notebook runs again: its injected cell is replaced, not doubled.
    papermill.execute_notebook(out, tmp_path / "again.ipynb", {"steps": 7}, progress_bar=False)
    assert bound(tmp_path / "again.ipynb")[1] == {"steps": "papermill"}


def test_a_literal_edited_by_hand_counts_as_notebook(tmp_path: Path) -> None:
    edited = PARAMETERS.replace(STEPS, "steps: int = 3").replace("None", "False")
    parameters, explicit = by_client(tmp_path, [edited, BIND, TELL])
    assert (parameters["steps"], parameters["scan_layers"]) == (3, False)
    assert explicit == {"steps": "notebook", "scan_layers": "notebook"}


def test_rerun_late_among_many_other_globals(tmp_path: Path) -> None:
    noise = "\n".join(f"batch_size_{i} = {i}" for i in range(50)) + "\nsteps = 99\nlora_rank = 'x'\nscan_layer = 1"
    edited = PARAMETERS.replace("= None", "= True")
    cells = [
        PARAMETERS.replace(STEPS, "steps: int = 5"),
        "# Parameters\nsteps = 6",
        BIND,
        noise,
        edited,
        "1 + 1",
        BIND,
        TELL,
    ]
    parameters, explicit = by_client(tmp_path, cells)
    # The own cell ran last: its steps are the default again and has overwritten what was injected before.
    assert (parameters["steps"], parameters["scan_layers"]) == (DEFAULT.steps, True)
    assert explicit == {"scan_layers": "notebook"}


def test_bind_shows_what_was_given_as_html_and_text(tmp_path: Path) -> None:
    by_client(tmp_path, [PARAMETERS.replace(STEPS, "steps: int = 5"), BIND, TELL])
    shown = nbformat.read(tmp_path / "in.ipynb", 4).cells[1].outputs[0].data
    assert re.search(rf"steps +5 +{DEFAULT.steps} +notebook", shown["text/plain"])
    assert "notebook" in shown["text/html"] and "learning_rate" not in shown["text/html"]


def test_maxkit_run_hands_its_sources_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SOURCES_VARIABLE, json.dumps({"steps": "command line", "seed": "file"}))
    monkeypatch.setenv("MAXKIT_BATCH_SIZE", "4")
    parameters, explicit = by_client(tmp_path, [PARAMETERS, "# Parameters\nsteps = 2\nseed = 1", BIND, TELL])
    assert (parameters["steps"], parameters["seed"], parameters["batch_size"]) == (2, 1, 4)
    assert explicit == {"seed": "file", "steps": "command line", "batch_size": "environment"}


def test_keywords_outside_a_notebook() -> None:
    config = maxkit.bind("sft", {"seed": "3"}, steps=3)
    assert config == maxkit.bind(Sft, steps=3, seed=3)
    assert config.explicit == {"seed": "keyword", "steps": "keyword"}
    with pytest.raises(UserError, match="did you mean 'steps'"):
        maxkit.bind("sft", step=3)


def test_a_keyword_wins_over_the_cell_but_not_over_papermill(tmp_path: Path) -> None:
    cells = [PARAMETERS.replace(STEPS, "steps: int = 5"), BIND.replace("'sft'", "'sft', steps=4"), TELL]
    assert by_client(tmp_path, cells)[1] == {"steps": "keyword"}
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="steps is given twice: 6 .papermill. and 4"):
        by_client(tmp_path, [PARAMETERS, "# Parameters\nsteps = 6", *cells[1:]])


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("# Parameters: x\nsteps = 2 * 3", "steps in the parameters cell must be a plain value, not '2 * 3'"),
        ("# Parameters: x\nimport os", "holds only NAME = VALUE lines, not 'import os'"),
        ("# Parameters: x\nsteps += 1", "holds only NAME = VALUE lines, not 'steps += 1'"),
        ("# Parameters: x\nsteps = ", "is not Python: line 2"),
    ],
)
def test_only_literals_are_read(cell: str, problem: str) -> None:
    assert any(problem in line for line in cell_parameters("sft", [cell])[1])


def test_a_mended_cell_takes_its_old_problem_with_it() -> None:
    cells = ["# Parameters: x\nsteps = = 3\n", "steps = 7", "# Parameters: x\nsteps = 4\n"]
    assert cell_parameters("sft", cells) == ({"steps": (4, "notebook")}, [])


def test_a_line_that_was_deleted_is_forgotten() -> None:
    cells = ["# Parameters: x\nsteps = 3\nseed = 1\n", "# Parameters: x\nseed = 2\n"]
    assert cell_parameters("sft", cells) == ({"seed": (2, "notebook")}, [])


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_papermill_explains_every_parameter_of_a_recipe(recipe: str) -> None:
    """`papermill --help-notebook` reads the cell line by line: one "=" in it, and the comment on the same line."""
    seen = papermill.inspect_notebook(str(ROOT / "recipes" / RECIPES[recipe].notebook))
    assert seen.keys() == RECIPES[recipe].config.model_fields.keys()
    assert all(parameter["help"] for parameter in seen.values())
