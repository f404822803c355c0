# SPDX-License-Identifier: Apache-2.0
"""A conversion into our own format: one step, array by array, with a journal by which an interrupted one goes on.

docs/design/009-convert-and-compare.md has the why. Next to read: `arrays.py`, `convert.py`. No JAX.
"""

import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from maxkit.checkpoint import arrays, digest_stream, inspect
from maxkit.checkpoint import manifest as manifests
from maxkit.checkpoint.contents import (
    FOREIGN,
    KEY_NAMES,
    OPTIMIZER_PLACES,
    StoreContents,
    stored_form,
    tokenizer_files,
)
from maxkit.checkpoint.conversion_plan import Plan, Planned
from maxkit.checkpoint.lock import LOCK_FILE
from maxkit.checkpoint.manifest import GroupRecord, LeafRecord, Manifest
from maxkit.errors import UserError
from maxkit.formats.contents import Contents

JOURNAL = "progress.jsonl"
_NEW_KEY = LeafRecord(shape=(), dtype="key<fry>", digest="")  # jax.random.key(0): its two words are zero


def write_store(contents: Contents, plan: Plan, partial: Path) -> tuple[int, int]:
    """One step of our own format below `partial`; (arrays verified, arrays that were there already)."""
    step_path = partial / "checkpoints" / str(plan.step)
    journal = _Journal(partial, _fingerprint(contents, plan))
    resumed = len(journal.done)
    writer = arrays.ArrayWriter(step_path / manifests.STATE)
    waiting = [leaf for leaf in plan.leaves if leaf.target not in journal.done]
    writer.create({leaf.target: (leaf.shape, np.dtype(leaf.dtype), leaf.stacked) for leaf in waiting if leaf.num_bytes})
    for leaf in waiting:
        commits = writer.commits
        found = _copy(contents, leaf, writer)
        if writer.commits > commits:  # what was written before this array is on disk
            journal.flush()
        journal.add(leaf.target, found)
    writer.commit()
    journal.flush()
    records = {
        leaf.target: LeafRecord(shape=leaf.shape, dtype=leaf.dtype, digest=journal.done[leaf.target])
        for leaf in plan.leaves
    }
    records |= _write_rest(contents, plan, writer)
    shapes = {path: stored_form(record.shape, record.dtype)[0] for path, record in records.items()}
    writer.finish({path: shape for path, shape in shapes.items() if math.prod(shape)})
    with arrays.failure_named(step_path):
        _write_files(contents, plan, step_path, records)
    return StoreContents(step_path).check_all(), resumed


def _copy(contents: Contents, leaf: Planned, writer: arrays.ArrayWriter) -> str:
    """Read the tensors of one array and write them; its digest."""
    running = digest_stream.RunningDigest(leaf.shape, leaf.dtype)
    for row, tensor in enumerate(leaf.tensors):
        value = np.ascontiguousarray(
            contents.read(tensor.path, tensor.layer, tensor.slot).astype(leaf.dtype, copy=False)
        )
        wanted = leaf.shape[1:] if leaf.stacked else leaf.shape
        if value.shape != wanted:
            raise UserError(f"{tensor.path} (layer {tensor.layer}) has shape {list(value.shape)}, not {list(wanted)}")
        running.add(value, row * value.size)
        if value.size:
            writer.write(leaf.target, value, row if leaf.stacked else None)
    return running.result()


def _write_rest(contents: Contents, plan: Plan, writer: arrays.ArrayWriter) -> dict[str, LeafRecord]:
    """Counters, step and key: small, so they are written at once."""
    values: dict[str, tuple[np.ndarray, tuple[int, ...], str]] = {}
    scalars = contents.scalars
    if isinstance(contents, StoreContents):
        for path in contents.unplaced:
            record = contents.manifest.leaves[path]
            if path == "step" or not plan.params_only:
                values[path] = contents.read_leaf(path), record.shape, record.dtype
    elif contents.optimizer is not None and not plan.params_only:
        places = OPTIMIZER_PLACES.get(contents.optimizer)
        count = np.asarray(scalars.get("count", plan.step), np.int32)
        values = {path: (count, (), "int32") for path in (places.counters if places else ("opt_state/count",))}
        values["step"] = np.asarray(plan.step, np.int32), (), "int32"
        values["rng"] = np.zeros(2, np.uint32), _NEW_KEY.shape, _NEW_KEY.dtype
        for name in scalars.keys() - {"step", "count"}:
            path = name if name.startswith("opt_state/") else f"opt_state/{name}"
            values[path] = scalars[name], scalars[name].shape, scalars[name].dtype.name
    elif "step" in scalars:
        values["step"] = scalars["step"], (), scalars["step"].dtype.name
    values |= _random_state(contents, plan)
    writer.create({path: (array.shape, array.dtype, False) for path, (array, _, _) in values.items() if array.size})
    for path, (array, _, _) in values.items():
        if array.size:
            writer.write(path, array)
    return {
        path: LeafRecord(shape=shape, dtype=dtype, digest=digest_stream.digest(array))
        for path, (array, shape, dtype) in values.items()
    }


