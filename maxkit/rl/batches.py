# SPDX-License-Identifier: Apache-2.0
"""Batches out of rollouts: prompts -> answers -> rewards -> advantages -> rows -> updates.

`RolloutBatches` is a `BatchSource` (`train/loop.py`): asked for the next update's batch, it generates with the state it
is given, or hands out the next part of the rollout it has. Every process holds the whole rollout and puts its own rows
on the mesh. Next to read: `answers.py`, `objectives/policy.py`.
"""

import base64
import contextlib
import dataclasses
import functools
import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maxkit import mesh as meshes
from maxkit.errors import UserError
from maxkit.models.definition import ModelDefinition
from maxkit.objectives.forward import score as score_batch
from maxkit.rl import advantages
from maxkit.rl.answers import FIRST_EVALUATION_REQUEST, Answered, Answerer, Answers, answer_metrics, sample_row
from maxkit.rl.prompts import Prompt
from maxkit.rl.rewards import check_rewards
from maxkit.types import Batch, TrainState, Tree

SAMPLES = "completions.jsonl"
FIELDS = ("tokens", "targets", "loss_mask", "segment_ids", "positions")  # of a batch; the rest are its columns
ADVANTAGES = {
    "group_std": advantages.group_std,
    "group_mean": advantages.group_mean,
    "leave_one_out": advantages.leave_one_out,
}

Group = list[Answered]


class Place(Protocol):
    """Puts a process's rows on the mesh. It has the index-th of `count` equal parts of every batch."""

    index: int
    count: int

    def __call__(self, rows: dict[str, np.ndarray]) -> Batch:
        """Names that are no field of a batch become its columns."""


@dataclasses.dataclass
class Sequences:
    """A rollout as arrays of N sequences, right-padded to T tokens.

    tokens [N, T] int32; prompt_lengths, lengths [N] int32, of the prompt and of all; trained [N] bool; advantages [N]
    float32; old_logps, ref_logps [N, T] float32 or None, at the place of the token before, as `Batch.columns` has them.
    """

    tokens: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    advantages: np.ndarray
    old_logps: np.ndarray | None = None
    ref_logps: np.ndarray | None = None

    @property
    def completion_mask(self) -> np.ndarray:
        """[N, T] float32: 1 where the target is a token of the completion."""
        at = np.arange(self.tokens.shape[1])
        return ((at >= self.prompt_lengths[:, None] - 1) & (at < self.lengths[:, None] - 1)).astype(np.float32)

    def rows(self) -> dict[str, np.ndarray]:
        """The fields and columns of a batch, [N, T] each."""
        at = np.arange(self.tokens.shape[1], dtype=np.int32)
        real = (at < self.lengths[:, None]).astype(np.int32)
        mask = self.completion_mask * self.trained[:, None].astype(np.float32)
        rows = {
            "tokens": self.tokens,
            "targets": np.pad(self.tokens[:, 1:], ((0, 0), (0, 1))),
            "loss_mask": mask,
            "segment_ids": real,
            "positions": at * real,
            "advantages": self.advantages[:, None] * real.astype(np.float32),
        }
        given = {"old_logps": self.old_logps, "ref_logps": self.ref_logps}
        return rows | {name: value * mask for name, value in given.items() if value is not None}


