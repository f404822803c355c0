# SPDX-License-Identifier: Apache-2.0
"""What every objective does with the statistics of a model's mixtures of experts (`models.moe.statistics`).

The balance loss and the router z-loss are means over the MoE layers of

    balance: mean over rows of E sum_e f_e P_e          z: mean over tokens of logsumexp(router logits)^2

Rows without a token and padding tokens do not count. A row's balance is complete in its micro-batch, and both
denominators come from the batch alone, so both losses are exact under accumulation.
"""

import jax
import jax.numpy as jnp

from maxkit.errors import UserError
from maxkit.types import Batch

Aux = dict[str, jax.Array]


def denominators(batch: Batch) -> dict[str, jax.Array]:
    """{"rows", "real_tokens"}: rows that hold a token, and tokens that are not padding, at least 1 each."""
    real = batch.segment_ids != 0
    rows, tokens = jnp.any(real, axis=1), real
    return {
        name: jnp.maximum(jnp.sum(which.astype(jnp.float32)), 1.0)
        for name, which in (("rows", rows), ("real_tokens", tokens))
    }


def sums(aux: Aux) -> dict[str, jax.Array]:
    """{"rows": balance, "real_tokens": z}: sums over rows and tokens, means over layers; named as their denominators.

    Raises:
        UserError: the model has no mixture of experts.
    """
    if "moe/balance" not in aux:
        raise UserError(
            "load_balance_loss_weight and router_z_loss_weight are losses of mixtures of experts, and this model has "
            "none: leave them at 0"
        )
    layers = aux["moe/z"].shape[0]
    return {"rows": jnp.sum(aux["moe/balance"]) / layers, "real_tokens": jnp.sum(aux["moe/z"]) / layers}


def statistics(aux: Aux, batch: Batch) -> dict[str, jax.Array]:
    """What `LossOut.statistics` carries: arrays that add over micro-batches; empty for a model without experts.

    `moe/load` [L, E] and `moe/dropped` [L] per MoE layer, `moe/balance` and `moe/z` with the denominators that an
    update's sums are to be divided by (`train/routing.py` does).
    """
    if "moe/load" not in aux:
        return {}
    found = {"moe/load": aux["moe/load"], "moe/dropped": aux["moe/dropped"]}
    total, real = sums(aux), batch.segment_ids != 0
    found |= {"moe/balance": total["rows"], "moe/z": total["real_tokens"]}
    found |= {
        "moe/rows": jnp.sum(jnp.any(real, axis=1).astype(jnp.float32)),
        "moe/tokens": jnp.sum(real.astype(jnp.float32)),
    }
    return jax.lax.stop_gradient(found)
