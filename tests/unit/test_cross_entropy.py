# SPDX-License-Identifier: Apache-2.0
"""Tiled cross entropy against autodiff of the untiled computation and against numpy in float64.

The cotangents of the two outputs are 3.7 and -0.6 throughout: a backward pass that assumes 1, or mixes the two, fails.
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
from maxkit.objectives import NextToken
from maxkit.types import Batch

B, T, D, V = 3, 13, 16, 37  # 13 tokens: no number of tiles but 1 and 13 divides them
TILES = (1, 2, 4, 5, 8)
NLL, Z = 3.7, -0.6
Z_LOSS = 0.02
# float32 sums of at most 37 x 39 terms of size 1: about sqrt(1443) * 2 ** -24 = 2e-6 relative, with some room.
FLOAT32 = dict(rtol=2e-5, atol=2e-5)


@functools.cache
def inputs(dtype="float32", seed=0):
    draw = np.random.default_rng(seed)
    hidden = jnp.asarray(draw.normal(size=(B, T, D)), dtype)
    head = jnp.asarray(draw.normal(size=(V, D)) * 0.7, "float32")
    targets = jnp.asarray(draw.integers(0, V, (B, T)), jnp.int32)
    mask = draw.integers(0, 2, (B, T)) * draw.choice([1.0, 0.25], (B, T))
    mask[1, 8:], mask[2] = 0.0, 0.0  # padding at the end of a row; a row of padding
    return hidden, head, targets, jnp.asarray(mask, jnp.float32)


def untiled(hidden, head, targets, mask, z_loss=0.0):
    """The formula with all logits at once, left to autodiff."""
    logits = jnp.einsum("BTD,VD->BTV", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((lse - picked) * mask), z_loss * jnp.sum(lse**2 * mask)


def exact(hidden, head, targets, mask, z_loss):
    """(nll, z, d hidden, d head) in float64, gradients for the cotangents NLL and Z, written out by hand."""
    h, w, y, m = (np.asarray(x.astype(jnp.float32), np.float64) for x in (hidden, head, targets, mask))
    logits = np.einsum("btd,vd->btv", h, w)
    lse = np.log(np.exp(logits).sum(-1))
    p, onehot = np.exp(logits - lse[..., None]), np.eye(V)[y.astype(int)]
    d = NLL * (p - onehot) * m[..., None] + Z * (2 * z_loss * lse * m)[..., None] * p
    nll, z = ((lse - (logits * onehot).sum(-1)) * m).sum(), (z_loss * lse**2 * m).sum()
    return nll, z, np.einsum("btv,vd->btd", d, w), np.einsum("btv,btd->vd", d, h)


def weighted(loss, z_loss, **options):
    def total(hidden, head, targets, mask):
        nll, z = loss(hidden, head, targets, mask, z_loss=z_loss, **options)
        return NLL * nll + Z * z, (nll, z)

    return total


@functools.cache
def tiled_results(dtype, num_tiles, z_loss):
    total = weighted(ops.cross_entropy, z_loss, num_tiles=num_tiles)
    (_, values), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(*inputs(dtype))
    return *values, *gradients


@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
@pytest.mark.parametrize("num_tiles", TILES)
def test_values_and_gradients_are_those_of_the_untiled_loss(num_tiles, z_loss):
    found = tiled_results("float32", num_tiles, z_loss)
    total = weighted(untiled, z_loss)
    (_, values), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*inputs())
    for mine, autodiff, numpy in zip(found, (*values, *gradients), exact(*inputs(), z_loss), strict=True):
        np.testing.assert_allclose(mine, autodiff, **FLOAT32)
        np.testing.assert_allclose(mine, numpy, **FLOAT32)


def test_the_two_outputs_have_their_own_cotangents():
    """Each output alone: the gradient of one must hold nothing of the other, also when only one is used."""
    hidden, head, targets, mask = inputs()
    for index, (mine, theirs) in enumerate(
        (functools.partial(ops.cross_entropy, num_tiles=4, z_loss=Z_LOSS), functools.partial(untiled, z_loss=Z_LOSS))
        for _ in range(2)
    ):
        found, wanted = (
            jax.grad(lambda h, w, f=f, i=index: 5.0 * f(h, w, targets, mask)[i], argnums=(0, 1))(hidden, head)
            for f in (mine, theirs)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **FLOAT32), found, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_tiles_changes_no_bit_of_the_value(dtype):
    results = [tiled_results(dtype, num_tiles, Z_LOSS) for num_tiles in TILES]
    for nll, z, d_hidden, d_head in results[1:]:
        assert nll == results[0][0] and z == results[0][1]
        np.testing.assert_array_equal(d_hidden.astype(jnp.float32), results[0][2].astype(jnp.float32))
        # The head's gradient is a sum over tiles, so its rounding follows the tiles.
        np.testing.assert_allclose(d_head, results[0][3], **FLOAT32)


def test_nor_at_a_size_where_the_sum_is_vectorised():
    """1024 tokens: the compiler would fuse the undoing of the cut with the sum, and add in another order."""
    draw = np.random.default_rng(0)
    hidden, head = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((4, 256, 16), (64, 16)))
    targets, mask = jnp.asarray(draw.integers(0, 64, (4, 256))), jnp.ones((4, 256))
    value = jax.jit(ops.cross_entropy, static_argnames=("num_tiles", "z_loss"))
    results = [value(hidden, head, targets, mask, num_tiles=n, z_loss=Z_LOSS) for n in (1, 2, 5, 8)]
    assert len({tuple(map(float, result)) for result in results}) == 1


@pytest.mark.parametrize("num_tiles", [1, 4, 5])
def test_bfloat16_hidden_keeps_its_type_and_sums_in_float32(num_tiles):
    """Against float64 on the same rounded inputs.

    d_logits and d_hidden are rounded to bfloat16 (2 ** -9 relative to each, 4e-3 with two roundings and the sum over
    V of errors that mostly cancel); the values and the head's gradient are sums that never leave float32.
    """
    hidden, head, targets, mask = inputs("bfloat16")
    head = head.astype(jnp.bfloat16).astype(jnp.float32)  # else the reference would use a head that nobody multiplied
    total = weighted(ops.cross_entropy, Z_LOSS, num_tiles=num_tiles)
    (_, (nll, z)), (d_hidden, d_head) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        hidden, head, targets, mask
    )
    assert (nll.dtype, z.dtype) == (jnp.float32, jnp.float32)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
    want = exact(hidden, head, targets, mask, Z_LOSS)
    np.testing.assert_allclose([nll, z], want[:2], rtol=1e-6)
    for found, wanted in ((d_hidden, want[2]), (d_head, want[3])):
        error = np.abs(np.asarray(found.astype(jnp.float32)) - wanted).max()
        assert error < 6e-3 * np.abs(wanted).max()


def test_a_long_bfloat16_row_does_not_lose_the_small_terms():
    """4096 tokens with the same gradient: adding them up in bfloat16 would stop at 256 of them."""
    rows = 4096
    hidden = jnp.ones((1, rows, 2), jnp.bfloat16)
    head = jnp.zeros((4, 2), jnp.float32)
    zeros, ones = jnp.zeros((1, rows), jnp.int32), jnp.ones((1, rows))
    nll, d_head = jax.value_and_grad(lambda w: ops.cross_entropy(hidden, w, zeros, ones, num_tiles=64)[0])(head)
    np.testing.assert_allclose(nll, rows * np.log(4), rtol=1e-6)
    np.testing.assert_allclose(d_head, rows * np.repeat([[-0.75], [0.25], [0.25], [0.25]], 2, axis=1), rtol=1e-6)


def test_a_bfloat16_head_gets_a_bfloat16_gradient():
    hidden, head, targets, mask = inputs("bfloat16")
    d_head = jax.grad(lambda w: ops.cross_entropy(hidden, w, targets, mask, num_tiles=4)[0])(head.astype(jnp.bfloat16))
    assert d_head.dtype == jnp.bfloat16


@pytest.mark.parametrize("num_tiles", [1, 3])
def test_a_tied_table_adds_both_of_its_gradients(num_tiles):
    """One array read as embedding and as head, as in a tied model."""
    _, table, targets, mask = inputs()
    tokens = jnp.roll(targets, 1, axis=1)

    def loss(table, loss_of):
        hidden = jnp.tanh(table[tokens])
        nll, z = loss_of(hidden, table, targets, mask, z_loss=Z_LOSS)
        return NLL * nll + Z * z

    tiled = functools.partial(ops.cross_entropy, num_tiles=num_tiles)
    np.testing.assert_allclose(jax.grad(loss)(table, tiled), jax.grad(loss)(table, untiled), **FLOAT32)


def test_masked_tokens_count_nothing_and_get_exactly_zero():
    hidden, head, targets, mask = inputs()
    off = mask == 0
    d_hidden = jax.grad(lambda h: ops.cross_entropy(h, head, targets, mask, num_tiles=4, z_loss=Z_LOSS)[0])(hidden)
    assert not np.asarray(d_hidden)[off].any() and np.asarray(d_hidden)[~off].all(axis=-1).all()
    # Neither what stands there nor an id that is no token (a data set may write -100) makes a difference.
    other = ops.cross_entropy(
        jnp.where(off[..., None], 5.0, hidden), head, jnp.where(off, -100, targets), mask, num_tiles=4
    )
    assert other[0] == ops.cross_entropy(hidden, head, targets, mask, num_tiles=4)[0]


@pytest.mark.parametrize("num_tiles", [1, 5])
def test_an_empty_mask_is_zero_and_finite(num_tiles):
    hidden, head, targets, mask = inputs()
    total = weighted(ops.cross_entropy, Z_LOSS, num_tiles=num_tiles)
    (value, _), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head, targets, 0 * mask)
    assert value == 0 and not any(np.asarray(g).any() for g in gradients)


def test_large_logits_do_not_overflow():
    hidden, head, targets, mask = inputs()
    found = jax.value_and_grad(lambda h: sum(ops.cross_entropy(h, head, targets, mask, num_tiles=4, z_loss=1e-4)))(
        1e3 * hidden
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_z_is_exactly_zero_without_its_coefficient():
    assert ops.cross_entropy(*inputs(), num_tiles=4)[1] == 0.0


@pytest.mark.parametrize("num_tiles", [0, -1])
def test_a_number_of_tiles_below_one_is_refused(num_tiles):
    with pytest.raises(ValueError, match=f"num_tiles={num_tiles}"):
        ops.cross_entropy(*inputs(), num_tiles=num_tiles)


def test_more_tiles_than_tokens_are_one_token_each():
    assert ops.cross_entropy(*inputs(), num_tiles=100)[0] == ops.cross_entropy(*inputs(), num_tiles=T)[0]


# ---------------------------------------------------------------- inside a model


SMALL = tiny(vocab_size=V, num_layers=1)


def rows(rows=4, length=T):
    draw = np.random.default_rng(1)
    tokens = jnp.asarray(draw.integers(0, V, (rows, length)), jnp.int32)
    ones = jnp.ones((rows, length), jnp.int32)
    mask = jnp.asarray(draw.integers(0, 2, (rows, length)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return Batch(tokens, jnp.roll(tokens, -1, axis=1), mask, ones, positions)


def model_gradients(definition, num_tiles, batch, z_loss=Z_LOSS, trained=None):
    params = weights(definition) if trained is None else trained
    objective = NextToken(num_tiles=num_tiles, z_loss=z_loss)

    def loss(params):
        return objective(definition.merge(params), batch, None, objective.weights(batch)).loss

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("tie", [True, False])
def test_all_parameters_of_a_model_get_the_untiled_gradient(tie):
    definition = ModelDefinition(tiny(vocab_size=V, num_layers=1, tie_embeddings=tie))
    batch, params = rows(), weights(definition)

    def plain(params):
        model = definition.merge(params)
        logits, _ = model(batch.tokens, batch.positions, segment_ids=batch.segment_ids)
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        return jnp.sum((nll + Z_LOSS * lse**2) * batch.loss_mask) / jnp.sum(batch.loss_mask)

    value, gradients = jax.jit(jax.value_and_grad(plain))(params)
    for num_tiles in (1, 4):
        found, mine = model_gradients(definition, num_tiles, batch)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        # Two float32 programs over a layer: 1e-6 absolute where gradients are of size 0.1.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), mine, gradients)


def test_parameters_that_the_loss_does_not_see_get_exactly_zero():
    """Where no token is trained, nothing of the model has a gradient, through the head or otherwise."""
    definition, batch = ModelDefinition(SMALL), rows()
    empty = Batch(batch.tokens, batch.targets, 0 * batch.loss_mask, batch.segment_ids, batch.positions)
    _, gradients = model_gradients(definition, 4, empty)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))
    # Rows of the untied embedding whose token never occurs: exactly zero, and the head's rows are not.
    _, gradients = model_gradients(definition, 4, batch)
    unseen = np.setdiff1d(np.arange(V), np.asarray(batch.tokens))
    table = np.asarray(gradients["embed"]["table"])
    assert len(unseen) and not table[unseen].any() and np.asarray(gradients["output"]["kernel"]).all(axis=-1).all()


@pytest.mark.parametrize("num_tiles", [1, 4])
def test_a_frozen_head_costs_nothing_and_changes_nothing(num_tiles):
    hidden, head, targets, mask = inputs()

    def loss(h, w):
        nll, z = ops.cross_entropy(h, w, targets, mask, num_tiles=num_tiles, z_loss=Z_LOSS)
        return NLL * nll + Z * z

    both, alone = jax.grad(loss, argnums=(0, 1))(hidden, head)[0], jax.grad(loss)(hidden, head)
    np.testing.assert_array_equal(both, alone)
    stopped = jax.grad(lambda h, w: loss(h, jax.lax.stop_gradient(w)), argnums=(0, 1))(hidden, head)
    np.testing.assert_array_equal(stopped[0], alone)
    assert not np.asarray(stopped[1]).any()
    # [V, D] is the shape of a head's gradient: it must not even be computed.
    program = jax.make_jaxpr(jax.grad(loss))(hidden, head).jaxpr
    products = [eqn for eqn in equations(program) if eqn.primitive.name == "dot_general"]
    assert products and not any(eqn.outvars[0].aval.shape in ((V, D), (D, V)) for eqn in products)


def test_lora_adapters_get_their_gradient_through_the_frozen_head():
    definition = ModelDefinition(SMALL, lora=LoraConfig(rank=2))
    batch, params = rows(), weights(definition)
    trained, base = definition.split_trainable(params)
    whole = model_gradients(definition, 1, batch, trained=definition.join(trained, base))[1]
    objective = NextToken(num_tiles=4, z_loss=Z_LOSS)

    def loss(trained):
        model = definition.merge(definition.join(trained, base))
        return objective(model, batch, None, objective.weights(batch)).loss

    only = jax.jit(jax.grad(loss))(trained)
    wanted, _ = definition.split_trainable(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), only, wanted)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(only))


# ---------------------------------------------------------------- what is never materialised


@pytest.mark.parametrize("frozen_head", [False, True])
def test_no_array_holds_the_logits_of_all_tokens(frozen_head):
    # Sizes such that only logits can be as large: V * B * T = 37 * 4 * 24; the largest weight has 37 * 16.
    definition = ModelDefinition(SMALL, lora=LoraConfig(rank=2) if frozen_head else None)
    batch = rows(4, 24)
    trained, base = definition.split_trainable(definition.shapes)

    def step(trained, base, num_tiles):
        objective = NextToken(num_tiles=num_tiles, z_loss=Z_LOSS)

        def loss(trained):
            model = definition.merge(definition.join(trained, base))
            return objective(model, batch, None, objective.weights(batch)).loss

        return jax.value_and_grad(loss)(trained)

    for num_tiles in (2, 3, 7):
        assert not all_logits(shapes(functools.partial(step, num_tiles=num_tiles), trained, base), 4, 24, V)
    # The search itself finds them where they are.
    assert all_logits(shapes(functools.partial(step, num_tiles=1), trained, base), 4, 24, V)


def test_it_runs_inside_jit_scan_and_remat():
    """As in gradient accumulation: a scan over micro-batches whose body takes the gradient."""
    hidden, head, targets, mask = inputs()
    total = weighted(ops.cross_entropy, Z_LOSS, num_tiles=4)

    def value(h, w, y, m):
        return total(h[None], w, y[None], m[None])[0]

    @jax.jit
    def accumulated(hidden, head):
        def add(so_far, row):
            h, y, m = row
            d_hidden, d_head = jax.grad(jax.checkpoint(value), argnums=(0, 1))(h, head, y, m)
            return so_far + d_head, d_hidden

        return jax.lax.scan(add, jnp.zeros_like(head), (hidden, targets, mask))

    d_head, d_hidden = accumulated(hidden, head)
    _, _, want_hidden, want_head = exact(hidden, head, targets, mask, Z_LOSS)
    np.testing.assert_allclose(d_head, want_head, **FLOAT32)
    np.testing.assert_allclose(d_hidden, want_hidden, **FLOAT32)


def test_vmap_over_rows_is_the_sum_of_rows():
    hidden, head, targets, mask = inputs()
    one = lambda h, y, m: ops.cross_entropy(h[None], head, y[None], m[None], num_tiles=4)[0]  # noqa: E731
    np.testing.assert_allclose(
        jax.vmap(one)(hidden, targets, mask).sum(), ops.cross_entropy(hidden, head, targets, mask)[0], rtol=1e-6
    )


def test_the_mask_may_be_integers_or_booleans():
    hidden, head, targets, mask = inputs()
    values = {float(ops.cross_entropy(hidden, head, targets, (mask > 0).astype(t))[0]) for t in (bool, int, "float32")}
    assert len(values) == 1
