# SPDX-License-Identifier: Apache-2.0
"""The training step: accumulation that is exact, what is trained and what is not, donation, one compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import TINY, random_batch, weights

from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig
from maxkit.objectives import NextToken
from maxkit.train.step import compile_train_step, eval_step, total_weights, train_step
from maxkit.types import TrainState

OBJECTIVE = NextToken(num_tiles=2, z_loss=1e-3)
# Plain SGD with rate 1: the update is the gradient, so nothing hides its error (Adam divides it by itself).
SGD = optax.sgd(1.0)


def fresh_state(definition, optimizer=SGD):
    trained, base = definition.split_trainable(weights(definition))
    return TrainState(jnp.int32(0), trained, base, optimizer.init(trained), jax.random.key(0))


def one_update(accumulation=1, *, execution=None, objective=OBJECTIVE, lora=None, batch=None):
    definition = ModelDefinition(TINY, execution or Execution(), lora)
    step = jax.jit(train_step(definition, objective, SGD, accumulation))
    state, metrics = step(fresh_state(definition), batch or random_batch(TINY), None)
    before = fresh_state(definition).params
    return jax.tree.map(lambda a, b: b - a, state.params, before), metrics, state


cached_update = functools.cache(one_update)


def relative(a, b):
    """The norm of the difference over the norm."""
    return float(optax.global_norm(jax.tree.map(jnp.subtract, a, b)) / optax.global_norm(b))


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_is_one_big_batch(accumulation):
    """4 x 1, 2 x 2 and 1 x 4 rows, of which one trains a token in ten and one all of them.

    The same products are added in another order: 3e-7 measured, 1e-5 allowed.
    """
    whole, metrics, _ = cached_update()
    parts, accumulated, _ = cached_update(accumulation)
    assert relative(parts, whole) < 1e-5
    assert metrics.keys() == accumulated.keys()
    for name in metrics:
        assert float(accumulated[name]) == pytest.approx(float(metrics[name]), rel=1e-5)


def test_the_mean_of_means_would_be_another_update():
    """What the test above is about: averaging the four rows' own means is far off on the same batch."""
    batch, whole = random_batch(TINY), cached_update()[0]
    counts = np.asarray(batch.loss_mask.sum(axis=1))
    assert counts.min() >= 1 and counts.max() > 4 * counts.min()
    rows = [jax.tree.map(lambda x, r=row: x[r : r + 1], batch) for row in range(4)]
    updates = [one_update(batch=row)[0] for row in rows]
    mean_of_means = jax.tree.map(lambda *leaves: sum(leaves) / 4, *updates)
    exact = jax.tree.map(
        lambda *leaves: sum(n * x for n, x in zip(counts, leaves, strict=True)) / counts.sum(), *updates
    )
    assert relative(exact, whole) < 1e-5
    assert relative(mean_of_means, whole) > 0.1


def test_a_micro_batch_without_a_trained_token_adds_nothing():
    batch = random_batch(TINY)
    empty = dataclasses.replace(batch, loss_mask=batch.loss_mask.at[1].set(0.0))
    whole, parts = one_update(batch=empty)[0], one_update(4, batch=empty)[0]
    assert relative(parts, whole) < 1e-5


def test_an_update_without_a_trained_token_changes_nothing():
    batch = random_batch(TINY)
    empty = dataclasses.replace(batch, loss_mask=0 * batch.loss_mask)
    update, metrics, _ = one_update(2, batch=empty)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(update))
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0


def test_columns_of_an_objective_go_with_their_rows():
    """Micro-batches take rows m, m + A, ...: the extra columns must be cut the same way."""

    @dataclasses.dataclass(frozen=True)
    class Weighted(NextToken):
        def __call__(self, model, batch, frozen, weights):
            mask = batch.loss_mask * batch.columns["advantages"][:, None]
            return super().__call__(model, dataclasses.replace(batch, loss_mask=mask), frozen, weights)

    batch = dataclasses.replace(random_batch(TINY), columns={"advantages": jnp.asarray([3.0, -1.0, 0.5, 2.0])})
    whole = one_update(objective=Weighted(), batch=batch)[0]
    assert relative(one_update(2, objective=Weighted(), batch=batch)[0], whole) < 1e-5


def test_bfloat16_accumulates_in_float32():
    """bfloat16 activations, float32 weights: accumulated gradients differ by single roundings of bfloat16 products."""
    low = Execution(dtype="bfloat16")
    whole, parts = one_update(execution=low)[0], one_update(4, execution=low)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(parts)} == {jnp.dtype("float32")}
    assert relative(parts, whole) < 2e-2  # 2 ** -8 per product, a few of them in a row
    assert relative(whole, cached_update()[0]) < 5e-2


