# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model folders: config.json, safetensors in one or several files, tokenizer.

`HuggingFaceReader` gives tensors by canonical address, `write_huggingface` writes a folder that transformers
loads. Not here: the tensor names (`tables.py`) and config.json (`hf_config/`).
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError
from maxkit.formats.hf_config.reader import ARCHITECTURES, config_json, read_config, read_object, special_ids
from maxkit.formats.safetensors import DTYPE_NAMES, SafetensorsFile, SafetensorsWriter
from maxkit.formats.tables import Address, Table, find_table
from maxkit.models.config import ModelConfig

__all__ = ["ARCHITECTURES", "HuggingFaceReader", "config_json", "read_config", "write_huggingface"]

SHARD_BYTES = 2_000_000_000


class HuggingFaceReader:
    """A folder with config.json and safetensors as a model: config, tokenizer, tensors by canonical address.

    `dtypes` counts the tensors by stored dtype ("bfloat16": 272). Tensors are read when asked for, in their
    stored dtype. Raises UserError for a folder that is incomplete, damaged, or of an architecture that is not
    supported.
    """

    format = "hf"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path / "config.json")
        self._files = self._open()
        if self.config.num_layers > len(self._files):
            raise UserError(f"{path}: config.json says {self.config.num_layers} layers for {len(self._files)} tensors")
        self._table: Table = find_table(self.config, self.format)
        names = {short: long for long, short in DTYPE_NAMES.items()}
        stored = [file.entries[key].dtype for key, file in self._files.items()]
        self.dtypes = dict(Counter(names.get(dtype, dtype) for dtype in stored))
        for key, rearrangement in self._table.entries.values():
            if key not in self._files:
                continue  # the caller decides what a missing tensor means: `missing_keys`
            shape, wanted = self._files[key].entries[key].shape, rearrangement.foreign_shape
            if shape != wanted:
                raise UserError(f"{path}: tensor {key!r} has shape {list(shape)}, config.json says {list(wanted)}")

    def _open(self) -> dict[str, SafetensorsFile]:
        """Every tensor name of the folder, with the file that holds it."""
        index = self.path / "model.safetensors.index.json"
        if (self.path / "model.safetensors").is_file():
            names = ["model.safetensors"]
        elif index.is_file():
            names = _shard_names(index)
        else:
            raise UserError(f"{self.path}: no model.safetensors and no model.safetensors.index.json (.bin is not read)")
        found: dict[str, SafetensorsFile] = {}
        for name in names:
            file = SafetensorsFile(self.path / name)
            for key in file.entries:
                if key in found:
                    raise UserError(f"{file.path}: tensor {key!r} is also in {found[key].path.name}")
                found[key] = file
        return found

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the folder, None if there is no tokenizer.json."""
        return Tokenizer.load(self.path) if (self.path / "tokenizer.json").is_file() else None

    def addresses(self) -> list[Address]:
        """Every (canonical path, layer number or None) whose tensor is there."""
        return [address for address, (key, _) in self._table.entries.items() if key in self._files]

    def missing_keys(self) -> list[str]:
        """Tensors that the model needs and the folder lacks."""
        return [key for key, _ in self._table.entries.values() if key not in self._files]

    def shape(self, path: str, layer: int | None = None) -> tuple[int, ...]:
        """The canonical shape of a tensor, without reading it."""
        return self._table[path, layer][1].canonical_shape

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One tensor in canonical orientation and stored dtype, as an array of its own."""
        key, rearrangement = self._table[path, layer]
        if key not in self._files:
            raise UserError(f"{self.path}: tensor {key!r} is missing")
        return rearrangement.read(self._files[key].read(key))

    def unused_keys(self) -> list[str]:
        """Tensors of the folder that the model does not use."""
        used = self._table.keys()
        return [key for key in self._files if key not in used]


def _shard_names(index: Path) -> list[str]:
    placed = read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise UserError(f"{index}: weight_map is missing or not a table of file names")
    names = sorted(set(placed.values()))
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name[:80]!r} is not the name of a safetensors file in the same folder")
    return names