def _random_state(contents: Contents, plan: Plan) -> dict[str, tuple[np.ndarray, tuple[int, ...], str]]:
    """Random numbers of a foreign writer, kept beside the state to be converted back: {leaf: (words, shape, dtype)}."""
    if plan.params_only or isinstance(contents, StoreContents) or not hasattr(contents, "random_state"):
        return {}
    found = {}
    for parts, (array, kind) in contents.random_state().items():
        path = "/".join((FOREIGN, *parts))
        if kind is None:
            found[path] = array, array.shape, array.dtype.name
        else:
            found[path] = array, array.shape[:-1], f"key<{KEY_NAMES.get(kind, kind)}>"
    return found


def _write_files(contents: Contents, plan: Plan, step_path: Path, records: dict[str, LeafRecord]) -> None:
    """The manifest with its tokenizer, the position in the data, and Orbax's record of the step, which comes last."""
    tokenizer = tokenizer_files(contents)
    manifest = _manifest(contents, plan, records, tokenizer)
    files = {f"{manifests.MANIFEST}/{k}": v for k, v in manifests.manifest_files(manifest, tokenizer).items()}
    if isinstance(contents, StoreContents) and manifest.has_iterator:
        place = contents.step_path / manifests.ITERATOR
        files |= {
            f"{manifests.ITERATOR}/{p.name}": p.read_bytes() for p in place.iterdir() if p.name.startswith("process_")
        }
    custom = {"scan_layers": plan.scan_layers, "format": manifests.FORMAT, "version": manifests.VERSION}
    files[inspect.STEP_METADATA] = json.dumps({"item_handlers": {}, "metrics": {}, "custom_metadata": custom}).encode()
    for name, content in files.items():
        path = step_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _manifest(contents: Contents, plan: Plan, records: dict[str, LeafRecord], tokenizer: dict[str, bytes]) -> Manifest:
    if isinstance(contents, StoreContents):
        config = dict(contents.manifest.config)
        if config.get("scan_layers") is not None:
            config["scan_layers"] = plan.scan_layers
        changes: dict[str, Any] = {"scan_layers": plan.scan_layers, "leaves": records, "config": config}
        if plan.params_only:
            changes |= {"optimizer": None, "has_iterator": False}
        return contents.manifest.model_copy(update=changes)
    groups = tuple(
        GroupRecord(name=g.name, pattern_length=len(g.pattern), repeats=g.repeats)
        for g in contents.config.layer_groups()
    )
    model = contents.config.model_dump(mode="json")
    lora = getattr(contents, "lora", None)
    if lora is not None:
        model["lora"] = lora.model_dump(mode="json")
    return Manifest(
        step=plan.step,
        scan_layers=plan.scan_layers,
        config={},
        explicit={},
        model=model,
        groups=groups,
        optimizer=None if plan.params_only else contents.optimizer,
        leaves=records,
        tokenizer={name: manifests.sha256(content) for name, content in tokenizer.items()},
        parent=None if plan.source == "memory" else plan.source,
        packages=manifests.package_versions(),
    )


class _Journal:
    """Which arrays are on disk, with their digests: one line each, after a first line that says of which conversion."""

    def __init__(self, folder: Path, fingerprint: str):
        self._path, self._waiting = folder / JOURNAL, []
        self.done: dict[str, str] = {}
        if not self._continues(fingerprint):
            for path in folder.iterdir():
                if path.name != LOCK_FILE:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            with arrays.failure_named(folder):
                self._append([json.dumps({"fingerprint": fingerprint})])

    def _continues(self, fingerprint: str) -> bool:
        if not self._path.exists():
            return False
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        try:  # a last line without its end was being written when the process died
            first, *rest = [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError:
            return False
        if first != {"fingerprint": fingerprint}:
            return False
        self.done = {entry["array"]: entry["digest"] for entry in rest}
        return True

    def add(self, array: str, digest: str) -> None:
        """Note an array that was written; `flush` makes the note last."""
        self.done[array] = digest
        self._waiting.append(json.dumps({"array": array, "digest": digest}))

    def flush(self) -> None:
        """Write the notes; only what they speak of may be on disk before."""
        with arrays.failure_named(self._path):
            self._append(self._waiting)
        self._waiting = []

    def _append(self, lines: list[str]) -> None:
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in lines)
            stream.flush()
            os.fsync(stream.fileno())


def _fingerprint(contents: Contents, plan: Plan) -> str:
    """Of what is read and what is written: a conversion goes on only with the very same."""
    content = [plan.to, plan.scan_layers, plan.step, plan.dtype, plan.params_only, [list(leaf) for leaf in plan.leaves]]
    if isinstance(contents, StoreContents):
        content.append({path: leaf.digest for path, leaf in contents.manifest.leaves.items()})
    elif path := getattr(contents, "path", None):
        content.append(_files(Path(str(path))))
    else:
        content.append(time.time_ns())  # weights in memory: nothing says that they are the same
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _files(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
