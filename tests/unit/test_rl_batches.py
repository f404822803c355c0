# SPDX-License-Identifier: Apache-2.0
"""Rollouts of a tiny model with the real engine, and the real training step where one is needed."""

import functools
import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import tiny, weights

from maxkit import mesh as meshes
from maxkit.data.tokenizer import train_bpe
from maxkit.errors import UserError
from maxkit.infer import engine
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig
from maxkit.objectives.policy import Policy
from maxkit.rl import batches
from maxkit.rl.answers import Answerer, evaluate
from maxkit.rl.batches import RolloutBatches
from maxkit.rl.config import RlConfig
from maxkit.rl.prompts import load_prompts
from maxkit.rl.rollout import EngineRollout
from maxkit.run.batches import Placer
from maxkit.train.step import compile_train_step
from maxkit.types import TrainState

HERE = __name__
CONFIG = tiny(vocab_size=260)
SIZES = {
    "seq_len": 16,
    "max_new_tokens": 8,
    "num_generations": 4,
    "batch_size": 8,
    "num_vocab_tiling": 1,
    "rollout_batch_size": 8,
    "temperature": 0.8,
    "rewards": f"{HERE}:parity",
}


def parity(completion, num_tokens):
    return float((len(completion) + num_tokens) % 2)


def constant(completion):
    return 1.0


def only_sums_differ(completion, prompt):
    return parity(completion, 0) if "+" in prompt else 0.5


def fails_on_odd(completion, num_tokens):
    return 1 / (1 - parity(completion, num_tokens)) + len(completion)


@functools.cache
def tokenizer():
    return train_bpe(["0123456789+-*="], 260)


@functools.cache
def prompts():
    return load_prompts("arithmetic:+-", tokenizer(), max_prompt_length=8, seed=0).train


@functools.cache
def definition(lora=False):
    return ModelDefinition(CONFIG, lora=LoraConfig(rank=2) if lora else None)


@functools.cache
def mesh():
    return meshes.make_mesh("", jax.devices()[:1])


def first_state(lora=False):
    params = jax.device_put(weights(definition(lora)), definition(lora).shardings(mesh()))  # as a run has them
    params, base = definition(lora).split_trainable(params)
    opt_state = optax.sgd(0.5).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, base, opt_state, jnp.zeros(2, jnp.uint32))


def source(folder=None, lora=False, reference=None, **changes):
    cfg = RlConfig(**{**SIZES, **changes})
    rollout = EngineRollout.of(cfg, definition(lora), [5, 77, 200], mesh())
    answerer = Answerer(cfg, rollout, tokenizer())
    place = Placer(mesh())
    return RolloutBatches(answerer, prompts(), definition(lora), place, mesh=mesh(), reference=reference, folder=folder)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def completion_of(batch, row):
    at = np.flatnonzero(np.asarray(batch.loss_mask[row]))
    return np.asarray(batch.targets)[row, at]


# ------------------------------------------------------------ rows


def test_rows_hold_prompt_completion_and_padding_and_the_advantages_of_their_group():
    batch, metrics = source().next(first_state())
    tokens, mask, real = (np.asarray(x) for x in (batch.tokens, batch.loss_mask, batch.segment_ids))
    assert tokens.shape == (8, 16) and set(batch.columns) == {"advantages"}
    np.testing.assert_array_equal(np.asarray(batch.targets)[:, :-1], tokens[:, 1:])
    advantages = np.asarray(batch.columns["advantages"])
    rewards = []
    for row in range(8):
        length = real[row].sum()
        assert real[row, :length].all() and not tokens[row, length:].any()
        trained = np.flatnonzero(mask[row])
        prompt = tokens[row, : trained[0] + 1]
        assert tokenizer().decode(prompt).endswith("=") and trained[-1] == length - 2
        assert np.array_equal(trained, np.arange(trained[0], length - 1))
        completion = tokens[row, trained + 1]
        assert len(completion) == 8 or completion[-1] in (5, 77, 200)
        rewards.append(parity(tokenizer().decode(completion, skip_special=True), len(completion)))
        assert (advantages[row, :length] == advantages[row, 0]).all() and not advantages[row, length:].any()
    groups = np.reshape(rewards, (2, 4))
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(advantages[:, 0], expected.ravel(), atol=1e-6)
    assert metrics["reward"] == metrics[f"rewards/{HERE}.parity/mean"] == np.mean(rewards)
    assert metrics["reward_std"] == pytest.approx(groups.std(1, ddof=1).mean())
    assert metrics["frac_reward_zero_std"] == np.mean(groups.std(1) == 0)
    assert metrics["num_tokens"] == real.sum() and metrics["completions/mean_length"] == mask.sum() / 8
    assert metrics["completions/max_length"] == mask.sum(1).max() and 0 <= metrics["completions/clipped_ratio"] <= 1


