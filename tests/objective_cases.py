# SPDX-License-Identifier: Apache-2.0
"""Every objective with a batch of four rows of very different lengths, on a model of one layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import tiny, weights

from maxkit.infer import token_logps
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition
from maxkit.objectives import Distill, Policy, Preference
from maxkit.types import Batch

LENGTH, VOCAB, TOP_K = 24, 48, 5
STUDENT = ModelDefinition(tiny(num_layers=1))
# Other width, depth and layout.
TEACHER = ModelDefinition(
    tiny(embed_dim=20, num_layers=2, num_heads=5, num_kv_heads=5, tie_embeddings=False), Execution(scan_layers=False)
)

# name: (objective, the columns its batch has)
OBJECTIVES = {
    "dpo": (Preference("sigmoid", 0.3, 0.1, nll_weight=0.5, num_tiles=3), ("ref_logps",)),
    "orpo": (Preference("orpo", 0.3, num_tiles=3), ()),
    "grpo": (Policy("sequence_mean", beta=0.04, num_tiles=3), ("advantages", "old_logps", "ref_logps")),
    "dapo": (Policy("token_mean", epsilon_high=0.28, dual_clip=3.0, temperature=0.7, num_tiles=3), ("advantages",)),
    "gspo": (
        Policy("sequence_scale", "sequence", 0.02, 0.03, max_tokens=16, num_tiles=3),
        ("advantages", "old_logps"),
    ),
    "distill": (Distill(TEACHER, "jensen_shannon", 2.0, 0.3, num_tiles=3), ()),
    "distill/top_k": (Distill(None, "forward", num_tiles=3), ("teacher_ids", "teacher_logps")),
}
# Lengths of the sequences in each row; a pair is two of them.
LENGTHS = ((3, 12, 4, 5), (12, 4), (3, 4), (9, 15))


def sequences(lengths=LENGTHS, seed=0):
    """A batch of packed rows: a prompt of one or two tokens, an answer of which all targets are trained."""
    draw = np.random.default_rng(seed)
    columns = {name: np.zeros((len(lengths), LENGTH)) for name in ("tokens", "segment_ids", "positions", "loss_mask")}
    columns["advantages"] = np.zeros((len(lengths), LENGTH))
    for row, of_row in enumerate(lengths):
        start = 0
        for number, length in enumerate(of_row, start=1):
            at, prompt = slice(start, start + length), 1 + length % 2
            columns["tokens"][row, at] = draw.integers(1, VOCAB, length)
            columns["segment_ids"][row, at], columns["positions"][row, at] = number, np.arange(length)
            columns["loss_mask"][row, start + prompt - 1 : start + length - 1] = 1
            columns["advantages"][row, at] = draw.normal()
            start += length
    tokens, segments = columns["tokens"], columns["segment_ids"]
    targets = np.where(np.roll(segments, -1, axis=1) == segments, np.roll(tokens, -1, axis=1), 0)
    ids = [jnp.asarray(x, jnp.int32) for x in (tokens, targets, segments, columns["positions"])]
    mask, advantages = (jnp.asarray(columns[name], jnp.float32) for name in ("loss_mask", "advantages"))
    return Batch(ids[0], ids[1], mask, *ids[2:], columns={"advantages": advantages})


@functools.partial(jax.jit, static_argnums=0)
def _logps(definition, params, batch):
    model = definition.merge(params)
    return token_logps(model, batch.tokens, batch.targets, segment_ids=batch.segment_ids, positions=batch.positions)


@jax.jit
def _best(params, batch):
    logits, _ = TEACHER.merge(params)(batch.tokens, batch.positions, segment_ids=batch.segment_ids)
    found, ids = jax.lax.top_k(jax.nn.log_softmax(logits), TOP_K)
    return ids, found


def logps(batch, definition=STUDENT):
    """[B, T] of the targets, 0 outside the mask."""
    return np.asarray(batch.loss_mask) * np.asarray(_logps(definition, weights(definition), batch))


def with_columns(batch, names):
    """The batch with these columns: the reference near the policy, the old policy nearer, the teacher's own K best."""
    columns, draw = {}, np.random.default_rng(1)
    noise = {"ref_logps": 0.5, "old_logps": 0.2}
    for name in names:
        if name in noise:
            shift = noise[name] * draw.normal(size=batch.loss_mask.shape) * np.asarray(batch.loss_mask)
            columns[name] = jnp.asarray(logps(batch) + shift, jnp.float32)
        elif name == "advantages":
            columns[name] = batch.columns[name]
        elif name == "teacher_ids":
            columns[name], columns["teacher_logps"] = _best(weights(TEACHER), batch)
    return Batch(**{**vars(batch), "columns": columns})


@functools.cache
def case(name):
    """(objective, batch, frozen)."""
    objective, columns = OBJECTIVES[name]
    frozen = weights(TEACHER) if name == "distill" else None
    return objective, with_columns(sequences(), columns), frozen
