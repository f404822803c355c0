# SPDX-License-Identifier: Apache-2.0
"""The arrays of a step, read and written one by one through TensorStore, in the layout that Orbax has on disk. No JAX.

Orbax writes a tree that is in memory; a converter has one tensor at a time. So `ArrayWriter` makes what Orbax makes
(OCDBT, zarr 3, `_METADATA`), array by array, and Orbax reads it. Next to read: `contents.py`, `convert.py`.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from maxkit.checkpoint import manifest as manifests
from maxkit.errors import UserError

_CHUNK_BYTES = 16 << 20  # of an array that is one tensor; a stack has a chunk for each layer at least
_COMMIT_BYTES = 16 << 20  # held in memory until they are written together


def array_spec(item_path: Any, path: str) -> dict[str, Any]:
    """TensorStore's description of one array of an item."""
    base = str(item_path) if "://" in str(item_path) else f"file://{os.path.abspath(item_path)}"
    store = {"driver": "ocdbt", "base": f"{base}/", "path": path.replace("/", ".") + "/"}
    store["cache_pool"] = "cache_pool#ocdbt"
    # A chunk that is not there is damage, not zeros.
    return {"driver": "zarr3", "kvstore": store, "fill_missing_data_reads": False}


def context() -> ts.Context:
    """A cache for OCDBT's tree only: with one for the chunks as well reading took twice as long."""
    return ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})


@contextlib.contextmanager
def damage_named(item_path: Any, path: str) -> Iterator[None]:
    """Whatever TensorStore says about bytes that it cannot read, as one line."""
    try:
        yield
    except (ValueError, OSError) as error:  # TensorStore's status codes arrive as ValueError
        reason = " ".join(str(error).split("[tensorstore_spec")[0].split())[:300]
        raise manifests.DamagedCheckpoint(f"{item_path}: {path} cannot be read: {reason}") from error


class ArrayReader:
    """The arrays of one item. Opening reads nothing."""

    def __init__(self, item_path: Any):
        self.item_path = item_path
        self._context = context()
        self._opened: dict[str, ts.TensorStore] = {}

    def _open(self, path: str, shape: tuple[int, ...], dtype: np.dtype) -> ts.TensorStore:
        if path not in self._opened:
            with damage_named(self.item_path, path):
                array = ts.open(array_spec(self.item_path, path), context=self._context, read=True).result()
                if array.shape != shape or array.dtype.numpy_dtype != dtype:
                    raise ValueError(f"{array.dtype.name}{list(array.shape)} is not what the manifest says")
                self._opened[path] = array
        return self._opened[path]

    def by_rows(self, path: str, shape: tuple[int, ...], dtype: np.dtype) -> bool:
        """Whether one row of axis 0 can be read without the others."""
        return self._open(path, shape, dtype).chunk_layout.read_chunk.shape[0] == 1

    def read(self, path: str, shape: tuple[int, ...], dtype: np.dtype, row: int | None = None) -> np.ndarray:
        """An array, or one row of it; `shape` and `dtype` are those of the whole.

        Raises:
            DamagedCheckpoint: it is not there, is another one, or cannot be read.
        """
        array = self._open(path, shape, dtype)
        with damage_named(self.item_path, path):
            return (array if row is None else array[row]).read().result()


class ArrayWriter:
    """Writes arrays into a new item, or goes on with one that was left half-written.

    Small writes are committed together: what `commit` returned after is on disk, whatever happens to the process then.
    Orbax, TensorStore and `ArrayReader` read the result after `finish`.
    """

    def __init__(self, item_path: Any):
        self.item_path = item_path
        self._context = context()
        item_path.mkdir(parents=True, exist_ok=True)
        self._transaction, self._pending = ts.Transaction(), 0
        self.commits = 0  # so many times what was written before was put on disk

    def create(self, leaves: Mapping[str, tuple[tuple[int, ...], np.dtype, bool]]) -> None:
        """Write the headers of arrays: {path: (shape, dtype, whether it will come row by row)}."""
        with failure_named(self.item_path), ts.Transaction() as transaction:
            store = ts.KvStore.open(self._store("")).result().with_transaction(transaction)
            for path, (shape, dtype, stacked) in leaves.items():
                header = _header(shape, dtype, _chunk_shape(shape, dtype.itemsize, stacked))
                store.write(f"{path.replace('/', '.')}/zarr.json", json.dumps(header).encode()).result()

    def write(self, path: str, value: np.ndarray, row: int | None = None) -> None:
        """Write an array, or one row of it. What is large goes chunk by chunk, so that no copy of all is made."""
        with failure_named(self.item_path):
            spec = array_spec(self.item_path, path) | {"store_data_equal_to_fill_value": True}
            array = ts.open(spec, context=self._context, open=True).result()
            chunk = (array.chunk_layout.write_chunk.shape or ())[0 if row is None else 1 :]
            whole = not chunk or chunk[0] >= value.shape[0]
            starts = (None,) if whole else range(0, value.shape[0], chunk[0])
            for start in starts:
                part = ... if start is None else slice(start, min(start + chunk[0], value.shape[0]))
                piece = value if start is None else value[part]
                if self._pending + piece.nbytes > _COMMIT_BYTES:
                    self.commit()
                self._pending += piece.nbytes
                target = array.with_transaction(self._transaction)
                (target if row is None else target[row])[part].write(piece).result()

    def commit(self) -> None:
        """Put on disk what was written."""
        with failure_named(self.item_path):
            self._transaction.commit_async().result()
        self._transaction, self._pending = ts.Transaction(), 0
        self.commits += 1

    def finish(self, leaves: Mapping[str, tuple[int, ...]]) -> None:
        """Commit, and write Orbax's list of the arrays, {path: shape}, last of all."""
        self.commit()
        tree = {}
        for path, shape in leaves.items():
            keys = path.split("/")
            tree[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(shape)},
            }
        content = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": True}
        content |= {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
        with failure_named(self.item_path):
            (self.item_path / "_METADATA").write_text(json.dumps(content))

    def _store(self, path: str) -> dict[str, Any]:
        return {"driver": "ocdbt", "base": f"file://{os.path.abspath(self.item_path)}/", "path": path}


@contextlib.contextmanager
def failure_named(path: Any) -> Iterator[None]:
    """Whatever the file system or TensorStore says about bytes that cannot be written, as one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be written: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What the file system said, in words."""
    text = " ".join(str(error).split())
    if "No space left" in text or "ENOSPC" in text or "Disk quota exceeded" in text:
        return "the disk is full: free some space"
    if "File too large" in text:
        return "the file system or a limit of this process refuses files of that size"
    if "Permission denied" in text or "Read-only file system" in text:
        return "the folder cannot be written"
    return text[:300] or type(error).__name__


def _header(shape: tuple[int, ...], dtype: np.dtype, chunks: list[int]) -> dict[str, Any]:
    """A zarr 3 header; values are stored as they are."""
    codec = {"name": "bytes"} if dtype.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [codec],
        "fill_value": False if dtype == np.bool_ else 0,
    }


def _chunk_shape(shape: tuple[int, ...], itemsize: int, stacked: bool) -> list[int]:
    """One row of a stack, and at most so many slices of the axis after it that the chunk is not large."""
    lead, rest = ([1], shape[1:]) if stacked else ([], shape)
    if not rest:
        return lead
    slice_bytes = max(1, int(np.prod(rest[1:], dtype=np.int64)) * itemsize)
    return [*lead, max(1, min(rest[0], _CHUNK_BYTES // slice_bytes)), *rest[1:]]
