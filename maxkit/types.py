# SPDX-License-Identifier: Apache-2.0
"""The records that every layer shares, and the dimension alphabet.

One letter means one thing in einsums, parameter metadata, sharding rules and shape comments:

    B batch        T query tokens   S key/cache tokens   D embed       F mlp
    N query heads  K kv heads       G = N / K            H head dim    V vocab
    E experts      C capacity       L layers (stacked)   R LoRA rank   Q, Z MLA query and kv ranks
    W width of a causal convolution

Next to read: `mesh.py` (what the letters mean for sharding), `models/decoder.py`.
"""

import dataclasses
from typing import Any

import jax

Tree = Any  # a pure nested dict of arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One update's worth of training rows (or one micro-batch of it).

    tokens [B, T] int32; targets [B, T] int32, the token that follows inside the same segment;
    loss_mask [B, T] float32, 1 where the target is trained; segment_ids [B, T] int32, 0 is padding;
    positions [B, T] int32, counted from 0 in each segment.
    `columns` holds what an objective adds (reference log-probs, advantages, ...), each with B in front.
    `media` is the room for image and audio inputs, each with B in front.
    """

    tokens: jax.Array
    targets: jax.Array
    loss_mask: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    columns: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    media: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """What the decoder computes before its head: x [B, T, D], the new cache, per-layer statistics."""

    x: jax.Array
    cache: "Cache | None"
    aux: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values seen so far.

    layers: {group: [one dict of arrays per block]}, stacked on axis 0 when the model is scanned. Of attention it is
        {"k", "v": [B, S, K, H]}, of latent attention {"latent", "key"}, of the gated delta rule a state of fixed size.
    positions [B, S] int32: the position of the token in each slot, -1 where the slot is empty.
    segment_ids [B, S] int32: the segment of the token in each slot, 0 where the slot is empty.
    end_index [B] int32: the next slot to write, per row.
    """

    layers: dict[str, list[dict[str, jax.Array]]]
    positions: jax.Array
    segment_ids: jax.Array
    end_index: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOut:
    """What an objective returns for one micro-batch; everything but `maxima` only adds over micro-batches.

    loss: scalar, each term already divided by its weight over the whole update.
    terms: {name: unnormalised float32 sum}, with the same names as the objective's weights.
    metrics: {name: scalar that adds}, already divided by global weights.
    maxima: {name: scalar}, combined by maximum.
    statistics: {name: array of any shape that adds}, of which the step makes metrics at the end (`train/routing.py`).
    """

    loss: jax.Array
    terms: dict[str, jax.Array]
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    maxima: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    statistics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run owns: step (updates done, int32), trained params, the rest of the model, optimizer state, PRNG key."""

    step: jax.Array
    params: Tree
    base: Tree
    opt_state: Tree
    rng: jax.Array
