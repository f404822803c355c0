# SPDX-License-Identifier: Apache-2.0
"""Every tutorial: its committed outputs are those of one clean run, and a run today gives the same."""

import ast
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from maxkit.nb.setup_cell import SETUP_CELL

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CPU_SECONDS = 90  # of all threads: about half that on two cores that do nothing else


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def shown(cell) -> list[str]:
    """What a cell printed and showed, as text."""
    return [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]


def papermill(notebook: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_there_are_tutorials():
    assert [path.stem for path in TUTORIALS] == ["anatomy_of_a_checkpoint", "decoder_tour"]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_shows_what_is_committed(tmp_path, path):
    before = cpu_seconds()
    done = papermill(path, tmp_path / "out.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    assert cpu_seconds() - before < CPU_SECONDS
    again, committed = code_cells(tmp_path / "out.ipynb"), code_cells(path)
    assert len(again) == len(committed)
    for new, old in zip(again, committed, strict=True):
        if "nbval-ignore-output" not in tags(old):
            assert shown(new) == shown(old), old.source
    # The last cell raises when a check fails; that there were checks it says itself.
    assert re.match(r"all [1-9]\d* checks passed", shown(again[-1])[0])


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_one_clean_run_that_can_be_read(path):
    cells = code_cells(path)
    assert tags(cells[0]) == ["parameters"] and cells[1].source == SETUP_CELL
    assert all(
        isinstance(ast.literal_eval(line.value), str | int | float | bool) for line in ast.parse(cells[0].source).body
    )
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len(path.read_bytes()) < 500_000
    assert not re.search(r"/tmp/|/home/|/root/|/work/|\"execution\"|\"papermill\"|\"widgets\"", path.read_text())
    figures = 0
    for cell in cells:
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.For | ast.While | ast.Lambda), cell.source
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                figures += 1
                assert 20 <= len(cell.metadata["mystnb"]["image"]["alt"]) <= 250
                assert output.metadata["image/png"]["width"] == 640 and output.metadata["image/png"]["alt"]
    assert figures
    text = "".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    assert text.count("<details>") == text.count("</details>") >= 3


def test_another_preset_is_listed_and_a_misspelt_one_is_refused(tmp_path):
    tour = ROOT / "notebooks/decoder_tour.ipynb"
    # The cells up to the table are enough: what follows does not depend on the choice.
    short = json.loads(tour.read_text())
    last = next(i for i, cell in enumerate(short["cells"]) if "parameter_table" in "".join(cell["source"]))
    short["cells"] = short["cells"][: last + 1]
    (tmp_path / "short.ipynb").write_text(json.dumps(short))
    done = papermill(tmp_path / "short.ipynb", tmp_path / "out.ipynb", "-p", "preset", "deepseek3-671b")
    assert done.returncode == 0, done.stderr[-3000:]
    table = shown(code_cells(tmp_path / "out.ipynb")[-1])[0]
    assert "671,026,419,200 parameters in all, of which a token uses 37,552,297,472" in table
    assert re.search(r"\nattention/kv_down/kernel +[\d,]+ +61 +DZ +7168×512\n", table)
    done = papermill(tmp_path / "short.ipynb", tmp_path / "out.ipynb", "-p", "preset", "deepseek3-671")
    last_line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "'deepseek3-671' is not known" in last_line and "deepseek3-671b" in last_line
