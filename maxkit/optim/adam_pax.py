# SPDX-License-Identifier: Apache-2.0
"""Adam as Paxml writes it: the moments are stored bias-corrected.

With t = 1, 2, ... the number of the update and g its gradient,

    b_t = b * (1 - b^(t-1)) / (1 - b^t)                   the decay that keeps a mean unbiased; b_1 = 0
    m_t = b1_t * m_(t-1) + (1 - b1_t) * g                 = Adam's m / (1 - b1^t)
    v_t = b2_t * v_(t-1) + (1 - b2_t) * g^2               = Adam's v / (1 - b2^t)
    w  <- w - learning_rate * (m_t / (sqrt(v_t) + eps) + weight_decay * w)

so that in exact arithmetic the update is that of AdamW (Kingma and Ba 2014, arXiv 1412.6980; Loshchilov and
Hutter 2017, arXiv 1711.05101), but a saved state is not: its moments need no correction.
Checked against NumPy in float64 and against `optax.adamw`, see tests/unit/test_optim.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from maxkit.types import Tree


class AdamPaxState(NamedTuple):
    """Flat, as in Paxml and MaxText: updates done, bias-corrected means of gradients and of their squares."""

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of that name, nobody calls it
    mu: Tree
    nu: Tree


def adam_pax(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Tree | None = None,
) -> optax.GradientTransformation:
    """The update of this module's head.

    mask: a tree of booleans parallel to the parameters, True where weight decay applies; None is everywhere.
    """
    rate: Callable = learning_rate if callable(learning_rate) else lambda count: learning_rate

    def init(params: Tree) -> AdamPaxState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return AdamPaxState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(gradients: Tree, state: AdamPaxState, params: Tree | None = None) -> tuple[Tree, AdamPaxState]:
        if params is None:
            raise ValueError("adam_pax needs the parameters: weight decay is part of it")
        count = optax.safe_increment(state.count)
        decay1, decay2 = _unbiased_decay(b1, count), _unbiased_decay(b2, count)
        mu = jax.tree.map(lambda m, g: decay1 * m + (1 - decay1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: decay2 * v + (1 - decay2) * g * g, state.nu, gradients)
        decayed = jax.tree.map(lambda p: True, params) if mask is None else mask
        step_size = -rate(state.count)
        updates = jax.tree.map(
            lambda m, v, p, d: step_size * (m / (jnp.sqrt(v) + eps) + (weight_decay * p if d else 0.0)),
            mu, nu, params, decayed,
        )  # fmt: skip
        return updates, AdamPaxState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _unbiased_decay(decay: float, count: jax.Array) -> jax.Array:
    """b_t of the head for update number `count`."""
    t = count.astype(jnp.float32)
    return decay * (1 - decay ** (t - 1)) / (1 - decay**t)
