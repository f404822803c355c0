# SPDX-License-Identifier: Apache-2.0
"""The training step: the only `jax.jit` of training, for every objective.

    weights of the whole update  ->  micro-batches: gradients only add  ->  optimizer  ->  new state and metrics

The state is donated. Next to read: `loop.py`.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from maxkit.models.definition import Dropout, ModelDefinition
from maxkit.train.routing import check_update_rate, move_corrections, routing_metrics
from maxkit.types import Batch, LossOut, TrainState, Tree

Metrics = dict[str, jax.Array]


class Objective(Protocol):
    """What `objectives` promises."""

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """{term: denominator over the whole update}."""

    def __call__(self, model: Any, batch: Batch, frozen: Any, weights: dict[str, jax.Array]) -> LossOut:
        """The micro-batch's part of the loss."""


def train_step(
    definition: ModelDefinition,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    gradient_accumulation_steps: int = 1,
    routed_bias_update_rate: float = 0.0,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """A function (state, batch, frozen) -> (state, metrics), not yet compiled; `compile_train_step` compiles it.

    The batch holds the rows of the whole update; micro-batch m takes rows m, m + A, m + 2A, ... (strided, so that rows
    sharded over devices stay where they are). `frozen` reaches the objective undifferentiated.

    routed_bias_update_rate: how far routers' correction biases move after the optimizer (`move_corrections`).

    Raises:
        UserError: such a rate for a model that trains no correction bias.
    """
    check_update_rate(definition, routed_bias_update_rate)

    def loss_of(
        trained: Tree, base: Tree, batch: Batch, frozen: Any, weights: dict, dropout: Dropout | None
    ) -> tuple[jax.Array, LossOut]:
        out = objective(definition.merge(definition.join(trained, base), dropout), batch, frozen, weights)
        return out.loss, out

    gradients_of = jax.value_and_grad(loss_of, has_aux=True)

    def step(state: TrainState, batch: Batch, frozen: Any = None) -> tuple[TrainState, Metrics]:
        weights = objective.weights(batch)

        def gradients_with(micro: Batch, number: jax.Array | int) -> tuple[tuple[jax.Array, LossOut], Tree]:
            dropout = None
            if definition.drops:
                rows = number + gradient_accumulation_steps * jnp.arange(micro.tokens.shape[0])
                dropout = Dropout(jax.random.fold_in(state.rng, state.step), rows)
            return gradients_of(state.params, state.base, micro, frozen, weights, dropout)

        if gradient_accumulation_steps == 1:
            (_, out), gradients = gradients_with(batch, 0)
        else:
            gradients, out = _accumulate(
                gradients_with, _micro_batches(batch, gradient_accumulation_steps), state.params
            )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if routed_bias_update_rate:
            params = move_corrections(definition, params, out.statistics["moe/load"], routed_bias_update_rate)
        metrics = {"loss": out.loss, "grad_norm": optax.global_norm(gradients), **out.metrics, **out.maxima}
        metrics |= routing_metrics(out.statistics)
        metrics |= {f"weight/{name}": weight for name, weight in weights.items()}
        return TrainState(state.step + 1, params, state.base, opt_state, state.rng), metrics

    return step


def compile_train_step(
    definition: ModelDefinition,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    gradient_accumulation_steps: int = 1,
    routed_bias_update_rate: float = 0.0,
) -> jax.stages.Wrapped:
    """`train_step` under `jax.jit`, the state donated."""
    step = train_step(definition, objective, optimizer, gradient_accumulation_steps, routed_bias_update_rate)
    return jax.jit(step, donate_argnames=("state",))


def eval_step(
    definition: ModelDefinition, objective: Objective
) -> Callable[[Tree, Batch, Any, dict[str, jax.Array]], Metrics]:
    """A compiled (params, batch, frozen, weights) -> metrics of one batch, without gradients.

    `weights` are those of all batches of the evaluation together (`total_weights`), so the caller only adds.
    """

    def step(params: Tree, batch: Batch, frozen: Any, weights: dict[str, jax.Array]) -> Metrics:
        out = objective(definition.merge(params), batch, frozen, weights)
        return {"loss": out.loss, **out.metrics}

    return jax.jit(step)


def total_weights(objective: Objective, batches: Iterable[Batch]) -> dict[str, jax.Array]:
    """The objective's denominators over several batches, each of which holds something to count; needs no model."""
    weights = jax.jit(objective.weights)
    total: dict[str, jax.Array] = {}
    for batch in batches:
        total = {name: value + total.get(name, 0.0) for name, value in weights(batch).items()}
    return total


def _micro_batches(batch: Batch, count: int) -> Batch:
    """Leaves [B, ...] as [A, B/A, ...]: the new axis is strided, because a sharded B cannot be cut in blocks."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _accumulate(gradients_of, micro_batches: Batch, params: Tree) -> tuple[Tree, LossOut]:
    """The sum over micro-batches of gradients (in float32) and of all but the maxima of LossOut."""

    def add(total: tuple[Tree, LossOut], numbered: tuple[Batch, jax.Array]) -> tuple[tuple[Tree, LossOut], None]:
        (_, out), gradients = gradients_of(*numbered)
        so_far, loss_out = total
        so_far = jax.tree.map(lambda a, g: a + g.astype(jnp.float32), so_far, gradients)
        return (so_far, _merge(loss_out, out)), None

    first = jax.tree.map(lambda x: x[0], micro_batches)
    shape = jax.eval_shape(lambda m: gradients_of(m, 0)[0][1], first)
    nothing = LossOut(
        loss=jnp.zeros((), jnp.float32),
        terms=jax.tree.map(lambda s: jnp.zeros((), s.dtype), shape.terms),
        metrics=jax.tree.map(lambda s: jnp.zeros((), s.dtype), shape.metrics),
        maxima=jax.tree.map(lambda s: jnp.full((), -jnp.inf, s.dtype), shape.maxima),
        statistics=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape.statistics),
    )
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    numbers = jnp.arange(jax.tree.leaves(micro_batches)[0].shape[0])
    (gradients, out), _ = jax.lax.scan(add, (zeros, nothing), (micro_batches, numbers))
    return jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params), out


def _merge(a: LossOut, b: LossOut) -> LossOut:
    add = lambda x, y: x + y  # noqa: E731
    return LossOut(
        loss=a.loss + b.loss,
        terms=jax.tree.map(add, a.terms, b.terms),
        metrics=jax.tree.map(add, a.metrics, b.metrics),
        maxima=jax.tree.map(jnp.maximum, a.maxima, b.maxima),
        statistics=jax.tree.map(add, a.statistics, b.statistics),
    )
