# SPDX-License-Identifier: Apache-2.0
"""Optimizers against Optax and NumPy in float64, schedules, decay by role, resume, sharding."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from maxkit.errors import UserError
from maxkit.optim import (
    OptimizerConfig,
    decay_mask,
    learning_rate_at,
    make_optimizer,
    make_schedule,
    read_learning_rate,
    set_learning_rate,
)

OPTIMIZERS = ("adamw", "adam_pax", "sgd")
LETTERS = {
    "embed": {"table": "VD"},
    "layers": {
        "block_0": {
            "attention": {"query": {"kernel": "LDNH", "bias": "LNH", "lora_a": "LDR", "lora_b": "LRNH"}},
            "mlp": {"up": {"kernel": "LDF"}},
            "attention_norm": {"scale": "LD"},
        }
    },
    "final_norm": {"scale": "D"},
}
SIZES = dict(V=8, D=4, L=2, N=2, H=4, F=8, R=2)
TOTAL_STEPS = 20


def tree_of(seed: int, dtype=jnp.float32, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    shape = lambda letters: [SIZES[letter] for letter in letters]  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=shape(x)), dtype), LETTERS)


def gradients_at(step: int, dtype=jnp.float32) -> dict:
    return tree_of(100 + step, dtype, scale=0.3 * (1 + step % 3))  # norms on both sides of the threshold


def config(**fields) -> OptimizerConfig:
    return OptimizerConfig(**dict(learning_rate=0.01, gradient_clipping_threshold=5.0) | fields)


def run(optimizer, params, steps=range(TOTAL_STEPS), opt_state=None):
    @jax.jit
    def update(params, opt_state, gradients):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params) if opt_state is None else opt_state
    for step in steps:
        params, opt_state = update(params, opt_state, gradients_at(step))
    return params, opt_state


def numpy_reference(cfg: OptimizerConfig, params: dict) -> dict:
    """20 updates in float64, straight from the formulas (Adam in its textbook form)."""
    leaves, structure = jax.tree.flatten(params)
    decayed = jax.tree.leaves(decay_mask(LETTERS))
    w = [np.asarray(leaf, np.float64) for leaf in leaves]
    m, v = ([np.zeros_like(x) for x in w] for _ in range(2))
    for step in range(TOTAL_STEPS):
        g = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients_at(step))]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        if cfg.gradient_clipping_threshold and norm > cfg.gradient_clipping_threshold:
            g = [x * cfg.gradient_clipping_threshold / norm for x in g]
        warmup = int(cfg.warmup_steps_fraction * TOTAL_STEPS)
        progress = (step - warmup) / (TOTAL_STEPS - warmup)
        cosine = cfg.learning_rate_final_fraction + (1 - cfg.learning_rate_final_fraction) * 0.5 * (
            1 + np.cos(np.pi * progress)
        )
        rate = cfg.learning_rate * ((step + 1) / (warmup + 1) if step < warmup else cosine)
        for i, x in enumerate(g):
            m[i] = cfg.adam_b1 * m[i] + (1 - cfg.adam_b1) * x
            v[i] = cfg.adam_b2 * v[i] + (1 - cfg.adam_b2) * x**2
            m_hat, v_hat = (m[i] / (1 - cfg.adam_b1 ** (step + 1)), v[i] / (1 - cfg.adam_b2 ** (step + 1)))
            direction = x if cfg.optimizer == "sgd" else m_hat / (np.sqrt(v_hat) + cfg.adam_eps)
            w[i] = w[i] - rate * (direction + cfg.weight_decay * decayed[i] * w[i])
    return jax.tree.unflatten(structure, w)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x, np.float64), y, **tolerance), a, b)


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


# --- the update rules ---


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_updates_equal_numpy_in_float64(optimizer):
    cfg, params = config(optimizer=optimizer), tree_of(0)
    after, _ = run(make_optimizer(cfg, TOTAL_STEPS, LETTERS), params)
    assert_close(after, numpy_reference(cfg, params), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("optimizer", ("adamw", "adam_pax"))
def test_twenty_updates_equal_optax(optimizer):
    cfg, params = config(optimizer=optimizer, gradient_clipping_threshold=1.0), tree_of(0)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            make_schedule(cfg, TOTAL_STEPS),
            b1=cfg.adam_b1,
            b2=cfg.adam_b2,
            eps=cfg.adam_eps,
            weight_decay=cfg.weight_decay,
            mask=decay_mask(LETTERS),
        ),
    )
    ours, _ = run(make_optimizer(cfg, TOTAL_STEPS, LETTERS), params)
    assert_close(ours, run(theirs, params)[0], rtol=1e-6, atol=1e-6)


def test_sgd_equals_optax():
    cfg, params = config(optimizer="sgd", weight_decay=0.0, gradient_clipping_threshold=0.0), tree_of(0)
    ours, _ = run(make_optimizer(cfg, TOTAL_STEPS, LETTERS), params)
    assert_equal(ours, run(optax.sgd(make_schedule(cfg, TOTAL_STEPS)), params)[0])


def test_adam_pax_stores_the_corrected_moments_in_a_flat_state():
    params = tree_of(0)
    cfg = config(optimizer="adam_pax", gradient_clipping_threshold=0.0)
    _, pax = run(make_optimizer(cfg, TOTAL_STEPS, LETTERS), params)
    adam_cfg = cfg.model_copy(update={"optimizer": "adamw"})
    _, (adam, _, _) = run(make_optimizer(adam_cfg, TOTAL_STEPS, LETTERS), params)
    assert pax._fields == ("count", "mu", "nu") and int(pax.count) == int(adam.count) == TOTAL_STEPS
    corrected = lambda tree, decay: jax.tree.map(lambda x: x / (1 - decay**TOTAL_STEPS), tree)  # noqa: E731
    assert_close(pax.mu, corrected(adam.mu, cfg.adam_b1), rtol=1e-5, atol=1e-7)
    assert_close(pax.nu, corrected(adam.nu, cfg.adam_b2), rtol=1e-5, atol=1e-7)


@given(b1=st.floats(0, 0.99), b2=st.floats(0, 0.999), weight_decay=st.floats(0, 1), threshold=st.floats(0, 20))
@settings(max_examples=5, deadline=None)
def test_adam_pax_equals_float64_for_all_settings(b1, b2, weight_decay, threshold):
    cfg = config(
        optimizer="adam_pax",
        adam_b1=b1,
        adam_b2=b2,
        weight_decay=weight_decay,
        gradient_clipping_threshold=threshold,
    )
    after, _ = run(make_optimizer(cfg, TOTAL_STEPS, LETTERS), tree_of(0))
    assert_close(after, numpy_reference(cfg, tree_of(0)), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zero_gradients_only_decay_and_no_decay_means_no_change(optimizer):
    params = tree_of(0)
    for weight_decay in (0.0, 0.1):
        rule = make_optimizer(
            config(
                optimizer=optimizer,
                weight_decay=weight_decay,
                learning_rate_schedule="constant",
                warmup_steps_fraction=0,
            ),
            TOTAL_STEPS,
            LETTERS,
        )
        updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
        expected = jax.tree.map(lambda p, d, w=weight_decay: -0.01 * w * p * d, params, decay_mask(LETTERS))
        assert_close(updates, expected, rtol=1e-6)


def test_clipping_bounds_the_norm_and_zero_is_off():
    params, huge = tree_of(0), jax.tree.map(lambda g: 1000 * g, gradients_at(0))
    fields = dict(
        optimizer="sgd",
        weight_decay=0.0,
        learning_rate=1.0,
        learning_rate_schedule="constant",
        warmup_steps_fraction=0.0,
    )
    for threshold in (0.0, 0.5):
        rule = make_optimizer(config(**fields, gradient_clipping_threshold=threshold), TOTAL_STEPS, LETTERS)
        updates, _ = rule.update(huge, rule.init(params), params)
        expected = threshold or float(optax.global_norm(huge))
        np.testing.assert_allclose(float(optax.global_norm(updates)), expected, rtol=1e-5)


# --- dtypes, state, resume ---


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bfloat16_weights_keep_float32_moments_and_round_once(optimizer):
    cfg, params = config(optimizer=optimizer), tree_of(0, jnp.bfloat16)
    rule = make_optimizer(cfg, TOTAL_STEPS, LETTERS)
    state = rule.init(params)
    updates, state = rule.update(gradients_at(0, jnp.bfloat16), state, params)
    floating = [x for x in jax.tree.leaves((state, updates)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floating and all(x.dtype == jnp.float32 for x in floating)
    after = optax.apply_updates(params, updates)
    exact = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(jnp.bfloat16), params, updates)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(after))
    assert_equal(after, exact)


@pytest.mark.parametrize("inject", (False, True))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_from_a_saved_state_is_exact(optimizer, inject):
    rule = make_optimizer(config(optimizer=optimizer), TOTAL_STEPS, LETTERS, inject=inject)
    whole = run(rule, tree_of(0))
    half = run(rule, tree_of(0), range(11))
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves(half)]  # what a checkpoint holds
    params, opt_state = jax.tree.unflatten(jax.tree.structure(half), [jnp.asarray(x) for x in saved])
    assert_equal(run(rule, params, range(11, TOTAL_STEPS), opt_state), whole)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_does_not_depend_on_clipping_decay_or_schedule(optimizer):
    structures = {
        jax.tree.structure(make_optimizer(cfg, TOTAL_STEPS, LETTERS).init(tree_of(0)))
        for cfg in (
            config(optimizer=optimizer),
            config(optimizer=optimizer, gradient_clipping_threshold=0.0, weight_decay=0.0),
            config(optimizer=optimizer, learning_rate_schedule="constant", warmup_steps_fraction=0.0),
        )
    }
    assert len(structures) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optax_can_tell_the_moments_from_the_rest_of_the_state(optimizer):
    rule, params = make_optimizer(config(optimizer=optimizer), TOTAL_STEPS, LETTERS), tree_of(0)
    named = optax.tree_map_params(
        rule, lambda _, letters: letters, rule.init(params), LETTERS, transform_non_params=lambda _: "step"
    )
    moments = [leaf for leaf in jax.tree.leaves(named) if leaf != "step"]
    assert moments == (0 if optimizer == "sgd" else 2) * jax.tree.leaves(LETTERS)


# --- learning rate ---


def test_an_injected_learning_rate_changes_without_compiling_again():
    rule, params = make_optimizer(config(), TOTAL_STEPS, LETTERS, inject=True), tree_of(0)
    traced = []

    @jax.jit
    def update(gradients, opt_state):
        traced.append(1)
        return rule.update(gradients, opt_state, params)

    opt_state = rule.init(params)
    assert float(read_learning_rate(opt_state)) == pytest.approx(0.01)
    one, _ = update(gradients_at(0), opt_state)
    two, after = update(gradients_at(0), set_learning_rate(opt_state, 0.02))
    assert_close(two, jax.tree.map(lambda x: 2 * x, one), rtol=1e-6)
    assert len(traced) == 1
    assert float(read_learning_rate(after)) == pytest.approx(0.02)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_injected_and_scheduled_updates_are_equal(optimizer):
    cfg = config(optimizer=optimizer)
    scheduled, _ = run(make_optimizer(cfg, TOTAL_STEPS, LETTERS), tree_of(0))
    injected, _ = run(make_optimizer(cfg, TOTAL_STEPS, LETTERS, inject=True), tree_of(0))
    assert_close(injected, scheduled, rtol=1e-6, atol=1e-7)


def test_setting_the_learning_rate_of_a_scheduled_optimizer_is_refused():
    rule = make_optimizer(config(), TOTAL_STEPS, LETTERS)
    with pytest.raises(UserError, match="inject=True"):
        set_learning_rate(rule.init(tree_of(0)), 0.1)


def rates(total_steps=100, **fields) -> np.ndarray:
    cfg = OptimizerConfig(**dict(learning_rate=1.0) | fields)
    return np.array([learning_rate_at(cfg, total_steps, step) for step in range(total_steps + 20)])


@pytest.mark.parametrize("schedule", ("constant", "cosine", "linear", "wsd"))
def test_every_schedule_warms_up_reaches_the_top_and_stays_at_its_end(schedule):
    values = rates(learning_rate_schedule=schedule)
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 11, rtol=1e-6)
    assert values[10] == pytest.approx(1.0) and values.max() == pytest.approx(1.0)
    assert values[0] > 0
    final = 1.0 if schedule == "constant" else 0.1
    np.testing.assert_allclose(values[100:], final, rtol=1e-5)
    assert np.all(np.diff(values[10:]) <= 1e-6)


def test_the_shapes_between():
    assert rates(learning_rate_schedule="cosine")[55] == pytest.approx(0.55)  # half way down
    assert rates(learning_rate_schedule="linear")[55] == pytest.approx(0.55)
    wsd = rates(learning_rate_schedule="wsd", wsd_decay_steps_fraction=0.2)
    np.testing.assert_allclose(wsd[10:81], 1.0)
    assert wsd[90] == pytest.approx(0.55)
    assert rates(warmup_steps_fraction=0.0)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("total_steps", (0, 1, 2, 3))
@pytest.mark.parametrize("schedule", ("constant", "cosine", "linear", "wsd"))
def test_the_shortest_runs_have_finite_positive_rates(schedule, total_steps):
    values = rates(total_steps, learning_rate_schedule=schedule)
    assert np.isfinite(values).all() and (values > 0).all()


@pytest.mark.parametrize(
    "fields",
    (
        dict(learning_rate=-1.0),
        dict(adam_b1=1.0),
        dict(optimizer="adamW"),
        dict(learning_rate_schedule="wsd", warmup_steps_fraction=0.95),
        dict(lr=1e-3),
    ),
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ValidationError):
        OptimizerConfig(**fields)


# --- decay by role ---


def test_matrices_are_decayed_norms_and_biases_are_not():
    block = {
        "attention": {"query": {"kernel": True, "bias": False, "lora_a": True, "lora_b": True}},
        "mlp": {"up": {"kernel": True}},
        "attention_norm": {"scale": False},
    }
    expected = {"embed": {"table": True}, "layers": {"block_0": block}, "final_norm": {"scale": False}}
    assert decay_mask(LETTERS) == expected


def test_what_is_no_matrix_is_never_decayed_however_many_letters_it_has():
    letters = {"experts": {"kernel": "LEDF", "bias": "LEF"}, "router": {"kernel": "DE", "correction": "LE"}}
    letters |= {"attention": {"sinks": "LN"}, "delta": {"dt_bias": "LN", "log_decay": "LN", "kernel": "LKHW"}}
    mask = decay_mask(letters | {"positions": {"table": "SD"}})
    assert mask.pop("positions") == {"table": True}
    assert {name: on for part in mask.values() for name, on in part.items() if name != "kernel"} == dict.fromkeys(
        ("bias", "correction", "sinks", "dt_bias", "log_decay"), False
    )
    assert all(part.get("kernel", True) for part in mask.values())


def test_a_name_inside_the_path_decides_nothing():
    mask = decay_mask({"bias_tower": {"kernel": "DF"}, "kernel": {"scale": "D"}, "gate": {"kernel": "LD"}})
    assert mask == {"bias_tower": {"kernel": True}, "kernel": {"scale": False}, "gate": {"kernel": False}}


@pytest.mark.parametrize(
    ("letters", "message"),
    (
        ({"attention": {"drains": "N"}}, "attention/drains.*no role for 'drains'"),
        ({"mlp": {"kernel": "DX"}}, "mlp/kernel: unknown dimension letters"),
    ),
)
def test_unknown_roles_and_letters_are_refused(letters, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(config(), TOTAL_STEPS, letters)


@pytest.mark.parametrize(
    ("params", "message"),
    (
        ({"a": {"kernel": np.ones(3)}}, "a/kernel: letters 'DF', but its shape is"),
        ({"b": {"kernel": np.ones((3, 3))}}, "differ: 'a/kernel'"),
    ),
)
def test_letters_that_do_not_fit_the_parameters_are_refused(params, message):
    rule = make_optimizer(config(), TOTAL_STEPS, {"a": {"kernel": "DF"}})
    params = jax.tree.map(jnp.asarray, params)
    with pytest.raises(UserError, match=message):
        rule.update(params, rule.init(params), params)


def test_updates_without_parameters_are_refused():
    rule = make_optimizer(config(optimizer="adam_pax"), TOTAL_STEPS, LETTERS)
    with pytest.raises(ValueError, match="needs the parameters"):
        rule.update(gradients_at(0), rule.init(tree_of(0)))


# --- many devices ---

ON_EIGHT_DEVICES = """
import json, sys
import jax, numpy as np, optax
sys.path.insert(0, {folder!r})
import test_optim as t
from maxkit.mesh import make_mesh, weight_sharding
from maxkit.optim import make_optimizer

