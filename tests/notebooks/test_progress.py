# SPDX-License-Identifier: Apache-2.0
"""Progress in real kernels: lines where nobody watches, one updating figure where somebody does."""

from pathlib import Path

import nbclient
import nbformat
import papermill
import pytest

TRAIN = """\
from maxkit.nb import Progress
progress = Progress(500)
for step in range(1, 501):
    progress(step, {"train/loss": 5 / step}, 0.1)
progress.close()"""


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TRAIN)])


def execute(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return nbclient.NotebookClient(notebook, kernel_name="python3").execute().cells[0].outputs


def test_lines_under_nbclient_and_papermill(notebook: nbformat.NotebookNode, tmp_path: Path) -> None:
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False)
    for outputs in (execute(notebook), nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs):
        assert {output.output_type for output in outputs} == {"stream"}
        lines = "".join(output.text for output in outputs).splitlines()
        assert len(lines) == 19 and lines[0].startswith("update   1/500") and "500/500" in lines[-2]


def test_one_figure_that_updates_where_somebody_watches(
    notebook: nbformat.NotebookNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAXKIT_PROGRESS", "live")
    outputs = execute(notebook)
    figures = [output for output in outputs if output.output_type == "display_data"]
    assert len(figures) == 1 and "image/png" in figures[0].data
    # The last update replaced the first drawing.
    assert "update 500 of 500" in figures[0].data["text/plain"] and "at update 500" in figures[0].data["text/plain"]
    texts = [output.text for output in outputs if output.output_type == "stream"]
    assert "".join(texts).startswith("500 updates in") and len(figures) + len(texts) == len(outputs)
