# SPDX-License-Identifier: Apache-2.0
"""Renew a committed notebook: its generated parts from the configuration, its outputs from one clean run.

Generated are the cell tagged `parameters` of a recipe (name, default and meaning of every field) and the table between
the `parameters: begin` and `end` comments. The run happens in an empty folder, so that no run of the user's is
continued or lost; its record goes to `results/` beside the recipe. Next to read: `execute.py`.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from maxkit.config import RECIPES, Convert, Parameters, parameter_table
from maxkit.errors import CheckFailed, UserError
from maxkit.train.config import SCAN_LAYERS

# What people change first comes first; the rest follows in the order of the configuration.
FIRST: tuple[str, ...] = ("run_dir", "model", "dataset", "steps", "batch_size", "seq_len", "learning_rate")
FIRST += ("lora_rank", "scan_layers", "mesh", "seed")
SHORT = {
    SCAN_LAYERS: "true, false or None: loaded from the checkpoint; an explicit value must match it",
    Convert.model_fields["scan_layers"].description: "true, false or None: the layout to write; otherwise the source's",
}
BEGIN, END = "<!-- parameters: begin (generated) -->", "<!-- parameters: end -->"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def refresh(notebook: str | Path) -> dict[str, Any] | None:
    """Rewrite `notebook` in place; a recipe's run record is returned and kept in `results/` beside it.

    Nothing is written when the run fails.

    Raises:
        UserError: no such notebook.
        CheckFailed: a cell of it failed, with the last line of its error.
    """
    import nbformat

    path = Path(notebook)
    if not path.is_file():
        raise UserError(f"{path} is not a notebook; `maxkit refresh recipes/sft.ipynb` renews one")
    book = nbformat.read(path, 4)
    recipe = next((name for name, entry in RECIPES.items() if entry.notebook == path.name), None)
    if recipe is not None:
        _generate(book, RECIPES[recipe].config)
    with tempfile.TemporaryDirectory(prefix="maxkit-refresh-") as folder:
        _execute(book, path, folder)
        report = Path(folder, "runs", path.stem, "report.json")
        record = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
        nbformat.write(book, path)
        if record is not None:
            results = path.parent / "results"
            results.mkdir(exist_ok=True)
            shutil.copy(report, results / f"{path.stem}-{record['environment']['platform']}.json")
    _format(path)
    return record


def parameters_source(kind: type[Parameters], title: str) -> str:
    """The source of a recipe's parameters cell: `title`, then one line for each field."""
    table = {row["name"]: row for row in parameter_table(kind)}
    names = [name for name in FIRST if name in table] + [name for name in table if name not in FIRST]
    return "\n".join([title, *(_assignment(table[name]) for name in names)])


def _assignment(row: dict[str, Any]) -> str:
    value, meaning = row["default"], SHORT.get(row["meaning"], row["meaning"]).rstrip(".")
    shown = json.dumps(value) if isinstance(value, str) else repr(value)
    # papermill reads the type from the annotation; of None there is none to give.
    kind = f": {type(value).__name__}" if value is not None else ""
    return f"{row['name']}{kind} = {shown}  # {meaning}"


def parameters_details(kind: type[Parameters]) -> str:
    """The table of all parameters, folded, between its two comments."""
    rows = [[f"`{r['name']}`", r["type"], f"`{r['default']!r}`", r["meaning"]] for r in parameter_table(kind)]
    head = ["| name | type | default | meaning |", "| --- | --- | --- | --- |"]
    body = ["| " + " | ".join(cell.replace("|", "or") for cell in row) + " |" for row in rows]
    return "\n".join([BEGIN, "<details><summary>All parameters</summary>", "", *head, *body, "", "</details>", END])


def _generate(book: Any, kind: type[Parameters]) -> None:
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = parameters_source(kind, cell.source.splitlines()[0])
        elif BEGIN in cell.source:
            before, _, rest = cell.source.partition(BEGIN)
            cell.source = before + parameters_details(kind) + rest.partition(END)[2]


def _execute(book: Any, path: Path, folder: str) -> None:
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    client = NotebookClient(book, timeout=3600, kernel_name="python3", resources={"metadata": {"path": folder}})
    try:
        client.execute()
    except CellExecutionError as error:
        raise CheckFailed(f"{path} is left as it was: {error.ename}: {error.evalue}") from None
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # when each cell ran: another text in every run
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    book.metadata = METADATA


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


def _format(path: Path) -> None:
    """As the linter wants it, where there is one."""
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(path)], check=False, capture_output=True)
