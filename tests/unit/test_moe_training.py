# SPDX-License-Identifier: Apache-2.0
"""Training mixtures of experts: terms exact under accumulation, the bias update, metrics, knobs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moe_layers import config
from tiny_models import TINY, random_batch, weights

from maxkit import build
from maxkit.config import resolve
from maxkit.errors import UserError
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig
from maxkit.objectives import NextToken
from maxkit.optim import OptimizerConfig, make_optimizer
from maxkit.train.routing import move_corrections, routing_metrics
from maxkit.train.step import train_step
from maxkit.types import TrainState

V3 = {"scoring": "sigmoid", "normalize_weights": True, "correction_bias": True, "shared_mlp_dim": 8}
MODEL = config(**V3, model={"num_layers": 3, "leading_blocks": [{}]})  # one dense layer, then two with experts
OBJECTIVE = NextToken(num_tiles=2, balance_loss=0.3, router_z_loss=0.05)
RATE = 0.01
SGD = optax.sgd(1.0)  # the update is the gradient


def batch(seed=0):
    """Four rows of very different lengths, one of them empty."""
    made = random_batch(MODEL, seed=seed)
    keep = (jnp.arange(made.tokens.shape[1]) < jnp.asarray([16, 3, 16, 16])[:, None]) & (jnp.arange(4) != 3)[:, None]
    return dataclasses.replace(made, segment_ids=made.segment_ids * keep, loss_mask=made.loss_mask * keep)


@functools.cache
def one_update(accumulation=1, objective=OBJECTIVE, rate=RATE, scan=True, dispatch="ragged"):
    """({path: change}, metrics) of one step of plain SGD."""
    definition = ModelDefinition(MODEL, Execution(scan_layers=scan, moe_dispatch=dispatch))
    params = weights(definition)
    state = TrainState(jnp.int32(0), params, {}, SGD.init(params), jax.random.key(0))
    after, metrics = jax.jit(train_step(definition, objective, SGD, accumulation, rate))(state, batch(), None)
    change = jax.tree.map(lambda a, b: np.asarray(b, np.float64) - np.asarray(a), params, after.params)
    return definition.flat(change), {name: float(value) for name, value in metrics.items()}


def corrections(changes):
    return {path: change for path, change in changes.items() if path.endswith("correction")}


def relative(a, b):
    norm = lambda tree: np.sqrt(sum((leaf**2).sum() for leaf in tree.values()))  # noqa: E731
    return norm({path: a[path] - b[path] for path in b}) / norm(b)


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize("accumulation", [2, 4])
def test_every_term_and_the_bias_update_are_exact_under_accumulation(accumulation):
    whole, metrics = one_update()
    parts, accumulated = one_update(accumulation)
    assert relative(parts, whole) < 1e-5
    for path, change in corrections(whole).items():
        np.testing.assert_array_equal(parts[path], change)
    assert metrics.keys() == accumulated.keys() >= {"moe/balance", "moe/z", "weight/rows", "weight/real_tokens"}
    for name, value in metrics.items():
        assert accumulated[name] == pytest.approx(value, rel=1e-5), name


def test_the_mean_of_the_micro_batches_means_would_be_another_loss():
    """The rows are uneven enough for the test above to notice."""
    real = np.asarray(batch().segment_ids != 0)
    tokens = real.sum(axis=1)
    assert tokens[3] == 0 and 0 < tokens[1] < tokens.max() / 3
    definition = ModelDefinition(MODEL)
    step = jax.jit(train_step(definition, OBJECTIVE, SGD, 1))
    params = weights(definition)
    found = []
    for row in range(3):
        alone = jax.tree.map(lambda x, r=row: x[r : r + 1], batch())
        state = TrainState(jnp.int32(0), params, {}, SGD.init(params), jax.random.key(0))
        found.append(step(state, alone, None)[1])
    whole = one_update()[1]
    z = np.asarray([float(row["moe/z"]) for row in found])
    assert (z * tokens[:3]).sum() / tokens.sum() == pytest.approx(whole["moe/z"], rel=1e-5)
    assert abs(z.mean() / whole["moe/z"] - 1) > 1e-3
    balance = np.asarray([float(row["moe/balance"]) for row in found])
    assert balance.sum() / 3 == pytest.approx(whole["moe/balance"], rel=1e-5)
    assert abs(balance.sum() / 4 / whole["moe/balance"] - 1) > 0.2  # the empty row does not count


# ---------------------------------------------------------------- terms and knobs


def test_the_loss_is_the_sum_of_its_terms():
    metrics = one_update()[1]
    want = metrics["loss/nll"] + 0.3 * metrics["moe/balance"] + 0.05 * metrics["moe/z"]
    assert metrics["loss"] == pytest.approx(want, rel=1e-5)
    assert 1.0 <= metrics["moe/load_max_over_mean"] <= 8 and metrics["moe/dropped_fraction"] == 0
    assert (metrics["weight/rows"], metrics["weight/real_tokens"]) == (3, float((batch().segment_ids != 0).sum()))


@pytest.mark.parametrize("term", ["balance_loss", "router_z_loss"])
def test_each_term_moves_the_routers(term):
    without, _ = one_update(objective=dataclasses.replace(OBJECTIVE, **{term: 0.0}))
    with_it, _ = one_update()
    routers = [path for path in without if path.endswith("router/kernel")]
    assert routers
    for path in routers:
        assert np.abs(without[path] - with_it[path]).max() > 1e-3 * np.abs(with_it[path]).max()


def test_the_recipe_s_fields_reach_objective_and_step():
    values = {"load_balance_loss_weight": 0.25, "router_z_loss_weight": 0.125}
    cfg = resolve("pretrain", environ={}, given={name: (value, "keyword") for name, value in values.items()})
    objective = build.blueprint(cfg, config=config(model={"max_seq_len": 1024})).objective
    assert (objective.balance_loss, objective.router_z_loss) == (0.25, 0.125)


def test_scanned_unrolled_and_every_dispatch_train_alike():
    whole, metrics = one_update()
    _, unrolled = one_update(scan=False)
    for name, value in metrics.items():
        assert unrolled[name] == pytest.approx(value, rel=1e-5), name
    dense, _ = one_update(dispatch="dense")
    assert relative(dense, whole) < 1e-5


def test_terms_of_experts_are_refused_for_a_model_without():
    definition = ModelDefinition(TINY)
    params = weights(definition)
    state = TrainState(jnp.int32(0), params, {}, SGD.init(params), jax.random.key(0))
    with pytest.raises(UserError, match="load_balance_loss_weight.*has none"):
        jax.eval_shape(train_step(definition, NextToken(balance_loss=0.1), SGD), state, random_batch(TINY), None)


# ---------------------------------------------------------------- balance without a loss


def test_the_bias_moves_by_the_sign_of_the_load_in_each_layer():
    """In every layer of a scanned and an unrolled model, with the load of that layer."""
    load = np.asarray([[9, 1, 5, 5, 5, 5, 5, 5], [0, 10, 5, 4, 5, 6, 5, 5]], np.float32)
    want = RATE * np.asarray([[-1, 1, 0, 0, 0, 0, 0, 0], [1, -1, 0, 1, 0, -1, 0, 0]])
    for scan in (True, False):
        definition = ModelDefinition(MODEL, Execution(scan_layers=scan))
        params = weights(definition)
        after = definition.flat(move_corrections(definition, params, jnp.asarray(load), RATE))
        before, moved = definition.flat(params), []
        for path, old in before.items():
            if path.endswith("router/correction"):
                rows = np.asarray(definition.parameters[path].layers) - 1  # layer 0 is dense
                change = np.asarray(after[path]) - np.asarray(old)
                np.testing.assert_allclose(change, want[rows] if scan else want[rows[0]], atol=1e-6)
                moved += list(rows)
            else:
                assert after[path] is old
        assert sorted(moved) == [0, 1]


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 0.0), ("adamw", RATE), ("adam_pax", RATE), ("sgd", RATE)])
def test_nothing_but_the_rate_moves_the_bias(optimizer, rate):
    definition = ModelDefinition(MODEL)
    rule = make_optimizer(
        OptimizerConfig(optimizer=optimizer, learning_rate=0.1, weight_decay=0.5), 10, definition.letters
    )
    before = weights(definition)
    state = TrainState(jnp.int32(0), before, {}, rule.init(before), jax.random.key(0))
    after, _ = jax.jit(train_step(definition, OBJECTIVE, rule, 1, rate))(state, batch(), None)
    old, new = definition.flat(before), definition.flat(after.params)
    for path, value in old.items():
        if path.endswith("correction"):
            steps = np.abs(np.asarray(new[path]) - np.asarray(value)) / (rate or 1.0)
            assert np.all(np.isclose(steps, 0) | np.isclose(steps, 1, atol=1e-4)) if rate else not steps.any()
            assert steps.any() == bool(rate)
        else:
            assert (np.asarray(new[path]) != np.asarray(value)).any(), path


def test_the_bias_evens_out_the_load():
    """With frozen weights and the same tokens, the busiest expert loses what it had too much."""
    definition = ModelDefinition(MODEL)
    params = weights(definition)
    still = optax.sgd(0.0)
    state = TrainState(jnp.int32(0), params, {}, still.init(params), jax.random.key(0))
    step = jax.jit(train_step(definition, NextToken(num_tiles=1), still, 1, 0.02))
    loads = []
    for _ in range(40):
        state, metrics = step(state, random_batch(MODEL), None)
        loads.append(float(metrics["moe/load_max_over_mean"]))
    assert loads[0] > 1.5 and np.mean(loads[-5:]) < 1 + 0.6 * (loads[0] - 1)


@pytest.mark.parametrize("case", ["no correction", "adapters"])
def test_a_rate_with_nothing_to_move_is_refused(case):
    lora = LoraConfig(rank=2) if case == "adapters" else None
    model = MODEL if lora else config()
    with pytest.raises(UserError, match="routed_bias_update_rate=0.01 has nothing to update") as caught:
        train_step(ModelDefinition(model, lora=lora), OBJECTIVE, SGD, 1, RATE)
    assert "\n" not in str(caught.value)


def test_metrics_of_a_load_by_hand():
    statistics = {
        "moe/load": jnp.asarray([[4.0, 0, 0, 0], [1, 1, 2, 0]]),
        "moe/dropped": jnp.asarray([2.0, 0.0]),
        "moe/balance": jnp.asarray(3.0),
        "moe/z": jnp.asarray(8.0),
        "moe/rows": jnp.asarray(2.0),
        "moe/tokens": jnp.asarray(4.0),
    }
    found = {name: float(value) for name, value in routing_metrics(statistics).items()}
    assert found == {
        "moe/balance": 1.5,
        "moe/z": 2.0,
        "moe/load_max_over_mean": 3.0,  # 4 and 2 times the mean
        "moe/dropped_fraction": 0.25,
    }
    assert routing_metrics({}) == {}
