# SPDX-License-Identifier: Apache-2.0
"""The gated delta mixer beside transformers' own layer, with the same random weights."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxkit.models.config import BlockSpec, GatedDeltaConfig, ModelConfig
from maxkit.models.gated_delta import GatedDelta
from maxkit.models.layers import Make

torch = pytest.importorskip("torch")
# Of the largest output. Both are float32, with sums in different orders: 2.5e-6 measured.
TOLERANCE = 1e-5
SIZES = {
    "heads alike": GatedDeltaConfig(num_key_heads=3, num_value_heads=3, key_head_dim=8, value_head_dim=8),
    "shared keys": GatedDeltaConfig(num_key_heads=2, num_value_heads=6, key_head_dim=6, value_head_dim=10),
    "short filter": GatedDeltaConfig(
        num_key_heads=2, num_value_heads=4, key_head_dim=16, value_head_dim=4, conv_width=2
    ),
}


def pair(sizes):
    """transformers' layer with random weights, and maxkit's with the same."""
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    common = {"vocab_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    theirs = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            **common,
            hidden_size=24,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
            linear_num_key_heads=sizes.num_key_heads,
            linear_num_value_heads=sizes.num_value_heads,
            linear_key_head_dim=sizes.key_head_dim,
            linear_value_head_dim=sizes.value_head_dim,
            linear_conv_kernel_dim=sizes.conv_width,
        ),
        layer_idx=0,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if "norm" in name else 0.4 * drawn)
    config = ModelConfig(
        vocab_size=32,
        num_layers=1,
        embed_dim=24,
        mlp_dim=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=512,
        norm_eps=1e-6,
        gated_delta=sizes,
    )
    ours = GatedDelta(config, BlockSpec(mixer="gated_delta"), Make(jax.random.key(0), jnp.float32))
    graphdef, state = nnx.split(ours)
    weights = {name: value.detach().numpy() for name, value in theirs.named_parameters()}
    state = {
        path: v.replace(jnp.asarray(renamed(weights, sizes)["/".join(path)])) for path, v in nnx.to_flat_state(state)
    }
    return theirs, graphdef, nnx.State.from_flat_path(state)


def renamed(weights, sizes):
    """Their tensors under maxkit's paths."""
    keys, values, groups = sizes.num_key_heads, sizes.num_value_heads, sizes.num_value_heads // sizes.num_key_heads
    wide, tall = sizes.key_head_dim, groups * sizes.value_head_dim
    heads = weights["in_proj_qkvz.weight"].reshape(keys, 2 * wide + 2 * tall, -1)  # per key head: q, k, its values, z
    small = weights["in_proj_ba.weight"].reshape(keys, 2 * groups, -1)
    filters = weights["conv1d.weight"][:, 0]
    cut = keys * wide
    return {
        "query/kernel": heads[:, :wide].transpose(2, 0, 1),
        "key/kernel": heads[:, wide : 2 * wide].transpose(2, 0, 1),
        "value/kernel": heads[:, 2 * wide : 2 * wide + tall].reshape(values, -1, heads.shape[-1]).transpose(2, 0, 1),
        "gate/kernel": heads[:, 2 * wide + tall :].reshape(values, -1, heads.shape[-1]).transpose(2, 0, 1),
        "beta/kernel": small[:, :groups].reshape(values, -1).T,
        "decay/kernel": small[:, groups:].reshape(values, -1).T,
        "query_conv/kernel": filters[:cut].reshape(keys, wide, -1),
        "key_conv/kernel": filters[cut : 2 * cut].reshape(keys, wide, -1),
        "value_conv/kernel": filters[2 * cut :].reshape(values, -1, filters.shape[-1]),
        "dt_bias": weights["dt_bias"],
        "log_decay": weights["A_log"],
        "norm/scale": weights["norm.weight"],
        "out/kernel": weights["out_proj.weight"].T.reshape(values, -1, heads.shape[-1]),
    }


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, state, x):
    return nnx.merge(graphdef, state)(x, types.SimpleNamespace(segments=None, layer=None), None)[0]


@pytest.mark.parametrize("name", SIZES)
def test_outputs_equal_transformers(name):
    theirs, graphdef, state = pair(SIZES[name])
    for length in (1, 5, 64, 150):
        x = np.random.default_rng(length).normal(size=(2, length, 24)).astype(np.float32)
        with torch.no_grad():
            wanted = theirs(torch.from_numpy(x)).numpy()
        error = np.abs(np.asarray(forward(graphdef, state, x)) - wanted).max() / np.abs(wanted).max()
        print(name, length, error)
        assert error <= TOLERANCE


def test_gradients_equal_torch():
    theirs, graphdef, state = pair(SIZES["shared keys"])
    x = np.random.default_rng(0).normal(size=(2, 70, 24)).astype(np.float32)
    theirs(torch.from_numpy(x)).square().sum().backward()
    wanted = renamed({name: p.grad.numpy() for name, p in theirs.named_parameters()}, SIZES["shared keys"])
    found = jax.grad(lambda state: jnp.sum(jnp.square(forward(graphdef, state, x))))(state)
    for path, variable in nnx.to_flat_state(found):
        gradient = wanted["/".join(path)]
        error = np.abs(np.asarray(variable[...]) - gradient).max() / np.abs(gradient).max()
        print("/".join(path), error)
        assert error <= 1e-4, path
