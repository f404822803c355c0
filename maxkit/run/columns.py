# SPDX-License-Identifier: Apache-2.0
"""Columns that a model computes of rows, once, before the first update: a reference's log-probs, a teacher's tokens."""

import functools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from maxkit import mesh as meshes
from maxkit.config import Distill
from maxkit.data.loader import Rows, eval_batches
from maxkit.models.definition import ModelDefinition
from maxkit.objectives.forward import score
from maxkit.run.batches import FIELDS
from maxkit.types import Batch, Tree

if TYPE_CHECKING:
    from maxkit.run.session import Run

Columns = dict[str, np.ndarray]


def rows_digest(rows: Rows) -> str:
    """The digest of what was read, without the columns that were computed of it."""
    return Rows({name: rows.columns[name] for name in FIELDS}).digest()


def kept_columns(
    run: "Run", name: str, splits: Mapping[str, Rows], compute: Callable[[Rows], Columns]
) -> dict[str, Columns]:
    """`compute(rows)` of every split, from the folder where an earlier start of the run left it (`NAME.npz`).

    A file that is damaged or of other rows is made again. Before the first saved update it always is: nothing in the
    folder says yet which weights it was made with.
    """
    path = run.folder / f"{name}.npz"
    digest = "".join(rows_digest(rows) for rows in splits.values())
    # Of several hosts, not all see the folder.
    found = _read(path, digest, splits) if run.steps_done and jax.process_count() == 1 else None
    if found is not None:
        return found
    made = {split: compute(rows) if len(rows) else {} for split, rows in splits.items()}
    if run.primary:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"digest": np.asarray(digest)}
        arrays |= {f"{split}/{name}": value for split, columns in made.items() for name, value in columns.items()}
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **arrays)
        partial.replace(path)
    return made


def _read(path: Path, digest: str, splits: Iterable[str]) -> dict[str, Columns] | None:
    if not path.exists():
        return None
    try:
        with np.load(path) as stored:
            if str(stored["digest"]) != digest:
                return None
            found: dict[str, Columns] = {split: {} for split in splits}  # one without rows has no columns
            for key in set(stored.files) - {"digest"}:
                split, column = key.split("/")
                found[split][column] = stored[key]
            return found
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def reference_logps(run: "Run", rows: Rows) -> np.ndarray:
    """[rows, T] float32: log-probs of the trained targets before the first update; 0 elsewhere.

    The reference is the model that the run starts from. Adapters add nothing there, so with LoRA it is the base.
    """
    if run.steps_done:
        params = run.initial_params()
    else:
        params = run.params
    function = _logps(run.definition, run.cfg.num_vocab_tiling)
    return over_rows(run, rows, lambda batch: {"logps": function(params, batch)})["logps"]


@functools.lru_cache(maxsize=4)
def _logps(definition: ModelDefinition, num_tiles: int) -> Callable[[Tree, Batch], jax.Array]:
    return jax.jit(lambda params, batch: score(definition.merge(params), batch, num_tiles=num_tiles).logps)


def teacher_columns(run: "Run", read: Callable[[], Tree], rows: Rows) -> Columns:
    """`teacher_ids` and `teacher_logps` [rows, T, K]: the teacher's K likeliest next tokens at the distillation
    temperature.
    """
    cfg, teacher, params = run.cfg, run.blueprint.teacher, read()
    assert isinstance(cfg, Distill) and teacher is not None
    function = _top_k(teacher.definition, cfg.teacher_top_k, cfg.distill_temperature, cfg.num_vocab_tiling)
    return over_rows(run, rows, lambda batch: function(params, batch))


@functools.lru_cache(maxsize=4)
def _top_k(
    definition: ModelDefinition, k: int, temperature: float, num_tiles: int
) -> Callable[[Tree, Batch], dict[str, jax.Array]]:
    def of_batch(params: Tree, batch: Batch) -> dict[str, jax.Array]:
        model = definition.merge(params)
        x = model.hidden(batch.tokens, batch.positions, segment_ids=batch.segment_ids).x
        rows, length, _ = x.shape
        size = -(-length // num_tiles)

        def of_tile(x: jax.Array) -> tuple[jax.Array, jax.Array]:  # [B, t, D], one tile's logits exist at a time
            logits = meshes.constrain(model.head(x).astype(jnp.float32) / temperature, "BTS")  # V whole, for the sort
            logps, ids = jax.lax.top_k(jax.nn.log_softmax(logits), k)
            return ids, logps

        def whole(parts: jax.Array) -> jax.Array:
            return parts.swapaxes(0, 1).reshape(rows, num_tiles * size, k)[:, :length]  # (tile, B, t, K) -> (B, T, K)

        padded = jnp.pad(x, ((0, 0), (0, num_tiles * size - length), (0, 0)))
        ids, logps = jax.lax.map(of_tile, padded.reshape(rows, num_tiles, size, -1).swapaxes(0, 1))
        return {"teacher_ids": whole(ids), "teacher_logps": whole(logps)}

    return jax.jit(of_batch)


def over_rows(run: "Run", rows: Rows, function: Callable[[Batch], dict[str, jax.Array]]) -> Columns:
    """`function` of all rows, batch by batch, in their order; every process gets all of them."""
    ways = meshes.batch_ways(run.mesh)
    size = -(-min(run.cfg.batch_size, len(rows)) // ways) * ways
    place, found = run.place, []
    own = Rows({name: rows.columns[name] for name in FIELDS})
    with jax.set_mesh(run.mesh):
        for batch in eval_batches(own, batch_size=size, process_index=place.index, process_count=place.count):
            found.append({name: _whole(value, place.count) for name, value in function(place(batch)).items()})
    return {name: np.concatenate([part[name] for part in found])[: len(rows)] for name in found[0]}


def _whole(x: jax.Array, processes: int) -> np.ndarray:
    """All rows of a global array in the order of the data: process p holds rows p, p + n, ... of each batch."""
    if processes == 1:
        return np.asarray(x)
    whole = np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return whole.reshape(processes, -1, *whole.shape[1:]).swapaxes(0, 1).reshape(whole.shape)
