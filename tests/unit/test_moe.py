# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer: routing against numpy in float64, the three dispatches against each other."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import TINY

from maxkit.models.config import Execution, ModelConfig
from maxkit.models.layers import Make
from maxkit.models.moe import Moe, Router
from maxkit.ops import moe as ops

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


VARIANTS = {
    "plain": {},
    "normalized": {"normalize_weights": True, "weights_scale": 2.5},
    "shared": {"shared_mlp_dim": 20, "shared_gate": True},
    "v2": {"num_groups": 4, "groups_per_token": 2, "weights_scale": 16.0, "shared_mlp_dim": 24},
    "v3": {
        "scoring": "sigmoid",
        "normalize_weights": True,
        "num_groups": 4,
        "groups_per_token": 2,
        "group_score": "top2_sum",
        "correction_bias": True,
        "weights_scale": 2.5,
        "shared_mlp_dim": 12,
    },
    "gpt_oss": {
        "scoring": "topk_softmax",
        "router_bias": True,
        "expert_bias": True,
        "model": {"activation": "clamped_swiglu", "activation_limit": 0.7},
    },
    "llama4": {"scoring": "topk_sigmoid", "scale_inputs": True, "experts_per_token": 1, "shared_mlp_dim": 12},
    "llama4 with biases": {"scoring": "topk_sigmoid", "scale_inputs": True, "expert_bias": True},
    "no gate": {"expert_bias": True, "model": {"mlp_gated": False, "activation": "relu2"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_dispatches_agree_in_values_and_gradients(variant):
    cfg = config(**VARIANTS[variant])
    x, real = inputs()
    cotangent = jnp.asarray(np.random.default_rng(5).normal(size=x.shape), jnp.float32)

    def run(dispatch):
        made = layer(cfg, Execution(moe_dispatch=dispatch, moe_capacity_factor=100.0))
        graphdef, state = nnx.split(made)

        def loss(x, state):
            y, aux = nnx.merge(graphdef, state)(x, context(real))
            return jnp.sum(y * cotangent), (y, aux)

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, state)
        return out, gradients

    dense = run("dense")
    for dispatch in ("ragged", "capacity"):
        for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(run(dispatch)), strict=True):
            assert float(jnp.abs(a - b).max()) <= 2e-5 * float(jnp.abs(a).max()), dispatch
    assert float(jnp.abs(dense[0][0]).max()) > 0.1
