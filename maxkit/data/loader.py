# SPDX-License-Identifier: Apache-2.0
"""Rows to batches: a Grain pipeline whose position can be saved, and a plain pass for evaluation.

Update k uses the same rows whatever the number of processes, because every process orders all rows alike and
takes every n-th. So the saved position, {"next_index": k}, is the same on all processes and for all their
numbers.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from maxkit.errors import UserError


class Rows:
    """Named columns, numpy arrays of one leading length; a Grain random-access source of single rows."""

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        """Hold `columns` without copying. Raises ValueError where their lengths differ or there is none."""
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns must have one length, not {lengths}")
        self.columns = dict(columns)
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        """The number of rows."""
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row: each column without its leading axis."""
        return {name: column[index] for name, column in self.columns.items()}

    def __repr__(self) -> str:
        """The length and the columns; Grain shows it in its messages."""
        return f"Rows({len(self)}, {', '.join(self.columns)})"

    def take(self, indices: Sequence[int] | np.ndarray | slice) -> "Rows":
        """The rows at `indices`, in that order."""
        return Rows({name: column[indices] for name, column in self.columns.items()})

    def digest(self) -> str:
        """SHA-256 of names, types, shapes and values: with the loader's settings it decides the batches."""
        digest = hashlib.sha256()
        for name, column in sorted(self.columns.items()):
            digest.update(f"{name} {column.dtype.str} {column.shape}".encode())
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


def make_loader(
    rows: Rows,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator of this process's batches: {column: [batch_size / process_count, ...]}.

    `batch_size` counts rows over all processes. Epochs follow each other without a gap or a dropped row, each
    in its own order if `shuffle`; a batch may hold the end of one epoch and the start of the next, and where
    there are fewer rows than batch_size it holds some rows more than once. Process p has rows p, p + n, p +
    2n, ... of each global batch.
    `get_state()` is a small JSON value and `set_state()` continues with the very next batch, bit for bit.
    Raises `UserError` for no rows, or a batch_size that the processes do not divide.
    """
    _check(rows, batch_size, process_index, process_count)
    dataset = grain.MapDataset.source(rows).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    # Not repeat(): its length is the largest integer, and anything that adds to it overflows.
    dataset = dataset.repeat(2**62 // len(rows))[process_index::process_count].batch(batch_size // process_count)
    # Rows are in memory, so threads would only cost: a batch is a few slices and one copy.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def eval_batches(
    rows: Rows, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over all rows in order, as this process's ceil(len(rows) / batch_size) batches.

    The last batch is filled up with rows of zeros: segment 0 and loss mask 0, so they count nowhere.
    Raises `UserError` as `make_loader` does.
    """
    _check(rows, batch_size, process_index, process_count)
    return _eval_batches(rows, batch_size, slice(process_index, None, process_count))


def _eval_batches(rows: Rows, batch_size: int, own: slice) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(rows), batch_size):
        batch = {}
        for name, column in rows.columns.items():
            part = column[start : start + batch_size]
            padding = np.zeros((batch_size - len(part), *column.shape[1:]), column.dtype)
            batch[name] = np.concatenate([part, padding])[own]
        yield batch


def _check(rows: Rows, batch_size: int, process_index: int, process_count: int) -> None:
    assert 0 <= process_index < process_count, f"process {process_index} of {process_count}"
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size={batch_size} must be a positive multiple of the {process_count} processes")
    if not len(rows):
        raise UserError("the data set has no rows: see the row report for what was read and rejected")
