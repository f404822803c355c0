# SPDX-License-Identifier: Apache-2.0
"""What single tutorials do with other parameters. Their outputs: test_nbval.py; their form: unit/test_guards.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def shown(cell) -> list[str]:
    """What a cell printed and showed, as text."""
    return [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]


def papermill(notebook: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


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
