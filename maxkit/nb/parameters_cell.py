# SPDX-License-Identifier: Apache-2.0
"""What of a recipe's notebook is generated from its configuration: the parameters cell and the table of parameters."""

import json
import re
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
WIDTH = 120  # of a line, as the formatter has it: it would break longer ones into three
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
    assignment = f"{row['name']}{kind} = {shown}  # "
    return assignment + _shortened(meaning, WIDTH - len(assignment))


def _shortened(meaning: str, room: int) -> str:
    """As many of its clauses as fit; the table of parameters has it whole."""
    if len(meaning) <= room:
        return meaning
    ends = [found.start() for found in re.finditer(r"[.;] ", meaning)]
    whole = [end for end in ends if end <= room and meaning.count("(", 0, end) == meaning.count(")", 0, end)]
    return meaning[: max(whole)] if whole else meaning


def parameters_details(kind: type[Parameters]) -> str:
    """The table of all parameters, folded, between its two comments."""
    rows = [[f"`{r['name']}`", r["type"], f"`{r['default']!r}`", r["meaning"]] for r in parameter_table(kind)]
    head = ["| name | type | default | meaning |", "| --- | --- | --- | --- |"]
    body = ["| " + " | ".join(cell.replace("|", "or") for cell in row) + " |" for row in rows]
    return "\n".join([BEGIN, "<details><summary>All parameters</summary>", "", *head, *body, "", "</details>", END])
