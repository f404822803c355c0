# SPDX-License-Identifier: Apache-2.0
"""A checkpoint taken apart for the tutorial: its files, its spellings, and what is said when a byte of it changes.

Pictures of the same: `checkpoint_figures.py`. Nothing here is needed to use a checkpoint.
"""

import fnmatch
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maxkit.checkpoint import inspect, manifest
from maxkit.checkpoint.contents import StoreContents
from maxkit.errors import UserError
from maxkit.nb.cards import Card, table

# What a file of a step is for; the first pattern that fits counts.
ROLES = {
    "_CHECKPOINT_METADATA": "what the step is made of, and scan_layers, where MaxText looks for it",
    "state/_METADATA": "the tree: the path of every array",
    "state/*manifest.ocdbt": "in which file which piece of an array lies",
    "state/*d/*": "the numbers, compressed",
    "state/*": "Orbax's notes: shapes, sharding, that it is whole",
    "manifest/manifest.json": "architecture, layout, settings, versions, and a digest of every array",
    "manifest/tokenizer/*": "the tokenizer",
    "iterator/*": "where the data stands, so that a resumed run reads on there",
    "*": "that it is whole",
}
LARGEST = "state/ (the largest file)"


def files_card(step: str | Path, *, title: str) -> Card:
    """The files of a step, those with one purpose together."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in Path(step).rglob("*") if p.is_file()):
        name = path.relative_to(step).as_posix()
        pattern = next(pattern for pattern in ROLES if fnmatch.fnmatch(name, pattern))
        row = rows.setdefault(pattern, {"files": 0, "kB": 0.0})
        row["files"] += 1
        row["kB"] += path.stat().st_size / 1e3
    shown = [
        {"in the step's folder": pattern, **rows[pattern], "kB": round(rows[pattern]["kB"], 1), "holds": role}
        for pattern, role in ROLES.items()
        if pattern in rows
    ]
    return table(shown, title=title)


def spellings(step: str | Path) -> list[dict[str, Any]]:
    """Rows: what `maxkit inspect` finds at the run, the step, and the item in the step."""
    step = Path(step)
    rows = []
    for name, path in {"the run": step.parents[1], "the step": step, "the item": step / manifest.STATE}.items():
        found = inspect.describe(path)
        rows.append({"path": str(path), "which is": name, **{k: found[k] for k in ("format", "step", "scan_layers")}})
    return rows


def refusal(action: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """What a call is refused with, in one line, paths as seen from here.

    Raises:
        AssertionError: it was not refused.
    """
    try:
        action(*arguments, **keywords)
    except UserError as error:
        return str(error).replace(f"{Path.cwd()}/", "")
    raise AssertionError("nothing was refused")


def flip_byte(path: str | Path, position: int, mask: int = 0x01) -> None:
    """Change the bits of `mask` in one byte of a file; the same call again changes them back."""
    content = bytearray(Path(path).read_bytes())
    content[position] ^= mask
    Path(path).write_bytes(content)


def flip_each(step: str | Path, names: Sequence[str], copy: str | Path) -> list[dict[str, Any]]:
    """Copy a step, flip a bit in the middle of one file after the other, and read everything that is there.

    Rows of the file and what the reader says; a file that changed nothing that is needed must give the same arrays.
    """
    shutil.copytree(step, copy)
    before = _read_everything(Path(step))
    rows = []
    for name in names:
        path = Path(copy) / name
        if name == LARGEST:
            path = max((p for p in Path(copy).rglob("state/**/*") if p.is_file()), key=lambda p: p.stat().st_size)
        flip_byte(path, path.stat().st_size // 2)
        try:
            after = _read_everything(Path(copy))
            said = "the same arrays: it is not needed to read them" if after == before else "OTHER ARRAYS, UNNOTICED"
        except UserError as error:
            said = str(error).replace(f"{Path(copy).absolute()}/", "").replace(f"{copy}/", "")
            said = said if len(said) <= 170 else f"{said[:170].rpartition(chr(32))[0]} ..."
        rows.append({"a bit flipped in": name, "what the reader says": said})
        flip_byte(path, path.stat().st_size // 2)
    shutil.rmtree(copy)
    return rows


def _read_everything(step: Path) -> tuple[dict[str, str], dict[str, bytes], Any]:
    """Digests of all arrays as recorded, every one of them compared; tokenizer; data position."""
    contents = StoreContents(step)
    contents.check_all()
    digests = {path: leaf.digest for path, leaf in contents.manifest.leaves.items()}
    position = manifest.read_iterator(step, 0, contents.manifest.processes) if contents.manifest.has_iterator else None
    return digests, contents.tokenizer_files(), position
