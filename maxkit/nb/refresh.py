# SPDX-License-Identifier: Apache-2.0
"""Renew a committed notebook: its generated parts from the configuration, its outputs from one clean run.

Generated are the setup cell; of a recipe also the cell tagged `parameters` (name, default and meaning of every field)
and the table between the `parameters: begin` and `end` comments. With `text_only` nothing else is renewed, which is
possible where comments and text have changed and no code. The run happens in an empty folder, so that no run of
the user's is continued or lost. Its record goes to `results/` beside the recipe, a stamp of code, outputs and record
into the notebook's metadata. Next to read: `execute.py`, `guards/freshness.py`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from maxkit.config import RECIPES, Parameters
from maxkit.errors import CheckFailed, UserError
from maxkit.nb.execute import KERNEL_LOG, kernel_environment
from maxkit.nb.guards.freshness import STAMP, stamp
from maxkit.nb.metadata import notebook_metadata
from maxkit.nb.parameters_cell import BEGIN, END, parameters_details, parameters_source
from maxkit.nb.record import REPORT, write_json
from maxkit.nb.setup_cell import SETUP_CELL


def refresh(notebook: str | Path, text_only: bool = False) -> dict[str, Any] | None:
    """Rewrite `notebook` in place; a recipe's run record is returned and kept in `results/` beside it.

    Nothing is written when the run fails.

    Raises:
        UserError: no such notebook; or `text_only` and its code is not that of its last run.
        CheckFailed: a cell of it failed, with the last line of its error.
    """
    import nbformat

    path = Path(notebook)
    if not path.is_file():
        raise UserError(f"{path} is not a notebook; `maxkit refresh recipes/sft.ipynb` renews one")
    book = nbformat.read(path, 4)
    recipe = next((name for name, entry in RECIPES.items() if entry.notebook == path.name), None)
    metadata = notebook_metadata(RECIPES[recipe] if recipe is not None else None)
    _generate(book, RECIPES[recipe].config if recipe is not None else None)
    held = book.metadata.get(STAMP, {})
    book.metadata = metadata
    book = _formatted(book, path)  # before the run: what is stamped is the code that ran
    if text_only:
        if any(held.get(name) != now for name, now in stamp(book, None).items()):
            raise UserError(f"{path} is left as it was: its code is not that of its last run; leave out --text")
        book.metadata = metadata | {STAMP: held}
        _write(book, path)
        return None
    with tempfile.TemporaryDirectory(prefix="maxkit-refresh-") as folder:
        start = time.perf_counter()
        _execute(book, path, folder)
        took = {"seconds": round(time.perf_counter() - start, 1), "cpus": os.cpu_count()}
        reports = Path(folder).glob(f"runs/{recipe}*/{REPORT}") if recipe is not None else ()
        record = next((json.loads(report.read_text(encoding="utf-8")) for report in reports), None)
    # A recipe's record says more; of a tutorial this is all that is known.
    book.metadata = metadata | {STAMP: stamp(book, record) | (took if record is None else {})}
    if record is not None:
        write_json(path.parent / "results" / f"{path.stem}-{record['environment']['platform']}.json", record)
    _write(book, path)
    return record


def _write(book: Any, path: Path) -> None:
    import nbformat

    working = path.with_name(f".{path.name}.{os.getpid()}")
    nbformat.write(book, working)
    os.replace(working, path)


def _generate(book: Any, kind: type[Parameters] | None) -> None:
    """The setup cell of every notebook, and of a recipe what its configuration says."""
    for cell in book.cells:
        if cell.cell_type == "code" and cell.source.startswith(SETUP_CELL.splitlines()[0][:8]):
            cell.source = SETUP_CELL
        elif kind is None:
            continue
        elif "parameters" in cell.metadata.get("tags", []):
            cell.source = parameters_source(kind, cell.source.splitlines()[0])
        elif BEGIN in cell.source:
            before, _, rest = cell.source.partition(BEGIN)
            cell.source = before + parameters_details(kind) + rest.partition(END)[2]


def _execute(book: Any, path: Path, folder: str) -> None:
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    client = NotebookClient(book, timeout=3600, kernel_name="python3", resources={"metadata": {"path": folder}})
    try:
        with kernel_environment({}, Path(folder, KERNEL_LOG)):
            client.execute()
    except CellExecutionError as error:
        raise CheckFailed(f"{path} is left as it was: {error.ename}: {error.evalue}") from None
    except (CellTimeoutError, DeadKernelError) as error:
        raise CheckFailed(f"{path} is left as it was: {error}") from None
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # when each cell ran: another text in every run
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)


def _joined(outputs: list[Any]) -> list[Any]:
    """What a cell printed arrives in pieces of chance; one piece for each stream that follows another."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _formatted(book: Any, path: Path) -> Any:
    """As the linter wants it, where there is one."""
    import nbformat

    command = [sys.executable, "-m", "ruff", "format", "--quiet", "--stdin-filename", str(path), "-"]
    done = subprocess.run(command, input=nbformat.writes(book), capture_output=True, text=True)
    return nbformat.reads(done.stdout, 4) if done.returncode == 0 else book
