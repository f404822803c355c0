# SPDX-License-Identifier: Apache-2.0
"""How likely texts are after a context: many continuations of one context in one row, so that it is read once.

A row is the context without its last token, then a branch for every continuation that begins with that last token:

    context     a b c       continuations   d e | f
    tokens      a b   c d   c
    targets     - -   d e   f
    positions   0 1   2 3   2
    branch      0 0   1 1   2

A token sees branch 0 and its own branch, so each continuation has the log-probabilities that it would have alone. A
layer that carries a state from token to token (gated delta rule), and a named attention kernel that takes no mask,
cannot branch: there each continuation has a row of its own.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from maxkit import mesh as meshes
from maxkit.errors import UserError
from maxkit.infer.score import token_logps
from maxkit.models.definition import ModelDefinition
from maxkit.types import Tree

LEAST_WIDTH = 16


class Continuations(NamedTuple):
    """Token ids of a context, at least one, and of what may follow it, each at least one."""

    context: Sequence[int]
    options: Sequence[Sequence[int]]


class _Row(NamedTuple):
    """One row of a batch: tokens, targets, positions and branch [4, T], and where each continuation's targets stand."""

    columns: np.ndarray
    starts: tuple[int, ...]
    lengths: tuple[int, ...]


def continuation_logps(
    definition: ModelDefinition,
    params: Tree,
    items: Sequence[Continuations],
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> list[list[np.ndarray]]:
    """For each item and each of its options, float32 log-probabilities (nats) of the option's tokens, in order.

    Rows are sorted by length and padded on the right to one of few widths (16, 24, 32, 48, 64, ...): one compiled
    program for each. `mesh` is set around the calls; None leaves the one in force.

    Checked against transformers 5.23.0 on SmolLM2-135M in float32, each option alone: the sums over an option's tokens
    agree within 5e-4 (tests/golden/test_eval_smollm2.py).

    Raises:
        UserError: an empty context or option, more tokens than the model allows, an id outside the vocabulary.
    """
    _check(definition, items)
    shared = can_branch(definition)
    parts = [[item] if shared else [Continuations(item.context, [o]) for o in item.options] for item in items]
    rows = [_row(part) for some in parts for part in some]
    found: list[list[np.ndarray]] = [[] for _ in rows]
    # The longest first: what does not fit into memory fails at once.
    order = sorted(range(len(rows)), key=lambda i: -rows[i].columns.shape[1])
    for first in range(0, len(order), batch_size):
        group = order[first : first + batch_size]
        batch = _padded([rows[i] for i in group], min(1 << (len(group) - 1).bit_length(), batch_size))
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            logps = np.asarray(_logps(definition, shared, params, *batch))
        for i, line in zip(group, logps, strict=False):
            spans = zip(rows[i].starts, rows[i].lengths, strict=True)
            found[i] = [line[start : start + length].copy() for start, length in spans]
    pieces = iter(found)
    return [[logps for _ in some for logps in next(pieces)] for some in parts]


def can_branch(definition: ModelDefinition) -> bool:
    """Whether continuations of one context may share a row."""
    attends = all(block.mixer == "attention" for block in definition.config.blocks)
    return attends and definition.execution.attention_kernel in ("auto", "reference")


def _row(item: Continuations) -> _Row:
    shared, last = list(item.context[:-1]), item.context[-1]
    tokens, targets = list(shared), [0] * len(shared)
    positions, branch, starts = list(range(len(shared))), [0] * len(shared), []
    for number, option in enumerate(item.options, start=1):
        starts.append(len(tokens))
        tokens += [last, *option[:-1]]
        targets += option
        positions += range(len(shared), len(shared) + len(option))
        branch += [number] * len(option)
    columns = np.asarray([tokens, targets, positions, branch], np.int32)
    return _Row(columns, tuple(starts), tuple(len(option) for option in item.options))


def _padded(rows: Sequence[_Row], count: int) -> tuple[np.ndarray, ...]:
    """tokens, targets, positions, branch and segment ids (0 is padding), each [count, T]."""
    lengths = [row.columns.shape[1] for row in rows]
    batch = np.zeros((5, count, _width(max(lengths))), np.int32)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        batch[:4, i, :length], batch[4, i, :length] = row.columns, 1
    return tuple(batch)


def _width(length: int) -> int:
    """The next power of two, or three quarters of it where that is enough."""
    power = max(LEAST_WIDTH, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > LEAST_WIDTH and length <= power * 3 // 4 else power


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logps(definition, shared, params, *columns):
    tokens, targets, positions, branch, segments = (meshes.constrain(column, "BT") for column in columns)
    mask = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]) if shared else None
    logps = token_logps(
        definition.merge(params), tokens, targets, segment_ids=segments, positions=positions, attention_mask=mask
    )
    return meshes.replicate(logps)


def _check(definition: ModelDefinition, items: Sequence[Continuations]) -> None:
    config = definition.config
    for number, item in enumerate(items):
        if not item.context or not item.options or not all(item.options):
            raise UserError(f"item {number} has an empty context or option: at least one token is needed in each")
        longest = len(item.context) + max(len(option) for option in item.options)
        if longest > config.max_seq_len + 1:  # the last token is only predicted
            raise UserError(
                f"item {number} has {longest} tokens; allowed are max_seq_len + 1 = {config.max_seq_len + 1}"
            )
        ids = [*item.context, *(token for option in item.options for token in option)]
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            found = f"ids from {min(ids)} to {max(ids)}"
            raise UserError(f"item {number} has {found}; allowed: 0 to {config.vocab_size - 1}")