assert jax.device_count() == 8
mesh = make_mesh("fsdp:4,tensor:2")
with jax.set_mesh(mesh):
    place = lambda x, letters: jax.device_put(x, weight_sharding(letters, x.shape, mesh))
    put = lambda tree: jax.tree.map(place, tree, t.LETTERS)
    sums = {{}}
    for name in t.OPTIMIZERS:
        rule = make_optimizer(t.config(optimizer=name), t.TOTAL_STEPS, t.LETTERS)

        def update(params, opt_state, gradients):
            updates, opt_state = rule.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        update = jax.jit(update, donate_argnums=(0, 1))
        params = put(t.tree_of(0))
        specs = jax.tree.map(lambda x: x.sharding.spec, params)
        opt_state = jax.jit(rule.init)(params)
        for step in range(t.TOTAL_STEPS):
            params, opt_state = update(params, opt_state, put(t.gradients_at(step)))
        assert jax.tree.map(lambda x: x.sharding.spec, params) == specs
        if name != "sgd":
            adam = opt_state if name == "adam_pax" else opt_state[0]
            assert jax.tree.map(lambda x: x.sharding.spec, adam.mu) == specs
            assert jax.tree.map(lambda x: x.sharding.spec, adam.nu) == specs
        sums[name] = [np.asarray(x, np.float64).ravel().tolist() for x in jax.tree.leaves(params)]
print(json.dumps(sums))
"""


def test_eight_devices_equal_one_and_moments_are_sharded_like_the_weights():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    script = ON_EIGHT_DEVICES.format(folder=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    eight = json.loads(done.stdout)
    for name in OPTIMIZERS:
        one, _ = run(make_optimizer(config(optimizer=name), TOTAL_STEPS, LETTERS), tree_of(0))
        for a, b in zip(jax.tree.leaves(one), eight[name], strict=True):
            np.testing.assert_allclose(np.asarray(a).ravel(), b, rtol=1e-5, atol=1e-6)