# ---------------------------------------------------------------- what does not change the update


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("policy", ["full", "dots"])
def test_rematerialisation_changes_nothing(policy, scan):
    found, metrics, _ = one_update(execution=Execution(remat_policy=policy, scan_layers=scan))
    if not scan:
        stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
        layers = [found["layers"][f"layer_{i}"] for i in range(TINY.num_layers)]
        found = {**found, "layers": {"block_0": jax.tree.map(stack, *layers)}}
    assert relative(found, cached_update()[0]) < 1e-6
    assert float(metrics["loss"]) == pytest.approx(float(cached_update()[1]["loss"]), rel=1e-6)


def test_rematerialisation_really_saves():
    """`full` keeps one [B, T, D] per layer; without it the attention weights and the MLP's inside are kept."""

    def residuals(policy):
        definition = ModelDefinition(TINY, Execution(remat_policy=policy))
        batch = random_batch(TINY)

        def loss(params):
            return OBJECTIVE(definition.merge(params), batch, None, OBJECTIVE.weights(batch)).loss

        _, pull = jax.eval_shape(lambda p: jax.vjp(loss, p), definition.shapes)
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(pull))

    assert residuals("full") < residuals("dots") < residuals("none")


# ---------------------------------------------------------------- LoRA


@pytest.mark.parametrize("accumulation", [1, 2])
def test_lora_trains_the_adapters_and_no_bit_of_the_base(accumulation):
    lora = LoraConfig(rank=2)
    definition = ModelDefinition(TINY, lora=lora)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    before = fresh_state(definition, optimizer)
    step = jax.jit(train_step(definition, OBJECTIVE, optimizer, accumulation))
    state = before
    for seed in range(2):
        state, _ = step(state, random_batch(TINY, seed=seed), None)
    for old, new in zip(jax.tree.leaves(before.base), jax.tree.leaves(state.base), strict=True):
        np.testing.assert_array_equal(old, new)
    names = definition.flat(state.params)
    assert names and all(name.endswith(("lora_a", "lora_b")) for name in names)
    assert len(names) == 2 * 7  # every projection of a block, stacked
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True):
        assert (np.asarray(old) != np.asarray(new)).any()
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(moments) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(state.params)])


def test_lora_gradients_are_those_of_the_full_model():
    lora = LoraConfig(rank=2, targets=("query", "down"))
    update = one_update(lora=lora)[0]
    definition = ModelDefinition(TINY, lora=lora)
    batch, params = random_batch(TINY), weights(definition)

    def loss(params):
        return OBJECTIVE(definition.merge(params), batch, None, OBJECTIVE.weights(batch)).loss

    wanted, _ = definition.split_trainable(jax.jit(jax.grad(loss))(params))
    assert set(definition.flat(update)) == set(definition.flat(wanted)) and len(definition.flat(update)) == 4
    assert relative(update, wanted) < 1e-5


# ---------------------------------------------------------------- metrics


def test_metrics_are_the_loss_its_parts_and_the_norm_of_the_gradient():
    update, metrics, state = cached_update(2)
    batch = random_batch(TINY)
    definition = ModelDefinition(TINY)
    logits = definition.merge(weights(definition))(batch.tokens, batch.positions, segment_ids=batch.segment_ids)[0]
    logits, mask = np.asarray(logits, np.float64), np.asarray(batch.loss_mask, np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - np.take_along_axis(logits, np.asarray(batch.targets)[..., None], -1)[..., 0]
    want = {
        "loss/nll": (nll * mask).sum() / mask.sum(),
        "loss/z": 1e-3 * (lse**2 * mask).sum() / mask.sum(),
        "weight/tokens": mask.sum(),
        "grad_norm": float(optax.global_norm(update)),
    }
    want["loss"] = want["loss/nll"] + want["loss/z"]
    assert set(metrics) == set(want)
    for name, value in want.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    assert int(state.step) == 1


def test_evaluation_of_parts_adds_up_to_the_whole():
    definition, batch = ModelDefinition(TINY), random_batch(TINY)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(batch.tokens.shape[0])]
    total = total_weights(NextToken(), parts)
    assert float(total["tokens"]) == float(batch.loss_mask.sum())
    evaluate = eval_step(definition, NextToken())
    found = sum(float(evaluate(weights(definition), part, None, total)["loss/nll"]) for part in parts)
    assert found == pytest.approx(float(cached_update()[1]["loss/nll"]), rel=1e-5)


# ---------------------------------------------------------------- the compiled step


def test_the_state_is_donated_and_compiled_once():
    definition = ModelDefinition(TINY)
    optimizer = optax.adamw(1e-3)
    step = compile_train_step(definition, OBJECTIVE, optimizer, 2)
    state = jax.tree.map(jnp.copy, fresh_state(definition, optimizer))
    losses = []
    for number in range(4):
        old, batch = state, random_batch(TINY, seed=number % 2)
        state, metrics = step(state, batch, None)
        losses.append(float(metrics["loss"]))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))
    assert step._cache_size() == 1
    assert int(state.step) == 4 and losses[2] < losses[0] and losses[3] < losses[1]
