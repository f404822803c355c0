# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction. Pretraining and supervised fine-tuning differ only in the batch's mask."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maxkit import ops
from maxkit.types import Batch, LossOut


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Mean negative log-likelihood of the trained targets, in nats per token, plus an optional z-loss.

        loss = sum_i m_i nll_i / M + z_loss * sum_i m_i lse_i^2 / M,    M = sum_i m_i over the whole update

    m is `batch.loss_mask`. M is summed over all micro-batches before any is differentiated, so accumulation is exact.

    num_tiles: tiles of the vocabulary projection (`ops.cross_entropy`).
    z_loss: its coefficient, 0 to leave it out.
    """

    num_tiles: int = 4
    z_loss: float = 0.0

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """{"tokens": M}, at least 1 so that an update without a trained token has loss 0."""
        return {"tokens": jnp.maximum(jnp.sum(batch.loss_mask), 1.0)}

    def __call__(self, model: Any, batch: Batch, frozen: Any, weights: dict[str, jax.Array]) -> LossOut:
        """The part of the loss that this micro-batch contributes."""
        hidden = model.hidden(batch.tokens, batch.positions, segment_ids=batch.segment_ids)
        x = model.final_norm(hidden.x)
        nll, z = ops.cross_entropy(
            x, model.head_table, batch.targets, batch.loss_mask, num_tiles=self.num_tiles, z_loss=self.z_loss
        )
        total = weights["tokens"]
        metrics = {"loss/nll": nll / total}
        if self.z_loss:
            metrics["loss/z"] = z / total
        return LossOut(loss=(nll + z) / total, terms={"tokens": nll}, metrics=metrics)
