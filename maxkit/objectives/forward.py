# SPDX-License-Identifier: Apache-2.0
"""The forward pass that objectives on log-probs share."""

import dataclasses
from typing import Any

import jax

from maxkit import ops
from maxkit.types import Batch


@dataclasses.dataclass(frozen=True)
class Scored:
    """Of a batch's targets: logps and entropy [B, T] float32, 0 where `loss_mask` is 0; the model's statistics."""

    logps: jax.Array
    entropy: jax.Array
    aux: dict[str, jax.Array]


def score(model: Any, batch: Batch, *, num_tiles: int, temperature: float = 1.0) -> Scored:
    """Log-probs of `batch.targets` under the model at a temperature (`ops.token_logps`)."""
    hidden = model.hidden(batch.tokens, batch.positions, segment_ids=batch.segment_ids)
    x, table = model.head_operands(hidden.x)
    logps, entropy = ops.token_logps(
        x,
        table,
        batch.targets,
        batch.loss_mask,
        num_tiles=num_tiles,
        temperature=temperature,
        soft_cap=model.config.final_soft_cap,
    )
    return Scored(logps, entropy, hidden.aux)
