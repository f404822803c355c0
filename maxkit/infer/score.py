# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens, tile by tile: the logits [B, T, V] of a whole batch never exist."""

import contextlib
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maxkit import mesh as meshes
from maxkit import ops
from maxkit.errors import UserError
from maxkit.infer.engine import _bucket
from maxkit.models.decoder import Decoder
from maxkit.models.definition import ModelDefinition
from maxkit.types import Tree

TILE = 64  # tokens of a row whose logits exist at one time


def token_logps(
    model: Decoder,
    tokens: jax.Array,
    targets: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """[B, T] float32: log softmax(logits / temperature) of `targets` after `tokens`, both [B, T], in nats.

    For use inside a traced function; 0 at padding (segment 0). `temperature` is above 0.
    """
    hidden = model.hidden(tokens, positions, attention_mask=attention_mask, segment_ids=segment_ids)
    x, table = model.head_operands(hidden.x)
    logps, _ = ops.token_logps(
        x,
        table,
        targets,
        jnp.ones_like(tokens) if segment_ids is None else segment_ids,
        num_tiles=-(-tokens.shape[1] // TILE),
        temperature=temperature,
        soft_cap=model.config.final_soft_cap,
    )
    return logps


def sequence_logps(
    definition: ModelDefinition,
    params: Tree,
    sequences: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    batch_size: int = 8,
    mesh: Mesh | None = None,
) -> list[np.ndarray]:
    """For each sequence of n ids, n - 1 float32 log-probabilities (nats): of each token given those before
    it.

    `batch_size` sequences at a time, right-padded to a power of two. `mesh` is set around the call; None
    leaves the one in force.

    Raises:
        UserError: an empty sequence, one longer than the model allows, an id outside the vocabulary,
            temperature not above 0.
    """
    _check(definition, sequences, temperature)
    logps = []
    for first in range(0, len(sequences), batch_size):
        group = sequences[first : first + batch_size]
        rows = min(_bucket(len(group), 1), batch_size)
        width = min(_bucket(max(len(ids) for ids in group)), definition.config.max_seq_len)
        tokens, segments = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
        for row, ids in enumerate(group):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            out = np.asarray(_score(definition, params, tokens, segments, np.float32(temperature)))
        logps += [out[row, : len(ids) - 1].copy() for row, ids in enumerate(group)]
    return logps


@functools.partial(jax.jit, static_argnums=0)
def _score(definition, params, tokens, segments, temperature):
    tokens, segments = meshes.constrain(tokens, "BT"), meshes.constrain(segments, "BT")
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return token_logps(definition.merge(params), tokens, targets, segment_ids=segments, temperature=temperature)


def _check(definition: ModelDefinition, sequences: Sequence[Sequence[int]], temperature: float) -> None:
    config = definition.config
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature={temperature} must be a positive finite number to score with")
    for number, ids in enumerate(sequences):
        if not 1 <= len(ids) <= config.max_seq_len:
            raise UserError(f"sequence {number} has {len(ids)} tokens; allowed: 1 to max_seq_len={config.max_seq_len}")
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            found = f"ids from {min(ids)} to {max(ids)}"
            raise UserError(f"sequence {number} has {found}; allowed: 0 to {config.vocab_size - 1}")