def test_sampler_and_trainer_agree_on_log_probs():
    _, metrics = source(batches_per_rollout=4).next(first_state())
    largest = metrics["sampling/sampling_logp_difference/max"]
    print(f"largest difference of a token's log-prob, sampler against trainer: {largest:.2e} nats")
    assert 0 < largest < 2e-5
    assert metrics["sampling/sampling_logp_difference/mean"] <= largest
    assert abs(metrics["sampling/importance_sampling_ratio/min"] - 1) < 2e-5


def test_a_seed_and_a_rollout_decide_the_completions_and_no_two_share_noise():
    one, two, other = source(), source(), source(seed=1)
    first, second = (one.next(first_state())[0] for _ in range(2))
    assert same(first, two.next(first_state())[0]) and same(second, two.next(first_state())[0])
    assert not np.array_equal(first.tokens, other.next(first_state())[0].tokens)
    # One prompt again and again: were a key used twice, two rows would be equal from their first token on.
    alone = source()
    alone._prompts = prompts()[:1]
    seen = [tuple(completion_of(alone.next(first_state())[0], row)) for _ in range(2) for row in range(8)]
    assert len(set(seen)) == 16


def test_all_prompts_are_asked_once_before_one_is_asked_again():
    a = source()
    drawn = [p.text for p in a._draw(2 * len(prompts()))]
    epochs = drawn[: len(prompts())], drawn[len(prompts()) :]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(p.text for p in prompts()) and epochs[0] != epochs[1]


# ------------------------------------------------------------ several updates of one rollout


def test_exact_resume_in_the_middle_without_a_second_compilation(tmp_path):
    how = {"epochs_per_rollout": 2, "batches_per_rollout": 2, "batch_size": 4, "beta": 0.1, "algorithm": "dr_grpo"}
    reference = first_state().params
    policy = Policy(**RlConfig(**{**SIZES, **how}).policy_arguments())
    step = compile_train_step(definition(), policy, optax.sgd(0.5))

    def run(batches_of, state, count):
        found = []
        for _ in range(count):
            batch, measured = batches_of.next(state)
            kept = jax.tree.map(np.array, batch)
            state, metrics = step(state, batch)
            found.append((kept, {**measured, **{k: float(v) for k, v in metrics.items()}}))
        return state, found

    with jax.set_mesh(mesh()):
        whole = source(folder=tmp_path, reference=reference, **how)
        state, found = run(whole, first_state(), 2)
        compiled = engine._generate_batch._cache_size(), batches._batch_logps._cache_size()
        saved, kept = json.loads(json.dumps(whole.get_state())), jax.tree.map(np.array, state)
        places = jax.tree.map(lambda x: x.sharding, state)
        state, later = run(whole, state, 5)
        found += later
        samples = (tmp_path / batches.SAMPLES).read_text(encoding="utf-8")

        again = source(folder=tmp_path, reference=reference, **how)
        again.set_state(saved)
        assert len((tmp_path / batches.SAMPLES).read_text(encoding="utf-8").splitlines()) == 4  # of rollout 0
        continued, repeated = run(again, jax.device_put(kept, places), 5)
    assert same([b for b, _ in repeated], [b for b, _ in later]) and same(continued, state)
    assert (tmp_path / batches.SAMPLES).read_text(encoding="utf-8") == samples
    assert again.get_state() == whole.get_state()
    assert (engine._generate_batch._cache_size(), batches._batch_logps._cache_size()) == compiled

    first, _, epoch2 = found[0], found[1], found[2]
    assert set(first[0].columns) == {"advantages", "old_logps", "ref_logps"}
    assert same(first[0], epoch2[0]) and not same(first[0], found[4][0])  # two epochs of two batches, then new ones
    # On policy, and at the reference: the loss is 0 and nothing is clipped. Later neither holds.
    assert abs(first[1]["loss"]) < 1e-6 and first[1]["clip_ratio/region_mean"] == 0 and first[1]["kl"] < 1e-9
    assert abs(epoch2[1]["loss"]) > 1e-4 and found[4][1]["kl"] > 1e-6
    assert first[1]["time/rollout"] > 0 == epoch2[1]["time/rollout"]


def test_the_reference_of_a_model_with_adapters_is_itself_without_them():
    state = first_state(lora=True)
    batch, _ = source(lora=True, beta=0.1, epochs_per_rollout=2).next(state)
    plain, params = definition(), state.base
    with jax.set_mesh(mesh()):
        expected = batches._batch_logps(
            plain, params, jax.tree.map(np.asarray, _bare(batch)), np.float32(SIZES["temperature"]), 1
        )
    np.testing.assert_allclose(batch.columns["ref_logps"], expected, atol=2e-6)
    assert np.abs(np.asarray(batch.columns["old_logps"]) - expected).max() > 1e-3


def _bare(batch):
    fields = {name: getattr(batch, name) for name in batches.FIELDS}
    return type(batch)(**fields)


