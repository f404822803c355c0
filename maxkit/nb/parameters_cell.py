# SPDX-License-Identifier: Apache-2.0
"""What of a recipe's notebook is generated from its configuration: the parameters cell and the table of parameters."""

import json
from typing import Any

from maxkit.config import Convert, Parameters, parameter_table
from maxkit.train.config import SCAN_LAYERS

# What people change first comes first; the rest follows in the order of the configuration.
FIRST: tuple[str, ...] = ("run_dir", "model", "dataset", "steps", "batch_size", "seq_len", "learning_rate")
FIRST += ("lora_rank", "scan_layers", "mesh", "seed")
SHORT = {
    SCAN_LAYERS: "true, false or None: loaded from the checkpoint; an explicit value must match it",
    Convert.model_fields["scan_layers"].description: "true, false or None: the layout to write; otherwise the source's",
}
BEGIN, END = "<!-- parameters: begin (generated) -->", "<!-- parameters: end -->"


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
