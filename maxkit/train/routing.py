# SPDX-License-Identifier: Apache-2.0
"""What a training step does with the statistics of mixtures of experts: metrics, and balance without a loss."""

import jax
import jax.numpy as jnp

from maxkit.errors import UserError
from maxkit.models.definition import ModelDefinition
from maxkit.types import Tree


def routing_metrics(statistics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scalars from the sums over an update (`objectives.routing.statistics`); empty without mixtures of experts.

    - `moe/balance`, `moe/z`: the balance and router z terms before their coefficients; balance is 1 at best.
    - `moe/load_max_over_mean`: choices of a layer's busiest expert over the mean, averaged over the layers.
    - `moe/dropped_fraction`: of all choices, those beyond an expert's capacity.
    """
    if "moe/load" not in statistics:
        return {}
    load = statistics["moe/load"].astype(jnp.float32)  # [L, E]
    mean = jnp.maximum(jnp.mean(load, axis=1), 1e-9)
    return {
        "moe/balance": statistics["moe/balance"] / jnp.maximum(statistics["moe/rows"], 1.0),
        "moe/z": statistics["moe/z"] / jnp.maximum(statistics["moe/tokens"], 1.0),
        "moe/load_max_over_mean": jnp.mean(jnp.max(load, axis=1) / mean),
        "moe/dropped_fraction": jnp.sum(statistics["moe/dropped"]) / jnp.maximum(jnp.sum(load), 1.0),
    }


def correction_paths(definition: ModelDefinition) -> list[str]:
    """The parameters that hold the routers' correction biases and are trained; none where adapters are."""
    if definition.lora is not None:
        return []
    return [path for path in definition.parameters if path.endswith("/router/correction")]


def check_update_rate(definition: ModelDefinition, rate: float) -> None:
    """Refuse a rate that nothing would be updated with.

    Raises:
        UserError: the model's routers have no correction bias, or it is frozen under adapters.
    """
    if rate and not correction_paths(definition):
        reason = "its weights are frozen beside LoRA's" if definition.lora else "its routers have no correction bias"
        raise UserError(
            f"routed_bias_update_rate={rate} has nothing to update in this model ({reason}): leave it at 0, or balance "
            "the experts with load_balance_loss_weight"
        )


def move_corrections(definition: ModelDefinition, params: Tree, load: jax.Array, rate: float) -> Tree:
    """Balance without a loss: correction += rate * sign(mean load - load), for every MoE layer.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), after Wang et al. 2024 (arXiv 2408.15664, algorithm 1): an expert
    with more than the mean becomes less attractive, one with less more. Choices depend on the correction, weights do
    not, and it has no gradient; as a vector it is not decayed either, so nothing else moves it.

    load: [L, E], choices per expert over the whole update, one row per MoE layer in the model's order.
    """
    load = load.astype(jnp.float32)
    step = rate * jnp.sign(jnp.mean(load, axis=1, keepdims=True) - load)
    row = {layer: i for i, layer in enumerate(i for i, b in enumerate(definition.config.blocks) if b.mlp == "moe")}
    flat = definition.flat(params)
    for path in correction_paths(definition):
        parameter = definition.parameters[path]
        rows = jnp.asarray([row[layer] for layer in parameter.layers])
        own = step[rows] if parameter.stacked else step[rows[0]]
        flat[path] = (flat[path].astype(jnp.float32) + own).astype(flat[path].dtype)
    return definition.unflat(flat)
