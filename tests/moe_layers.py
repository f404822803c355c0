# SPDX-License-Identifier: Apache-2.0
"""Small mixture-of-experts layers with random values, and something to put in."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_models import TINY

from maxkit.models.config import Execution, ModelConfig
from maxkit.models.layers import Make
from maxkit.models.moe import Moe

ROWS, LENGTH, DIM = 3, 7, TINY.embed_dim


def config(**changes) -> ModelConfig:
    """A small model with these fields of MoeConfig; `model` holds those of ModelConfig."""
    model = changes.pop("model", {})
    moe = {"num_experts": 8, "experts_per_token": 3, "mlp_dim": 12} | changes
    return ModelConfig.model_validate(TINY.model_dump() | {"pattern": [{"mlp": "moe"}], "moe": moe} | model)


def layer(config, execution=None, seed=0) -> Moe:
    """The layer with random values everywhere, biases too."""
    made = Moe(config, execution or Execution(), Make(jax.random.key(seed), jnp.float32))
    draw = np.random.default_rng(seed)
    state = nnx.to_pure_dict(nnx.state(made))
    state = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape) * 0.4, jnp.float32), state)
    nnx.update(made, state)
    return made


def inputs(seed=1, rows=ROWS, length=LENGTH):
    draw = np.random.default_rng(seed)
    x = jnp.asarray(draw.normal(size=(rows, length, DIM)), jnp.float32)
    real = np.arange(length) < draw.integers(1, length + 1, size=(rows, 1))
    return x, jnp.asarray(real)


def context(real=None):
    return types.SimpleNamespace(real=real)
