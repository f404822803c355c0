# SPDX-License-Identifier: Apache-2.0
"""Preference, policy and distillation inside the training step: what must not change an update, and known answers."""

import dataclasses
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import all_logits, shapes
from objective_cases import LENGTH, LENGTHS, OBJECTIVES, STUDENT, VOCAB, case, logps, sequences, with_columns
from tiny_models import tiny, weights

from maxkit.errors import UserError
from maxkit.infer import sequence_logps
from maxkit.models.definition import ModelDefinition
from maxkit.objectives import Distill, Policy, Preference
from maxkit.train.step import train_step
from maxkit.types import TrainState

SCRIPT = Path(__file__).parent / "objective_sharding_cases.py"
# Plain SGD with rate 1: the update is the gradient.
SGD = optax.sgd(1.0)
# Compiling is what these tests spend their time on.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def update(objective, batch, frozen=None, accumulation=1):
    """(the gradient's negative, metrics) of one step."""
    params = weights(STUDENT)
    state = TrainState(jnp.int32(0), params, {}, SGD.init(params), jax.random.key(0))
    new, metrics = jit(train_step(STUDENT, objective, SGD, accumulation))(state, batch, frozen)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new.params, params)
    return moved, {name: float(value) for name, value in metrics.items()}


@functools.cache
def update_of(name, accumulation=1):
    return update(*case(name), accumulation)


def relative(a, b):
    """The norm of the difference over the norm."""
    return norm(jax.tree.map(lambda x, y: x - y, a, b)) / norm(b)


def norm(tree):
    """The square root of the sum of all squares, in float64."""
    return math.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(tree)))


# ---------------------------------------------------------------- what does not change an update


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_is_one_big_batch(name):
    """4 x 1, 2 x 2 and 1 x 4 rows of 7 to 24 tokens."""
    whole, metrics = update_of(name)
    assert norm(whole) > 1e-3
    for accumulation in (2, 4):
        parts, found = update_of(name, accumulation)
        assert relative(parts, whole) < 1e-5
        assert found == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@functools.cache