class RolloutBatches:
    """The updates of one rollout after the other.

    Metrics of an update are those of its rollout, with TRL's names: `answer_metrics`, `reward_std` (mean over groups),
    `frac_reward_zero_std`, `num_tokens` (generated and read so far), `sampling/sampling_logp_difference/mean` and `max`
    (nats, sampler against trainer, per token), `sampling/importance_sampling_ratio/min`, `mean` and `max`; and
    `dynamic_sampling/rounds` and `/unfilled` (groups that are not trained on, because the rounds were used up). They
    cover everything that was generated, also what dynamic sampling left out. `time/rollout` are the seconds that this
    update spent on generating, 0 inside a rollout.
    """

    def __init__(
        self,
        answerer: Answerer,
        prompts: Sequence[Prompt],
        definition: ModelDefinition,
        place: Place,
        *,
        mesh: Mesh | None = None,
        reference: Tree | None = None,
        folder: Path | None = None,
    ) -> None:
        """Everything else is said by `answerer.cfg`.

        reference: weights whose log-probs `beta` holds on to, in arrays of their own (the step donates the state's);
        None for a model with adapters, whose reference is itself without them. folder: process 0 writes samples into
        `completions.jsonl` there; None writes none.

        Raises:
            UserError: a prompt lacks what a reward needs; truncated answers shall be masked, but nothing ends one.
        """
        self.cfg, self._answerer, self._prompts = answerer.cfg, answerer, list(prompts)
        self._definition, self._place, self._mesh, self._reference = definition, place, mesh, reference
        assert reference is not None or definition.lora is not None or not self.cfg.beta, "beta needs a reference"
        assert self._prompts, "no prompts"
        for prompt in self._prompts:
            check_rewards(answerer.rewards, list(prompt.columns), prompt.place)
        if self.cfg.mask_truncated_completions and answerer.tokenizer.eos_id is None:
            raise UserError("mask_truncated_completions=true, but the tokenizer has no token that ends an answer")
        self._folder = folder if jax.process_index() == 0 else None
        self._drawn = self._rollouts = self._requests = self._num_tokens = 0
        self._given = 0  # updates of the rollout in hand
        self._sequences: Sequences | None = None
        self._metrics: dict[str, float] = {}

    # ------------------------------------------------------------ BatchSource

    def next(self, state: TrainState) -> tuple[Batch, dict[str, float]]:
        """The next update's batch, of `batch_size` sequences, and the metrics of its rollout.

        Raises:
            UserError: a reward failed and on_reward_error is stop.
        """
        seconds = 0.0
        if self._sequences is None:
            start = time.perf_counter()
            with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
                self._sequences, self._metrics = self._rollout(state)
            self._given, seconds = 0, time.perf_counter() - start
        size = self.cfg.batch_size
        own = size // self._place.count
        first = self._given % self.cfg.batches_per_rollout * size + self._place.index * own
        rows = {name: value[first : first + own] for name, value in self._sequences.rows().items()}
        self._given += 1
        if self._given == self.cfg.updates_per_rollout:
            self._sequences = None
        return self._place(rows), {**self._metrics, "time/rollout": seconds}

    def get_state(self) -> dict[str, Any]:
        """Position of the prompts, numbers of rollouts and requests, and the rollout in hand, as JSON values."""
        counts = {"drawn": self._drawn, "rollouts": self._rollouts, "requests": self._requests}
        counts |= {"num_tokens": self._num_tokens, "given": self._given}
        if self._sequences is None:
            return {**counts, "sequences": None, "metrics": {}}
        arrays = {field.name: getattr(self._sequences, field.name) for field in dataclasses.fields(Sequences)}
        packed = {name: None if array is None else _packed(array) for name, array in arrays.items()}
        return {**counts, "sequences": packed, "metrics": self._metrics}

    def set_state(self, value: dict[str, Any]) -> None:
        """Go on after what `get_state` described: with the rest of that rollout, then with the next prompts."""
        self._drawn, self._rollouts, self._requests = value["drawn"], value["rollouts"], value["requests"]
        self._num_tokens, self._given, self._metrics = value["num_tokens"], value["given"], dict(value["metrics"])
        packed = value["sequences"]
        self._sequences = None
        if packed is not None:
            self._sequences = Sequences(**{name: None if x is None else _unpacked(x) for name, x in packed.items()})
        self._forget_samples()

    # ------------------------------------------------------------ one rollout

    def _rollout(self, state: TrainState) -> tuple[Sequences, dict[str, float]]:
        params = self._definition.join(state.params, state.base)
        groups, generated, counts = self._groups(params)
        metrics = answer_metrics(self._answerer.rewards, [one for group in generated for one in group])
        deviations = [np.std(good, ddof=1) if len(good := _rewards(group)) > 1 else 0.0 for group in generated]
        metrics["reward_std"] = float(np.mean(deviations))
        metrics["frac_reward_zero_std"] = float(np.mean([_is_flat(group) for group in generated]))
        metrics |= counts | {"num_tokens": float(self._num_tokens)}
        sequences = self._as_sequences(groups)
        logps = self._logps(params, sequences)
        metrics |= _sampling_metrics(sequences, logps, [one.logps for group in groups for one in group])
        if self.cfg.updates_per_rollout > 1:
            sequences.old_logps = logps
        if self.cfg.beta:
            sequences.ref_logps = self._logps(self._reference_params(state), sequences)
        self._rollouts += 1
        return sequences, metrics

    def _groups(self, params: Tree) -> tuple[list[Group], list[Group], dict[str, float]]:
        """(groups to train on, all that were generated, counts): rounds until enough groups teach something."""
        cfg = self.cfg
        wanted = cfg.rollout_size // cfg.num_generations
        dynamic, limit = cfg.choice("dynamic_sampling"), cfg.dynamic_sampling_rounds
        generated: list[Group] = []
        useful: list[Group] = []
        rounds = 0
        while rounds == 0 or (dynamic and len(useful) < wanted and rounds < limit):
            rounds += 1
            new = self._round(params, wanted, rounds)
            generated += new
            useful += [group for group in new if not (dynamic and _is_flat(group))]
        # What is missing is filled up with groups from which nothing is learnt; they are masked.
        flat = [group for group in generated if _is_flat(group)]
        unfilled = max(wanted - len(useful), 0)
        chosen = [*useful[:wanted], *flat[:unfilled]]
        return chosen, generated, {"dynamic_sampling/rounds": float(rounds), "dynamic_sampling/unfilled": unfilled}

    def _round(self, params: Tree, wanted: int, number: int) -> list[Group]:
        size = self.cfg.num_generations
        prompts = [prompt for prompt in self._draw(wanted) for _ in range(size)]
        if self._requests + len(prompts) > FIRST_EVALUATION_REQUEST:
            raise UserError(f"{self._requests} answers were generated, no noise is left that was not used: new run_dir")
        answers = self._answerer(params, prompts, first_request=self._requests)
        self._requests += len(prompts)
        self._num_tokens += sum(len(one.prompt.ids) + len(one.tokens) for one in answers.answered)
        groups = [answers.answered[at : at + size] for at in range(0, len(prompts), size)]
        self._write_samples(answers, groups, number)
        return groups

    def _draw(self, count: int) -> list[Prompt]:
        """The next prompts: all once in an order of the epoch's own, then all again."""
        drawn = []
        for number in range(self._drawn, self._drawn + count):
            epoch, at = divmod(number, len(self._prompts))
            drawn.append(
                self._prompts[_order(len(self._prompts), self.cfg.seed, epoch)[at] if self.cfg.shuffle else at]
            )
        self._drawn += count
        return drawn

    def _as_sequences(self, groups: Sequence[Group]) -> Sequences:
        cfg, answered = self.cfg, [one for group in groups for one in group]
        tokens = np.zeros((len(answered), cfg.seq_len), np.int32)
        for row, one in enumerate(answered):
            ids = [*one.prompt.ids, *one.tokens]
            tokens[row, : len(ids)] = ids
        values, trained = zip(*(self._advantages(group) for group in groups), strict=True)
        kept = [one.stopped or not cfg.mask_truncated_completions for one in answered]
        prompt_lengths = np.asarray([len(one.prompt.ids) for one in answered], np.int32)
        return Sequences(
            tokens=tokens,
            prompt_lengths=prompt_lengths,
            lengths=prompt_lengths + np.asarray([len(one.tokens) for one in answered], np.int32),
            trained=np.concatenate(trained) & np.asarray(kept),
            advantages=np.concatenate(values).astype(np.float32),
        )

    def _advantages(self, group: Group) -> tuple[np.ndarray, np.ndarray]:
        """(advantages, whether to train) of a group; answers on which a reward failed are as if never given."""
        good = np.isfinite([one.reward for one in group])
        values = np.zeros(len(group))
        if self.cfg.choice("dynamic_sampling") and _is_flat(group):
            return values, np.zeros(len(group), bool)
        if good.sum() < 2:  # nothing to compare with
            return values, np.zeros(len(group), bool)
        values[good] = ADVANTAGES[self.cfg.choice("advantage")](_rewards(group), int(good.sum()))
        return values, good

    # ------------------------------------------------------------ log-probs

    def _logps(self, params: Tree, sequences: Sequences) -> np.ndarray:
        """[N, T] float32 of the targets under `params`, by the trainer's own function; 0 outside of completions."""
        rows = sequences.rows() | {"loss_mask": sequences.completion_mask}
        size = self.cfg.batch_size // self.cfg.gradient_accumulation_steps
        found = []
        for at in range(0, len(sequences.tokens), size):
            fields: dict[str, Any] = {f: rows[f][at : at + size] for f in FIELDS}
            part = Batch(**fields)
            logps = _batch_logps(
                self._definition, params, part, np.float32(self.cfg.temperature), self.cfg.num_vocab_tiling
            )
            found.append(np.asarray(logps))
        return np.concatenate(found)

    def _reference_params(self, state: TrainState) -> Tree:
        if self._reference is not None:
            return self._reference
        # Adapters of zeros add exactly nothing, and the program is the one that is compiled already.
        return self._definition.join(jax.tree.map(jnp.zeros_like, state.params), state.base)

    # ------------------------------------------------------------ samples

    def _write_samples(self, answers: Answers, groups: Sequence[Group], number: int) -> None:
        if self._folder is None:
            return
        place = {"rollout": self._rollouts, "round": number}
        # One answer of each of the first groups, or more of them where there are fewer groups.
        order = [group[at] for at in range(self.cfg.num_generations) for group in groups]
        lines = [sample_row(self._answerer, one, **place) for one in order[: self.cfg.num_completions_to_log]]
        lines += [{**place, "problem": problem} for problem in answers.problems]
        with open(self._folder / SAMPLES, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _forget_samples(self) -> None:
        """Drop the samples of rollouts that a continued run makes again."""
        path = None if self._folder is None else self._folder / SAMPLES
        if path is None or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that a killed run did not finish
                if json.loads(line)["rollout"] < self._rollouts:
                    kept.append(line + "\n")
        path.write_text("".join(kept), encoding="utf-8")


@functools.partial(jax.jit, static_argnums=(0, 4))
def _batch_logps(definition, params, batch: Batch, temperature, num_tiles):
    batch = jax.tree.map(lambda x: meshes.constrain(x, "BT"), batch)
    return meshes.replicate(
        score_batch(definition.merge(params), batch, num_tiles=num_tiles, temperature=temperature).logps
    )


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _rewards(group: Group) -> np.ndarray:
    """Those of the answers on which none failed."""
    rewards = np.asarray([one.reward for one in group])
    return rewards[np.isfinite(rewards)]


def _is_flat(group: Group) -> bool:
    """Whether nothing is learnt from a group: all its answers have one reward."""
    rewards = _rewards(group)
    return len(rewards) < 2 or bool(advantages.zero_variance(rewards, len(rewards))[0])


def _sampling_metrics(sequences: Sequences, logps: np.ndarray, sampled: Sequence[np.ndarray]) -> dict[str, float]:
    """How far the sampler's log-probs [of each completion] are from the trainer's [N, T]."""
    trainer = logps[sequences.completion_mask > 0]  # row by row, so in the order of `sampled`
    difference = trainer.astype(np.float64) - np.concatenate(sampled)
    ratio = np.exp(difference)
    return {
        "sampling/sampling_logp_difference/mean": float(np.abs(difference).mean()),
        "sampling/sampling_logp_difference/max": float(np.abs(difference).max()),
        "sampling/importance_sampling_ratio/min": float(ratio.min()),
        "sampling/importance_sampling_ratio/mean": float(ratio.mean()),
        "sampling/importance_sampling_ratio/max": float(ratio.max()),
    }


def _packed(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 1)).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def _unpacked(value: dict[str, Any]) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(value["data"]))
    return np.frombuffer(data, value["dtype"]).reshape(value["shape"])
