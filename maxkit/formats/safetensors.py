# SPDX-License-Identifier: Apache-2.0
"""The safetensors container: a JSON header with name, dtype, shape and place of each tensor, then their
bytes.

Reading maps the file and checks the header against the file's size. Writing takes tensors in any order: the
places are known from the shapes, so a model is written leaf by leaf without holding it. Not here: what the
names mean (`huggingface.py`).
"""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from maxkit.errors import UserError
from maxkit.formats.mapped import MappedFile

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What quantised weights are made of; see `SafetensorsFile.parts`.
_PARTS = {"U8": np.dtype(np.uint8), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), **_DTYPES}
_OTHER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
                "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
DTYPE_NAMES = {dtype.name: name for name, dtype in _DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 8


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a ValueError if a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


class Entry(NamedTuple):
    """One tensor of a file; `start` in bytes from the file's begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class SafetensorsFile:
    """One file; `entries` maps names to `Entry`. Raises UserError if it is not well-formed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = MappedFile(self.path)
        except (OSError, ValueError) as error:  # mmap of an empty file is a ValueError
            raise UserError(f"{self.path}: cannot be read as a safetensors file: {error}") from None
        self._data = self._file.data
        header, begin = self._header()
        self.metadata = header.pop("__metadata__", None) or {}
        self.entries = {name: self._entry(name, value, begin) for name, value in header.items()}
        self._refuse_overlap()

    def _fail(self, problem: str) -> UserError:
        return UserError(f"{self.path}: not a valid safetensors file: {problem}. Fetch or write the file again")

    def _header(self) -> tuple[dict[str, Any], int]:
        size = len(self._data)
        length = int.from_bytes(self._data[:8], "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise self._fail(f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(self._data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._fail(f"the header is no JSON, or says a thing twice ({type(error).__name__})") from None
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__") or {}, dict):
            raise self._fail("the header is no JSON object")
        return header, 8 + length

    def _entry(self, name: str, value: Any, begin: int) -> Entry:
        try:
            dtype, shape, (first, last) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
            numbers = [*shape, first, last]
        except (KeyError, TypeError, ValueError):
            raise self._fail(f"tensor {name[:80]!r} has no dtype, shape and data_offsets") from None
        possible = all(type(number) is int and number >= 0 for number in numbers) and len(shape) <= MAX_DIMS
        if not possible or not isinstance(dtype, str):
            raise self._fail(f"tensor {name[:80]!r} has an impossible shape, dtype or place")
        width = _DTYPES[dtype].itemsize if dtype in _DTYPES else _OTHER_BYTES.get(dtype)
        if width is not None and last - first != math.prod(shape) * width:
            raise self._fail(f"tensor {name[:80]!r}: {dtype} {list(shape)} does not fill bytes {first} to {last}")
        if last < first or begin + last > len(self._data):
            raise self._fail(f"tensor {name[:80]!r} ends behind the end of the file")
        return Entry(dtype, shape, begin + first, last - first)

    def _refuse_overlap(self) -> None:
        in_order = sorted(self.entries.items(), key=lambda item: item[1].start)
        for (_, before), (name, after) in zip(in_order, in_order[1:], strict=False):
            if before.start + before.num_bytes > after.start:
                raise self._fail(f"tensor {name[:80]!r} overlaps another")

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor in its stored dtype. Raises UserError if it is no plain float."""
        entry = self.entries[name]
        if entry.dtype not in _DTYPES:
            raise UserError(
                f"{self.path}: tensor {name!r} is stored as {entry.dtype}; supported are "
                f"{', '.join(_DTYPES)}. Use an unquantised copy of the model"
            )
        return self.parts(name)

    def parts(self, name: str) -> np.ndarray:
        """As `read`, also of the bytes and 8-bit floats that quantised weights are stored in."""
        entry = self.entries[name]
        if entry.dtype not in _PARTS:
            raise UserError(f"{self.path}: tensor {name!r} is stored as {entry.dtype}, which no weight is made of")
        return self._file.view(_PARTS[entry.dtype], entry.start, math.prod(entry.shape)).reshape(entry.shape)


class SafetensorsWriter:
    """Writes one file under a temporary name; `finish` gives it its own. `shapes` fix the places."""

    def __init__(
        self,
        path: Path,
        shapes: dict[str, tuple[int, ...]],
        dtype: np.dtype,
        metadata: dict[str, str] | None = None,
    ) -> None:
        """`metadata`: more texts for the header."""
        self.path, self.dtype, self._places = path, dtype, {}
        self._partial = path.with_name(path.name + f".partial-{os.getpid()}")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without this
        header["__metadata__"] |= metadata or {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[dtype.name],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
            self._places[name] = (start, shape)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin aligned
        self._begin = 8 + len(text)
        self._finished = False
        self._stream = open(self._partial, "w+b")
        self._stream.write(len(text).to_bytes(8, "little") + text)
        self._stream.truncate(self._begin + end)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write one tensor at its place."""
        start, shape = self._places[name]
        assert array.shape == shape and array.dtype == self.dtype, (name, array.shape, array.dtype)
        self._stream.seek(self._begin + start)
        self._stream.write(np.ascontiguousarray(array).view(np.uint8).data)

    def read_back(self, name: str) -> np.ndarray:
        """What was written of one tensor, zeros before the first time: to fill it part by part."""
        start, shape = self._places[name]
        self._stream.seek(self._begin + start)
        data = bytearray(math.prod(shape) * self.dtype.itemsize)
        read = self._stream.readinto(data)
        assert read == len(data), (name, read)
        return np.frombuffer(data, self.dtype).reshape(shape)

    def finish(self) -> None:
        """Flush to disk and rename into place."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._partial, self.path)
        self._finished = True

    def discard(self) -> None:
        """Remove what was written, finished or not."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._stream.close()
        self._partial.unlink(missing_ok=True)
        if self._finished:
            self.path.unlink(missing_ok=True)