def on_eight_devices(path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": str(SCRIPT.parent.parent),
    }
    done = subprocess.run([sys.executable, str(SCRIPT), path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(np.load(path))


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    return on_eight_devices(str(tmp_path_factory.mktemp("objectives") / "updates.npz"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_eight_devices_make_the_update_of_one(name, eight_devices):
    """Rows over four, the vocabulary over two."""
    whole, metrics = update_of(name)
    found = {tuple(key.split("|")[1:]): value for key, value in eight_devices.items() if key.split("|")[0] == name}
    mine = STUDENT.unflat({leaf: value for (kind, leaf), value in found.items() if kind == "update"})
    assert relative(mine, whole) < 1e-5
    assert {n: float(v) for (kind, n), v in found.items() if kind == "metric"} == pytest.approx(
        metrics, rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize(("name", "size"), [("dpo", 2), ("grpo", 1), ("gspo", 1)])
def test_packed_is_unpacked(name, size):
    """Every pair, or every sequence, in a row of its own."""
    objective, columns = OBJECTIVES[name]
    packed = case(name)[1]
    rows = []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for first in range(0, len(lengths), size):
            length = sum(lengths[first : first + size])
            cut = lambda x, row=row, at=start, n=length: jnp.pad(x[row, at : at + n], (0, LENGTH - n))  # noqa: E731
            alone = jax.tree.map(cut, packed)
            rows.append(
                dataclasses.replace(alone, segment_ids=jnp.where(alone.segment_ids > 0, alone.segment_ids - first, 0))
            )
            start += length
    unpacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    assert unpacked.tokens.shape[0] == 10 // size and set(unpacked.columns) == set(columns)
    found, metrics = update(objective, unpacked)
    assert relative(found, update_of(name)[0]) < 1e-5
    assert metrics == pytest.approx(update_of(name)[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_array_holds_the_logits_of_all_tokens(name):
    objective, batch, frozen = case(name)

    def found(num_tiles):
        tiled = dataclasses.replace(objective, num_tiles=num_tiles)
        loss = lambda p, f: tiled(STUDENT.merge(p), batch, f, tiled.weights(batch)).loss  # noqa: E731
        return shapes(jax.value_and_grad(loss), STUDENT.shapes, frozen)

    assert not all_logits(found(3), *batch.tokens.shape, VOCAB)
    assert all_logits(found(1), *batch.tokens.shape, VOCAB)  # the search itself finds them where they are


def test_rows_without_a_trained_token_change_nothing():
    """An update of padding is 0 and finite, also where a formula divides by a length or takes a log of odds."""
    for name in ("orpo", "grpo", "distill/top_k"):
        objective, batch, frozen = case(name)
        empty = dataclasses.replace(batch, loss_mask=0 * batch.loss_mask)

        def loss(p, objective=objective, empty=empty, frozen=frozen):
            return objective(STUDENT.merge(p), empty, frozen, objective.weights(empty)).loss

        value, gradient = jit(jax.value_and_grad(loss))(weights(STUDENT))
        assert value == 0 and not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient)), name


# ---------------------------------------------------------------- preference


def test_at_the_reference_the_loss_is_log_two():
    batch = sequences()
    batch = dataclasses.replace(batch, columns={"ref_logps": logps(batch)})
    gradient, metrics = update(Preference(beta=0.3, num_tiles=2), batch)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["weight/pairs"] == 5
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert metrics[name] == pytest.approx(0, abs=1e-5)
    # And it moves: half of beta along (chosen - rejected).
    after = jax.tree.map(lambda p, g: p + 0.01 * g, weights(STUDENT), gradient)
    objective = Preference(beta=0.3)
    out = jit(lambda p: objective(STUDENT.merge(p), batch, None, objective.weights(batch)).metrics)(after)
    assert out["rewards/margins"] > 0 and out["rewards/chosen"] > out["rewards/rejected"]


def test_an_incomplete_pair_counts_nothing():
    """Its rejected side has no trained token: not a pair, and its chosen answer is no likelihood either."""
    objective, batch, _ = case("dpo")
    for segment, pairs in ((4, 4), (3, 4)):
        there = batch.loss_mask * ~((batch.segment_ids == segment) & (jnp.arange(4) == 0)[:, None])
        both = there * ~((batch.segment_ids >= 3) & (jnp.arange(4) == 0)[:, None])
        found = [objective.weights(dataclasses.replace(batch, loss_mask=mask)) for mask in (there, both)]
        assert [float(w["pairs"]) for w in found] == [pairs, pairs]
        assert found[0]["tokens"] == found[1]["tokens"]


# ---------------------------------------------------------------- policy


def test_on_policy_the_loss_is_zero_and_nothing_is_clipped():
    """Old log-probs as the sampler's side computes them, advantages of mean 0, the reference the policy itself."""
    batch = sequences(((20,), (12,), (7,), (24,)))
    ids = [row[: int(n)].tolist() for row, n in zip(np.asarray(batch.tokens), (20, 12, 7, 24), strict=True)]
    old = np.zeros(batch.tokens.shape, np.float32)
    for row, found in enumerate(sequence_logps(STUDENT, weights(STUDENT), ids, temperature=0.8)):
        old[row, : len(found)] = found
    old = jnp.asarray(old) * batch.loss_mask
    advantages = jnp.broadcast_to(jnp.asarray([1.0, -1.0, 0.5, -0.5])[:, None], batch.tokens.shape)
    objective = Policy("sequence_mean", epsilon_low=1e-4, epsilon_high=1e-4, beta=0.04, temperature=0.8, num_tiles=2)
    columns = {"advantages": advantages, "old_logps": old, "ref_logps": old}
    gradient, metrics = update(objective, dataclasses.replace(batch, columns=columns))
    assert metrics["loss"] == pytest.approx(0, abs=2e-6) and metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert [metrics[f"clip_ratio/{side}_mean"] for side in ("low", "high", "region")] == [0, 0, 0]
    assert metrics["entropy"] > 1
    # Without old log-probs the ratio is 1 exactly and the gradient the same.
    columns = {"advantages": advantages}
    without, exact = update(dataclasses.replace(objective, beta=0.0), dataclasses.replace(batch, columns=columns))
    assert exact["loss"] == pytest.approx(0, abs=1e-7) and "kl" not in exact
    assert relative(without, gradient) < 1e-4 and norm(gradient) > 1e-2


# ---------------------------------------------------------------- distillation


def test_a_teacher_equal_to_the_student_teaches_nothing():
    objective = Distill(STUDENT, "jensen_shannon", 2.0, num_tiles=3)
    gradient, metrics = update(objective, sequences(), weights(STUDENT))
    assert metrics["kl"] == pytest.approx(0, abs=1e-6) and norm(gradient) < 1e-5


def test_the_mask_keeps_prompts_and_padding_out():
    """Another teacher's opinion outside of the mask makes no difference."""
    objective, batch, _ = case("distill/top_k")
    ids = jnp.where(batch.loss_mask[..., None] > 0, batch.columns["teacher_ids"], jnp.arange(5))
    other = dataclasses.replace(batch, columns=batch.columns | {"teacher_ids": ids})
    assert (np.asarray(ids) != np.asarray(batch.columns["teacher_ids"])).any()
    loss = jit(lambda p, b: objective(STUDENT.merge(p), b, None, objective.weights(b)).loss)
    assert loss(weights(STUDENT), other) == loss(weights(STUDENT), batch)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Preference("dpo"), "allowed: sigmoid, robust, ipo, hinge, orpo, simpo"),
        (lambda: Preference(beta=0.0), "beta=0.0"),
        (lambda: Preference("robust", label_smoothing=0.5), "below 0.5"),
        (lambda: Preference("ipo", label_smoothing=0.1), "means nothing to loss 'ipo'"),
        (lambda: Policy("mean"), "aggregation='mean' is unknown; allowed: token_mean"),
        (lambda: Policy("sequence_scale"), "max_tokens=None with aggregation='sequence_scale'"),
        (lambda: Policy(max_tokens=8), "max_tokens=8 with aggregation='token_mean'"),
        (lambda: Policy(ratio_level="row"), "ratio_level='row'"),
        (lambda: Policy(epsilon_low=1.0), "epsilon_low=1.0"),
        (lambda: Policy(dual_clip=1.1), "at least 1 + epsilon_high = 1.2"),
        (lambda: Policy(temperature=0.0), "temperature=0.0"),
        (lambda: Distill(divergence="kl"), "allowed: forward, reverse, jensen_shannon"),
        (lambda: Distill(mixture=1.0), "mixture=1.0"),
    ],
)
def test_bad_values_are_refused_in_one_line(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "frozen", "words"),
    [
        (Preference(), None, "needs the column 'ref_logps'"),
        (Policy(), None, "batch column 'advantages'; here: none"),
        (Distill(), None, "missing: teacher_ids, teacher_logps"),
        (Distill(STUDENT), None, "frozen"),
        (Distill(ModelDefinition(tiny(vocab_size=50))), {}, "a vocabulary of 50 and the student of 48"),
    ],
)
def test_what_a_batch_lacks_is_named(objective, frozen, words):
    batch = with_columns(sequences(), ())
    with pytest.raises(UserError) as caught:
        jax.eval_shape(lambda p: objective(STUDENT.merge(p), batch, frozen, objective.weights(batch)), STUDENT.shapes)
    assert words in str(caught.value) and "\n" not in str(caught.value)
