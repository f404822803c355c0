# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model folders: config.json, safetensors in one or several files, tokenizer.

`HuggingFaceReader` gives tensors by canonical address, `write_huggingface` writes a folder that transformers
loads. Not here: the tensor names (`tables.py`) and config.json (`hf_config/`).
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError
from maxkit.formats.folder import SafetensorsFolder
from maxkit.formats.hf_config.reader import ARCHITECTURES, config_json, read_config, special_ids
from maxkit.formats.safetensors import SafetensorsWriter
from maxkit.formats.tables import Address, Table, find_spelling, find_table, ignored, respell
from maxkit.models.config import ModelConfig

__all__ = ["ARCHITECTURES", "HuggingFaceReader", "config_json", "read_config", "write_huggingface"]

SHARD_BYTES = 2_000_000_000
MAX_EXPERTS = 100_000  # in all layers of a model; published ones have up to 384 x 61


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
        self._tensors = SafetensorsFolder(self.path)
        stored = self._tensors.shapes
        if self.config.num_layers > len(stored):
            raise UserError(f"{path}: config.json says {self.config.num_layers} layers for {len(stored)} tensors")
        self._check_experts(stored)
        self._spelling = find_spelling(self.config, stored)
        self._table: Table = find_table(self.config, self.format, stored, self._spelling)
        self._wanted = self._table.shapes()
        self.dtypes = self._tensors.dtypes()
        for key, wanted in self._wanted.items():
            if key in stored and stored[key] != wanted:  # what a missing one means is the caller's: `missing_keys`
                raise UserError(
                    f"{path}: tensor {key!r} has shape {list(stored[key])}, config.json says {list(wanted)}"
                )

    def _check_experts(self, stored: dict[str, tuple[int, ...]]) -> None:
        """Refuse more experts than the files can hold, before there is a row for each."""
        if self.config.moe is None:
            return
        known = {size for shape in stored.values() if math.prod(shape) for size in shape}
        count = self.config.moe.num_experts
        if count not in known or count * self.config.num_layers > max(4 * len(stored), MAX_EXPERTS):
            raise UserError(f"{self.path}: config.json says {count} experts for {len(stored)} tensors")

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the folder, None if there is no tokenizer.json."""
        return Tokenizer.load(self.path) if (self.path / "tokenizer.json").is_file() else None

    def addresses(self) -> list[Address]:
        """Every (canonical path, layer number or None) whose tensor is there."""
        stored, entries = self._tensors.shapes, self._table.entries
        return [address for address, place in entries.items() if all(key in stored for key in place.keys)]

    def missing_keys(self) -> list[str]:
        """Tensors that the model needs and the folder lacks."""
        return [key for key in self._wanted if key not in self._tensors.shapes]

    def shape(self, path: str, layer: int | None = None) -> tuple[int, ...]:
        """The canonical shape of a tensor, without reading it."""
        return self._table[path, layer].canonical_shape

    def dtype(self, path: str, layer: int | None = None) -> np.dtype:
        """The dtype that `read` gives, without reading."""
        return self._tensors.dtype(self._table[path, layer].keys[0])

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One tensor in canonical orientation and stored dtype, as an array of its own."""
        return self._table[path, layer].read(self._tensors.read)

    def unused_keys(self) -> list[str]:
        """Tensors of the folder that the model does not use and that nothing is known about."""
        return [key for key, reason in self._others().items() if reason is None]

    def ignored_keys(self) -> dict[str, str]:
        """Tensors of the folder that are no part of the model, each with the reason."""
        return {key: reason for key, reason in self._others().items() if reason is not None}

    def _others(self) -> dict[str, str | None]:
        others = [key for key in self._tensors.shapes if key not in self._wanted]
        found = {key: ignored(self.config, key, self._spelling) for key in others}
        head, table = respell("lm_head.weight", self._spelling), self._table["embed/table", None].keys[0]
        if head in found and self.config.tie_embeddings and self._tensors.equal(head, table):
            found[head] = "the embedding table once more"
        return found


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
    for key, shape in table.shapes().items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][key] = shape
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_leaves(leaves: _Leaves, table: Table, writers: dict[str, SafetensorsWriter], dtype: str | None) -> None:
    written = set()
    for path, layer, array in leaves:
        place = table[path, layer]
        if (path, layer) in written:
            raise UserError(f"tensor {path!r} (layer {layer}) was given twice")
        array, wanted = np.asarray(array), writers[place.keys[0]].dtype
        if array.shape != place.canonical_shape:
            shape = list(place.canonical_shape)
            raise UserError(f"tensor {path!r} (layer {layer}) has shape {list(array.shape)}, the config says {shape}")
        if dtype is None and array.dtype != wanted:
            raise UserError(f"tensor {path!r} is {array.dtype.name}, others are {wanted.name}: give a dtype")
        for number, key in enumerate(place.keys):
            # A tensor that other leaves are part of as well is read back, filled and written again: in any order of
            # the leaves no more than one is in memory.
            target = np.empty(place.foreign_shape, wanted) if place.is_whole else writers[key].read_back(key)
            place.write_into(target, array, number)
            writers[key].write(key, target)
        written.add((path, layer))
    missing = [address for address in table.entries if address not in written]
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
