# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction. Pretraining and supervised fine-tuning differ only in the batch's mask."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maxkit import ops
from maxkit.lazy import make_callable
from maxkit.objectives import routing
from maxkit.types import Batch, LossOut


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Mean negative log-likelihood of the trained targets, in nats per token, plus optional terms.

        loss = sum_i m_i nll_i / M + z_loss * sum_i m_i lse_i^2 / M                    M = sum_i m_i
               + balance_loss * sum_r balance_r / R + router_z_loss * sum_t z_t / N

    m is `batch.loss_mask`; R rows and N tokens are not padding. These are counted over the whole update before any
    micro-batch is differentiated, so accumulation is exact.

    num_tiles: tiles of the vocabulary projection (`ops.cross_entropy`).
    z_loss, balance_loss, router_z_loss: coefficients, 0 to leave the term out. The last two are for mixtures of
        experts, where they are means over the layers (`routing.py`).
    """

    num_tiles: int = 4
    z_loss: float = 0.0
    balance_loss: float = 0.0
    router_z_loss: float = 0.0

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """{"tokens": M}, at least 1 so that an update without a trained token has loss 0; R and N where they count."""
        weights = {"tokens": jnp.maximum(jnp.sum(batch.loss_mask), 1.0)}
        found = routing.denominators(batch)
        return weights | {name: found[name] for name in self._routing_terms}

    def __call__(self, model: Any, batch: Batch, frozen: Any, weights: dict[str, jax.Array]) -> LossOut:
        """The part of the loss that this micro-batch contributes."""
        hidden = model.hidden(batch.tokens, batch.positions, segment_ids=batch.segment_ids)
        x, table = model.head_operands(hidden.x)
        nll, z = ops.cross_entropy(
            x,
            table,
            batch.targets,
            batch.loss_mask,
            num_tiles=self.num_tiles,
            z_loss=self.z_loss,
            soft_cap=model.config.final_soft_cap,
        )
        total = weights["tokens"]
        loss, terms, metrics = (nll + z) / total, {"tokens": nll}, {"loss/nll": nll / total}
        if self.z_loss:
            metrics["loss/z"] = z / total
        for name, coefficient in self._routing_terms.items():
            terms[name] = routing.sums(hidden.aux)[name]
            loss = loss + coefficient * terms[name] / weights[name]
        return LossOut(loss, terms, metrics, statistics=routing.statistics(hidden.aux, batch))

    @property
    def _routing_terms(self) -> dict[str, float]:
        """{term: coefficient} of those that are not left out."""
        return {n: c for n, c in (("rows", self.balance_loss), ("real_tokens", self.router_z_loss)) if c}


make_callable(__name__, NextToken)
