# SPDX-License-Identifier: Apache-2.0
"""The arrays of one Orbax item, read and written one at a time, or one slice at a time, through TensorStore.

`OrbaxArrays` reads what Orbax wrote (OCDBT or one folder per array, zarr 2 or 3); `OrbaxWriter` writes an item that
Orbax and MaxText restore, without ever holding more than one array. Both import neither JAX nor Orbax.

What Orbax stores, seen in items of 0.11 to 0.12: one zarr array per leaf, named by the path's parts joined by dots, and
`_METADATA`, a JSON object whose `tree_metadata` gives each leaf's path with the kind of each part (1: an index of a
sequence, 2: a key of a mapping) and its `value_type` ("None" and "Dict" are empty places without an array).
"""

import base64
import contextlib
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts

from maxkit.errors import UserError

Parts = tuple[str, ...]

METADATA, STEP_METADATA, COMMIT = "_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt"
EMPTY = ("None", "Dict", "List", "Tuple")  # value types without an array
SEQUENCE, MAPPING = 1, 2  # kinds of a path's parts
_COMMIT_BYTES = 16 * 2**20  # of small arrays together, and of a piece of a large one
_ONE_DEVICE = {
    "sharding_type": "NamedSharding",
    "shape": [1],
    "axis_names": ["data"],
    "axis_types": ["AxisType.Auto"],
    "partition_spec": [],
    "device_mesh": {"mesh": [{"id": 0}]},
}


class ArrayInfo(NamedTuple):
    """One leaf: its path, shape and dtype, or value_type alone where it is an empty place. chunks: shape of a piece."""

    parts: Parts
    value_type: str
    shape: tuple[int, ...] = ()
    dtype: np.dtype = np.dtype(np.float32)
    chunks: tuple[int, ...] = ()

    @property
    def is_array(self) -> bool:
        """Whether something is stored."""
        return self.value_type not in EMPTY