def test_two_processes_of_four_devices_do_what_one_device_does():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = [sys.executable, str(Path(__file__).with_name("rl_on_mesh.py"))]
    commands = [["1", ""], *(["4", "fsdp:4,tensor:2", process, "2", port] for process in "01")]
    running = [subprocess.Popen([*script, *command], stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        one, *two = (json.loads(process.communicate(timeout=540)[0].splitlines()[-1]) for process in running)
    finally:
        for process in running:
            process.kill()
    assert two[0] == two[1] and two[0]["tokens"] == one["tokens"]
    for found, expected in zip(two[0]["updates"], one["updates"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=2e-6)


# ------------------------------------------------------------ groups that teach nothing, answers that do not count


def test_groups_of_one_reward_are_counted_and_teach_nothing():
    batch, metrics = source(rewards=f"{HERE}:constant").next(first_state())
    assert metrics["frac_reward_zero_std"] == 1 and not np.asarray(batch.columns["advantages"]).any()
    assert np.asarray(batch.loss_mask).any(1).all()  # they count in the denominators, as in GRPO


def test_dynamic_sampling_asks_again():
    changes = {"algorithm": "dapo", "rewards": f"{HERE}:only_sums_differ", "dynamic_sampling_rounds": 20}
    a = source(**changes)
    batch, metrics = a.next(first_state())
    asked = [tokenizer().decode(row[:4]) for row in np.asarray(batch.tokens)]
    assert all("+" in text for text in asked) and metrics["dynamic_sampling/unfilled"] == 0
    assert metrics["dynamic_sampling/rounds"] >= 1 and a._requests == 8 * metrics["dynamic_sampling/rounds"]
    limited = source(**changes | {"rewards": f"{HERE}:constant", "dynamic_sampling_rounds": 2})
    batch, metrics = limited.next(first_state())
    assert metrics["dynamic_sampling/rounds"] == metrics["dynamic_sampling/unfilled"] == 2
    assert not np.asarray(batch.loss_mask).any()  # what is missing counts nowhere


def test_truncated_completions_are_masked_by_choice():
    batch, metrics = source(mask_truncated_completions=True).next(first_state())
    trained = np.asarray(batch.loss_mask).any(1)
    assert metrics["completions/clipped_ratio"] == 1 - trained.mean() > 0
    for row in np.flatnonzero(trained):
        assert completion_of(batch, row)[-1] in (5, 77, 200)


def test_overlong_penalty_is_part_of_the_reward():
    plain, shaped = (source(rewards=f"{HERE}:constant", **more) for more in ({}, {"overlong_buffer": 4}))
    (batch, before), (_, after) = plain.next(first_state()), shaped.next(first_state())
    lengths = np.asarray(batch.loss_mask).sum(1)
    assert after["reward"] == pytest.approx(before["reward"] - np.clip((lengths - 4) / 4, 0, 1).mean())


def test_answers_on_which_a_reward_fails_are_left_out_and_counted(tmp_path):
    with pytest.raises(UserError, match=r"^arithmetic row \d+: the reward .*fails_on_odd failed: ZeroDivisionError"):
        source(rewards=f"{HERE}:fails_on_odd").next(first_state())
    how = {"rewards": f"{HERE}:fails_on_odd", "on_reward_error": "skip", "advantage": "group_mean"}
    batch, metrics = source(folder=tmp_path, **how).next(first_state())
    trained, advantages = np.asarray(batch.loss_mask).any(1), np.asarray(batch.columns["advantages"])[:, 0]
    assert metrics["rewards/failed"] == 8 - trained.sum() > 0
    np.testing.assert_allclose(advantages.reshape(2, 4).sum(1), 0, atol=1e-5)
    assert not advantages[~trained].any()
    lines = [json.loads(line) for line in (tmp_path / batches.SAMPLES).read_text(encoding="utf-8").splitlines()]
    assert len([line for line in lines if "problem" in line]) == metrics["rewards/failed"]
    assert {"prompt", "completion", "answer", "reward", "rewards", "truncated"} <= set(lines[0])


def test_evaluation_is_repeatable_and_does_not_touch_the_training():
    a, params = source(), first_state().params
    metrics, answers = evaluate(a._answerer, params, prompts()[:5])
    compiled = engine._generate_batch._cache_size()
    again, _ = evaluate(a._answerer, params, prompts()[:5])
    assert metrics == again and len(answers.answered) == 5
    evaluate(a._answerer, params, prompts()[:11])  # another number of prompts is the same program
    assert engine._generate_batch._cache_size() == compiled
    assert same(a.next(first_state())[0], source().next(first_state())[0])


def test_what_cannot_work_is_refused_before_anything_is_generated():
    with pytest.raises(UserError, match="arithmetic row 1: the reward reasoning_gym needs entry"):
        source(rewards="reasoning_gym")
    long = prompts()[0]._replace(ids=[1] * 9)
    with pytest.raises(UserError, match="prompt 0 has 9 tokens; this engine reads 8"):
        evaluate(source()._answerer, first_state().params, [long])
