# SPDX-License-Identifier: Apache-2.0
"""Tiled log-probs and entropies against autodiff of the untiled computation and against numpy in float64.

Every token has a cotangent of its own: a backward pass that assumes one for all, or scales sums, fails.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import all_logits, equations, shapes
from tiny_models import tiny, weights

from maxkit import ops
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig

B, T, D, V = 3, 13, 16, 37  # 13 tokens: no number of tiles but 1 and 13 divides them
# float32 sums of 16 or 37 terms of size 1, then sums over 39 tokens.
FLOAT32 = dict(rtol=2e-5, atol=2e-5)
TEMPERATURE, CAP = 0.7, 4.0


@functools.cache
def inputs(dtype="float32"):
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.normal(size=(B, T, D)), dtype)
    head = jnp.asarray(draw.normal(size=(V, D)) * 0.7, dtype).astype("float32")
    targets = draw.integers(0, V, (B, T))
    mask = draw.integers(0, 2, (B, T)) * draw.choice([1.0, 0.25], (B, T))
    mask[1, 8:], mask[2] = 0.0, 0.0  # padding at the end of a row; a row of padding
    targets[1, 8:] = -100  # no id, as a data set may write under a mask
    cotangents = draw.normal(size=(B, T))
    return hidden, head, jnp.asarray(targets, jnp.int32), jnp.asarray(mask), jnp.asarray(cotangents, jnp.float32)


def exact(hidden, head, targets, mask, cotangents):
    """(logps, entropy, d hidden, d head) in float64, the gradients written out by hand."""
    h, w, m, g = (np.asarray(x.astype(jnp.float32), np.float64) for x in (hidden, head, mask, cotangents))
    raw = np.einsum("btd,vd->btv", h, w)
    z = CAP * np.tanh(raw / CAP) / TEMPERATURE
    logp = z - np.log(np.exp(z).sum(-1))[..., None]
    onehot = (np.asarray(targets)[..., None] == np.arange(V)) & (m != 0)[..., None]
    logps, entropy = (logp * onehot).sum(-1), -(np.exp(logp) * logp).sum(-1) * (m != 0)
    d = (g * (m != 0))[..., None] * (onehot - np.exp(logp)) / TEMPERATURE * (1 - np.tanh(raw / CAP) ** 2)
    return logps, entropy, np.einsum("btv,vd->btd", d, w), np.einsum("btv,btd->vd", d, h)


def run(dtype, num_tiles):
    def total(hidden, head, targets, mask, cotangents, temperature):
        logps, entropy = ops.token_logps(
            hidden, head, targets, mask, num_tiles=num_tiles, temperature=temperature, soft_cap=CAP
        )
        return jnp.sum(cotangents * logps) + jnp.sum(entropy), (logps, entropy)

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, values), gradients = step(*inputs(dtype), TEMPERATURE)  # the temperature is traced, as when scoring
    return *values, *gradients


@pytest.mark.parametrize("num_tiles", [1, 4, 100])
def test_values_and_gradients_are_those_of_the_formula(num_tiles):
    """The gradient of the entropy, whose cotangent is 1 here, is not in it."""
    for mine, wanted in zip(run("float32", num_tiles), exact(*inputs()), strict=True):
        np.testing.assert_allclose(mine, wanted, **FLOAT32)


def test_masked_tokens_are_exactly_zero_and_get_exactly_zero():
    logps, entropy, d_hidden, _ = run("float32", 4)
    off = np.asarray(inputs()[3]) == 0
    for found in (logps, entropy, d_hidden):
        assert not np.asarray(found)[off].any() and np.asarray(found)[~off].all()


@pytest.mark.parametrize("num_tiles", [1, 5])
def test_bfloat16_hidden_keeps_its_type_and_sums_in_float32(num_tiles):
    """As for cross entropy: only d_logits and d_hidden are rounded to bfloat16."""
    logps, entropy, d_hidden, d_head = run("bfloat16", num_tiles)
    assert [x.dtype for x in (logps, entropy, d_hidden, d_head)] == ["float32", "float32", "bfloat16", "float32"]
    want = exact(*inputs("bfloat16"))
    np.testing.assert_allclose(logps, want[0], **FLOAT32)
    np.testing.assert_allclose(entropy, want[1], **FLOAT32)
    for found, wanted in ((d_hidden, want[2]), (d_head, want[3])):
        assert np.abs(np.asarray(found.astype(jnp.float32)) - wanted).max() < 6e-3 * np.abs(wanted).max()


def test_minus_their_masked_sum_is_the_cross_entropy():
    hidden, head, targets, mask, _ = inputs()
    nll, _ = ops.cross_entropy(hidden, head, targets, mask, num_tiles=4)
    logps, _ = ops.token_logps(hidden, head, targets, mask, num_tiles=3)
    np.testing.assert_allclose(-jnp.sum(mask * logps), nll, rtol=1e-6)


def test_large_logits_do_not_overflow():
    hidden, head, targets, mask, _ = inputs()
    total = lambda h: sum(x.sum() for x in ops.token_logps(h, head, targets, mask, num_tiles=4))  # noqa: E731
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.value_and_grad(total)(1e3 * hidden)))


def test_a_number_of_tiles_below_one_is_refused():
    with pytest.raises(ValueError, match="num_tiles=0"):
        ops.token_logps(*inputs()[:4], num_tiles=0)


# ---------------------------------------------------------------- inside a model


def of_model(definition, num_tiles, tokens):
    """(trained, base) -> a sum of token log-probs with different weights."""
    scale = jnp.linspace(-1.0, 1.0, tokens.size).reshape(tokens.shape)

    def total(trained, base):
        model = definition.merge(definition.join(trained, base))
        x, table = model.head_operands(model.hidden(tokens).x)
        return jnp.sum(scale * ops.token_logps(x, table, tokens, tokens >= 0, num_tiles=num_tiles)[0])

    return total


@pytest.mark.parametrize("tie", [True, False])
def test_all_parameters_of_a_model_get_the_untiled_gradient(tie):
    definition = ModelDefinition(tiny(vocab_size=V, num_layers=1, tie_embeddings=tie))
    tokens, params = inputs()[2] % V, weights(definition)
    scale = jnp.linspace(-1.0, 1.0, tokens.size).reshape(tokens.shape)

    def plain(params):
        logits, _ = definition.merge(params)(tokens)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        return jnp.sum(scale * picked)

    value, wanted = jax.jit(jax.value_and_grad(plain))(params)
    mine, found = jax.jit(jax.value_and_grad(of_model(definition, 4, tokens)))(params, {})
    np.testing.assert_allclose(mine, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, wanted)


@pytest.mark.parametrize("frozen_head", [False, True])
def test_no_array_holds_the_logits_of_all_tokens(frozen_head):
    """Forward and backward; nor is the gradient of a frozen head computed."""
    definition = ModelDefinition(tiny(vocab_size=V, num_layers=1), lora=LoraConfig(rank=2) if frozen_head else None)
    trained, base = definition.split_trainable(definition.shapes)
    tokens = jnp.zeros((4, 24), jnp.int32)

    def found(num_tiles):
        return shapes(jax.value_and_grad(of_model(definition, num_tiles, tokens)), trained, base)

    assert not all_logits(found(3), 4, 24, V)
    if frozen_head:
        program = jax.make_jaxpr(jax.grad(of_model(definition, 3, tokens)))(trained, base).jaxpr
        products = {eqn.outvars[0].aval.shape for eqn in equations(program) if eqn.primitive.name == "dot_general"}
        assert (4, 8, V) in products and (V, D) not in products
    assert all_logits(found(1), 4, 24, V)  # the search itself finds them where they are