class OrbaxArrays:
    """The leaves of an item by path ("a/b/c"): headers at once, values when asked for.

    Raises UserError for an item that is damaged or incomplete.
    """

    def __init__(self, path: Any) -> None:
        self.path = path
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 4}})
        self._location = str(path) if "://" in str(path) else f"file://{pathlib.Path(path).absolute()}"
        self._ocdbt = (path / "manifest.ocdbt").exists()
        self._key_types: dict[str, tuple[int, ...]] = {}
        self.leaves: dict[str, ArrayInfo] = self._listed()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of every array."""
        return {path: leaf.shape for path, leaf in self.leaves.items() if leaf.is_array}

    def is_sequence(self, path: str, depth: int) -> bool:
        """Whether part number `depth` of a leaf's path is an index."""
        return self._key_types[path][depth] == SEQUENCE

    def read(self, path: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """An array, or a part of it: only the pieces that hold the part are read.

        Raises UserError where bytes are missing or damaged.
        """
        try:
            array = self._open(path)[(*index, ...)].read().result()
        except (ValueError, OSError, KeyError) as error:
            raise self._damaged(path, error) from error
        return np.asarray(array)

    def extension(self, path: str) -> dict[str, Any]:
        """What Orbax noted about a leaf beyond its shape: {"random_key_impl": ...} for PRNG keys."""
        return self._extensions().get(".".join(self.leaves[path].parts), {})

    def _extensions(self) -> dict[str, dict[str, Any]]:
        file = self.path / "array_metadatas" / "process_0"
        if not file.exists():
            return {}
        try:
            found = [entry["array_metadata"] for entry in json.loads(file.read_text())["array_metadatas"]]
            return {entry["param_name"]: entry.get("ext_metadata") or {} for entry in found}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error

    def _open(self, path: str) -> ts.TensorStore:
        leaf = self.leaves.get(path)
        if leaf is None or not leaf.is_array:
            raise UserError(f"{self.path} holds no array {path!r}")
        name = ".".join(leaf.parts)
        spec = {"driver": self._drivers[name], "kvstore": self._kvstore(name)}
        # A piece that is not there is damage, not zeros, unless the writer left zeros out (old versions did).
        spec["fill_missing_data_reads"] = not self._zeros_stored
        return ts.open(spec, open=True, read=True, context=self._context).result()

    def _kvstore(self, name: str) -> Any:
        if self._ocdbt:
            return {"driver": "ocdbt", "base": f"{self._location}/", "path": f"{name}/"}
        return f"{self._location}/{name}/"

    def _listed(self) -> dict[str, ArrayInfo]:
        headers = self._headers()
        self._drivers = {name: driver for name, (driver, _) in headers.items()}
        found: dict[str, ArrayInfo] = {}
        for parts, kinds, value_type in self._entries():
            path, name = "/".join(parts), ".".join(parts)
            self._key_types[path] = kinds
            if value_type in EMPTY:
                found[path] = ArrayInfo(parts, value_type)
            elif name not in headers:
                raise UserError(f"{self.path} is damaged: {path} is listed in {METADATA} but not stored")
            else:
                found[path] = ArrayInfo(parts, value_type, *_header(headers[name][1]))
        return found

    def _entries(self) -> list[tuple[Parts, tuple[int, ...], str]]:
        file = self.path / METADATA
        if not file.exists():
            raise UserError(f"{self.path}: no {METADATA}: not an Orbax item, or one whose saving was interrupted")
        try:
            content = json.loads(file.read_text())
            self._zeros_stored = bool(content.get("store_array_data_equal_to_fill_value"))
            entries = content["tree_metadata"].values()
            return [
                (
                    tuple(str(part["key"]) for part in entry["key_metadata"]),
                    tuple(int(part["key_type"]) for part in entry["key_metadata"]),
                    _value_type(entry["value_metadata"]),
                )
                for entry in entries
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error

    def _headers(self) -> dict[str, tuple[str, dict]]:
        """{array name: (driver, header)}."""
        drivers = {b"zarr.json": "zarr3", b".zarray": "zarr"}
        spec = {"driver": "ocdbt", "base": f"{self._location}/"} if self._ocdbt else f"{self._location}/"
        try:
            store = ts.KvStore.open(spec, context=self._context).result()
            keys = [key for key in store.list().result() if key.rpartition(b"/")[2] in drivers]
            values = [store.read(key) for key in keys]
            return {
                key.rpartition(b"/")[0].decode(): (drivers[key.rpartition(b"/")[2]], json.loads(value.result().value))
                for key, value in zip(keys, values, strict=True)
            }
        except (ValueError, OSError, KeyError) as error:
            raise self._damaged("its index", error) from error

    def _damaged(self, what: str, error: Exception) -> UserError:
        return UserError(f"{self.path}: {what} cannot be read: {' '.join(str(error).split())[:300]}")


def _value_type(metadata: dict[str, Any]) -> str:
    found = str(metadata.get("value_type", ""))
    return found if found in EMPTY or not metadata.get("skip_deserialize") else "None"


def _header(header: dict[str, Any]) -> tuple[tuple[int, ...], np.dtype, tuple[int, ...]]:
    """(shape, dtype, chunk shape) of a zarr 3 or zarr 2 header."""
    shape = tuple(header["shape"])
    if "data_type" in header:
        chunks = tuple(header["chunk_grid"]["configuration"]["chunk_shape"])
        for codec in header["codecs"]:
            if codec["name"] == "sharding_indexed":
                chunks = tuple(codec["configuration"]["chunk_shape"])
        return shape, dtype_of(header["data_type"]), chunks
    name = header["dtype"]
    return shape, dtype_of(name) if name == "bfloat16" else np.dtype(name), tuple(header["chunks"])


def dtype_of(name: str) -> np.dtype:
    """The numpy dtype of a name such as "bfloat16"."""
    return np.dtype(getattr(ml_dtypes, name)) if name not in np.sctypeDict else np.dtype(name)


class OrbaxWriter:
    """An item being written: `write` whole arrays, or `create` one and give it part by part, `finish` at the end.

    Small arrays are committed together, a large one is written piece by piece, a stack of layers layer by layer: beside
    what the caller holds there are never more than about 64 MB, or one layer, in memory.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._entries: dict[str, dict[str, Any]] = {}
        self._notes: list[dict[str, Any]] = []
        self._transaction, self._pending = ts.Transaction(), 0

    def empty(self, parts: Parts, value_type: str, sequences: frozenset[int] = frozenset()) -> None:
        """Note a place without an array: value_type "None" or "Dict"."""
        self._list(parts, {"value_type": value_type, "skip_deserialize": True}, sequences)

    def write(
        self, parts: Parts, array: np.ndarray, sequences: frozenset[int] = frozenset(), impl: str | None = None
    ) -> None:
        """Store a whole array. sequences: which parts of its path are indices. impl: of PRNG key data."""
        chunks = _pieces(array.shape, array.dtype.itemsize)
        self._note(parts, array.shape, chunks, sequences, impl)
        spec = self._spec(parts) | {"metadata": _zarr_metadata(array.shape, chunks, array.dtype)}
        if array.nbytes <= _COMMIT_BYTES:
            if self._pending + array.nbytes > _COMMIT_BYTES:
                self._commit()
            self._pending += array.nbytes
            store = ts.open(spec, create=True, context=self._context, transaction=self._transaction).result()
            store[...] = array
            return
        store = ts.open(spec, create=True, context=self._context).result()
        for start in range(0, array.shape[0], chunks[0]):
            piece = slice(start, min(start + chunks[0], array.shape[0]))
            store[piece].write(array[piece]).result()

    def create(
        self, parts: Parts, shape: tuple[int, ...], dtype: np.dtype, axis: int, sequences: frozenset[int] = frozenset()
    ) -> ts.TensorStore:
        """An array that takes its parts along `axis` one by one: `target[index] = part`."""
        chunks = tuple(1 if number == axis else size for number, size in enumerate(shape))
        self._note(parts, shape, chunks, sequences, None)
        spec = self._spec(parts) | {"metadata": _zarr_metadata(shape, chunks, dtype)}
        return ts.open(spec, create=True, context=self._context).result()

    def finish(self) -> None:
        """Commit what is pending and write the item's metadata."""
        self._commit()
        folder = self.path / "array_metadatas"
        folder.mkdir()
        (folder / "process_0").write_text(json.dumps({"array_metadatas": [{"array_metadata": n} for n in self._notes]}))
        # PRNG keys become jax arrays, for which Orbax wants to know a device; everything else becomes numpy's.
        keys = [note["param_name"] for note in self._notes if note["ext_metadata"]]
        sharding = {base64.b64encode(key.encode()).decode(): json.dumps(_ONE_DEVICE) for key in keys}
        (self.path / "_sharding").write_text(json.dumps(sharding))
        tree = {
            "tree_metadata": self._entries,
            "use_ocdbt": True,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self.path / METADATA).write_text(json.dumps(tree))

    def _commit(self) -> None:
        self._transaction.commit_async().result()
        self._transaction, self._pending = ts.Transaction(), 0

    def _spec(self, parts: Parts) -> dict[str, Any]:
        store = {"driver": "ocdbt", "base": f"file://{self.path.absolute()}/", "path": ".".join(parts) + "/"}
        return {"driver": "zarr3", "kvstore": store, "store_data_equal_to_fill_value": True}

    def _note(
        self,
        parts: Parts,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        sequences: frozenset[int],
        impl: str | None,
    ) -> None:
        extension = {"random_key_impl": impl} if impl else None
        note = {"param_name": ".".join(parts), "write_shape": list(shape), "chunk_shape": list(chunks)}
        self._notes.append(note | {"ext_metadata": extension})
        value = {"value_type": "jax.Array" if impl else "np.ndarray", "skip_deserialize": False}
        self._list(parts, value | {"write_shape": list(shape)}, sequences)

    def _list(self, parts: Parts, value: dict[str, Any], sequences: frozenset[int]) -> None:
        kinds = [SEQUENCE if number in sequences else MAPPING for number in range(len(parts))]
        keys = [{"key": part, "key_type": kind} for part, kind in zip(parts, kinds, strict=True)]
        self._entries[str(parts)] = {"key_metadata": keys, "value_metadata": value}


def _pieces(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of the pieces of a whole array: as many slices of its first axis as are not large together."""
    if not shape:
        return ()
    slice_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * itemsize)
    return (max(1, min(shape[0], _COMMIT_BYTES // slice_bytes)), *shape[1:])


def _zarr_metadata(shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """Not compressed: weights hardly get smaller, and it takes longer than writing them."""
    bytes_codec = {"name": "bytes"} if dtype.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}
    chunks = tuple(max(size, 1) for size in chunks)  # a size of zero is no chunk shape
    return {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "codecs": [bytes_codec],
    }


@contextlib.contextmanager
def new_step(step_path: pathlib.Path, custom_metadata: dict[str, Any], item: str = "items"):
    """An `OrbaxWriter` for item `item` of a new step directory, which appears only when all is written.

    Until then its name ends in `.orbax-checkpoint-tmp`, which Orbax and MaxText take for an interrupted save.
    Raises UserError if the step exists, or the disk is full.
    """
    if step_path.exists():
        raise UserError(f"{step_path} exists already: choose another folder or remove it first")
    temporary = step_path.with_name(f"{step_path.name}.orbax-checkpoint-tmp")
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        writer = OrbaxWriter(temporary / item)
        yield writer
        writer.finish()
        handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
        described = {
            "item_handlers": {item: handler},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": None,
            "commit_timestamp_nsecs": None,
            "custom_metadata": custom_metadata,
        }
        (temporary / STEP_METADATA).write_text(json.dumps(described))
        for folder in (temporary / item, temporary):
            (folder / COMMIT).write_text(f"Checkpoint commit was successful to {step_path}")
        os.replace(temporary, step_path)
    except OSError as error:
        raise UserError(f"{step_path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