def write_huggingface(
    directory: str | Path,
    config: ModelConfig,
    leaves: Iterable[tuple[str, int | None, np.ndarray]],
    tokenizer: Tokenizer | None,
    dtype: str | None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json, safetensors and tokenizer files that transformers loads.

    `leaves` are (canonical path, layer or None, array) in any order, taken one at a time; `dtype` is
    "float32", "bfloat16", "float16" or None = that of the leaves, which must then be one. config.json comes
    last, so a folder that has one is complete. Raises UserError for a missing, repeated or unknown leaf, a
    wrong shape, a folder that already holds a model, and a disk that is full; what was written is then
    removed.
    """
    directory, table = Path(directory), find_table(config, "hf")
    taken = _Leaves(leaves)
    target = _dtype(dtype or taken.peek().dtype.name)
    description = config_json(config, tokenizer, target.name)
    writers: list[SafetensorsWriter] = []
    complete = False
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
            if (directory / name).exists():
                raise UserError(f"{directory} already holds a model ({name}): choose another folder or remove it first")
        shards = _plan(table, target, shard_bytes)
        for name, shapes in shards.items():
            writers.append(SafetensorsWriter(directory / name, shapes, target))
        _write_leaves(taken, table, {key: writer for writer in writers for key in shards[writer.path.name]}, dtype)
        for writer in writers:
            writer.finish()
        _write_companions(directory, shards, target, tokenizer)
        _write_object(directory / "config.json", description)
        complete = True
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error.strerror or error}") from None
    finally:
        for writer in writers if not complete else ():
            writer.discard()


class _Leaves:
    """An iterator of leaves whose first can be looked at."""

    def __init__(self, leaves: Iterable[tuple[str, int | None, np.ndarray]]) -> None:
        self._rest = iter(leaves)
        self._first: list[tuple[str, int | None, np.ndarray]] = []

    def peek(self) -> np.ndarray:
        if not self._first:
            self._first = [next(self._rest, ("", None, np.zeros((), np.float32)))]
        return self._first[0][2]

    def __iter__(self):
        yield from self._first
        self._first = []
        yield from self._rest


def _dtype(name: str) -> np.dtype:
    allowed = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if name not in allowed:
        raise UserError(f"dtype={name!r}: allowed are {', '.join(allowed)}")
    return np.dtype(allowed[name])


def _plan(table: Table, dtype: np.dtype, shard_bytes: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> tensors with their shapes; a file is closed before it would exceed `shard_bytes`."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for key, rearrangement in table.entries.values():
        size = int(np.prod(rearrangement.foreign_shape, dtype=np.int64)) * dtype.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][key] = rearrangement.foreign_shape
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_leaves(leaves: _Leaves, table: Table, writers: dict[str, SafetensorsWriter], dtype: str | None) -> None:
    written = set()
    for path, layer, array in leaves:
        key, rearrangement = table[path, layer]
        if key in written:
            raise UserError(f"tensor {path!r} (layer {layer}) was given twice")
        array = np.asarray(array)
        if array.shape != rearrangement.canonical_shape:
            wanted = list(rearrangement.canonical_shape)
            raise UserError(f"tensor {path!r} (layer {layer}) has shape {list(array.shape)}, the config says {wanted}")
        if dtype is None and array.dtype != writers[key].dtype:
            raise UserError(
                f"tensor {path!r} is {array.dtype.name}, others are {writers[key].dtype.name}: give a dtype"
            )
        writers[key].write(key, rearrangement.write(array).astype(writers[key].dtype, copy=False))
        written.add(key)
    missing = [address for address, (key, _) in table.entries.items() if key not in written]
    if missing:
        names = ", ".join(path if layer is None else f"{path} (layer {layer})" for path, layer in missing[:5])
        raise UserError(f"{len(missing)} tensors of the model were not given: {names}{', ...' if missing[5:] else ''}")


def _write_companions(directory: Path, shards: dict, dtype: np.dtype, tokenizer: Tokenizer | None) -> None:
    if len(shards) > 1:
        elements = sum(int(np.prod(shape, dtype=np.int64)) for shapes in shards.values() for shape in shapes.values())
        placed = {key: name for name, shapes in shards.items() for key in shapes}
        index = {"metadata": {"total_size": elements * dtype.itemsize}, "weight_map": placed}
        _write_object(directory / "model.safetensors.index.json", index)
    _write_object(directory / "generation_config.json", {"_from_model_config": True, **special_ids(tokenizer)})
    if tokenizer is not None:
        tokenizer.save(directory)


def _write_object(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
