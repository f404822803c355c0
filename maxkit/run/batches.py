# SPDX-License-Identifier: Apache-2.0
"""Rows on their way to the mesh: this process's part of a global batch, and a data set as a source of batches."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from maxkit import mesh as meshes
from maxkit.checkpoint.store import set_iterator_state
from maxkit.data.loader import Rows, make_loader
from maxkit.types import Batch, TrainState

FIELDS = ("tokens", "targets", "loss_mask", "segment_ids", "positions")


class Placer:
    """Puts rows, numpy arrays of this process with one leading length, on the mesh as a `Batch`."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.index, self.count = meshes.process_rows(mesh)

    def __call__(self, rows: dict[str, np.ndarray]) -> Batch:
        """Names that are no field of a batch become its columns."""
        fields: dict[str, Any] = {name: self._put(rows[name]) for name in FIELDS}
        columns = {name: self._put(value) for name, value in rows.items() if name not in FIELDS}
        return Batch(**fields, columns=columns)

    def _put(self, x: np.ndarray) -> jax.Array:
        sharding = meshes.batch_sharding(self.mesh, x.ndim)
        shape = (x.shape[0] * self.count, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(x), shape)


class RowBatches:
    """A data set, read in a new order each epoch, as a `BatchSource`."""

    def __init__(self, rows: Rows, place: Placer, *, batch_size: int, seed: int, shuffle: bool) -> None:
        self._place = place
        self._iterator = make_loader(
            rows,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            process_index=place.index,
            process_count=place.count,
        )

    def next(self, state: TrainState) -> tuple[Batch, dict[str, float]]:
        """The next rows, whatever the state."""
        return self._place(next(self._iterator)), {}

    def get_state(self) -> Any:
        """The position in the data."""
        return self._iterator.get_state()

    def set_state(self, value: Any) -> None:
        """Go on after that position."""
        set_iterator_state(self._iterator, value)
