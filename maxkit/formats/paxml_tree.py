# SPDX-License-Identifier: Apache-2.0
"""Where a Paxml checkpoint is and what arrays it holds, from file names and headers alone: no TensorStore, no JAX.

Reading it: `paxml.py`.
"""

import json
import re
from typing import Any

from maxkit.errors import UserError

MARK = "mdl_vars.params.lm.softmax.logits_ffn.linear.w"  # by which a folder is known to be one


def find_paxml(path: Any) -> Any | None:
    """The folder of arrays at a path: itself, or the newest `checkpoint_*` below it; None if there is none."""
    if (path / MARK).is_dir():
        return path
    for folder in (path, path / "checkpoints"):
        steps = sorted(folder.glob("checkpoint_*")) if folder.is_dir() else []
        if steps and (steps[-1] / MARK).is_dir():
            return steps[-1]
    return None


def paxml_step(path: Any) -> int | None:
    """The step in the folder's name."""
    match = re.fullmatch(r"checkpoint_(\d+)", path.name)
    return int(match[1]) if match else None


def paxml_arrays(path: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype)} of every array. Raises UserError for a header that cannot be read."""
    found = {}
    for folder in sorted(path.iterdir()):
        if not (folder / ".zarray").exists():
            continue
        try:
            header = json.loads((folder / ".zarray").read_text())
            found[folder.name] = (tuple(header["shape"]), _dtype_name(header["dtype"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}/.zarray cannot be read: {error}") from error
    return found


def _dtype_name(code: str) -> str:
    """Name a code of numpy: float32 for <f4."""
    kinds = {"f": "float", "i": "int", "u": "uint"}
    plain = code.lstrip("<>|=")
    return f"{kinds[plain[0]]}{int(plain[1:]) * 8}" if plain[0] in kinds and plain[1:].isdecimal() else plain
