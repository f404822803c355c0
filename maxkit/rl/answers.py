# SPDX-License-Identifier: Apache-2.0
"""Prompts answered and judged: what training, evaluation and samples are made of.

Of several processes each generates all answers (one program over the mesh), process 0 judges them and tells the others:
so every process has the same numbers, also where a reward depends on the clock or on a service.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError
from maxkit.rl.config import RlConfig
from maxkit.rl.prompts import Prompt
from maxkit.rl.rewards import Answer, Reward, Scores, overlong_penalty, parse_rewards, reward_metrics, score
from maxkit.rl.rollout import Rollout
from maxkit.types import Tree

# Evaluations draw beyond the requests of any training run, so that neither changes the noise of the other.
FIRST_EVALUATION_REQUEST = 2**31


class Answered(NamedTuple):
    """One answer: its tokens with the stop token, their log-probs under the sampler, and what it is worth.

    values: every reward, NaN where it failed. reward: their weighted sum and the penalty for length, or NaN.
    """

    prompt: Prompt
    tokens: list[int]
    logps: np.ndarray
    stopped: bool
    text: str
    values: np.ndarray
    reward: float


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers in the order of their prompts, and one line for each reward that failed."""

    answered: list[Answered]
    problems: tuple[str, ...]


class Answerer:
    """Generates with a rollout and judges with the rewards of a config."""

    def __init__(self, cfg: RlConfig, rollout: Rollout, tokenizer: Tokenizer) -> None:
        """Raises UserError for rewards that cannot be read (`parse_rewards`)."""
        self.cfg, self.rollout, self.tokenizer = cfg, rollout, tokenizer
        self.rewards: tuple[Reward, ...] = parse_rewards(cfg.rewards)

    def __call__(
        self, params: Tree, prompts: Sequence[Prompt], *, first_request: int, temperature: float | None = None
    ) -> Answers:
        """One answer to each prompt; `temperature` None is the config's.

        Raises:
            UserError: a reward failed and the config says stop; or the rollout refuses something.
        """
        cfg = self.cfg
        done = self.rollout.generate(
            params,
            [prompt.ids for prompt in prompts],
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature if temperature is None else temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            seed=cfg.seed,
            first_request=first_request,
        )
        texts = [self.tokenizer.decode(tokens, skip_special=True) for tokens in done.tokens]
        answers = [
            Answer(
                {
                    **prompt.columns,
                    "prompt": prompt.text,
                    "completion": text,
                    "num_tokens": len(tokens),
                    "truncated": not stopped,
                },
                prompt.place,
            )
            for prompt, text, tokens, stopped in zip(prompts, texts, done.tokens, done.stopped, strict=True)
        ]
        scores = self._scores(answers)
        rewards = scores.totals + overlong_penalty(
            done.lengths,
            max_new_tokens=cfg.max_new_tokens,
            buffer=cfg.overlong_buffer,
            penalty=cfg.overlong_penalty,
        )
        rows = zip(prompts, done.tokens, done.logps, done.stopped, texts, scores.values, rewards, strict=True)
        return Answers(
            [Answered(p, t, logps, bool(s), text, v, float(r)) for p, t, logps, s, text, v, r in rows], scores.problems
        )

    def _scores(self, answers: Sequence[Answer]) -> Scores:
        if jax.process_count() == 1:
            return score(self.rewards, answers, self.cfg.on_reward_error)
        from jax.experimental import multihost_utils

        scores, problem = None, None
        values = np.zeros((len(answers), len(self.rewards) + 1))
        if jax.process_index() == 0:
            try:
                scores = score(self.rewards, answers, self.cfg.on_reward_error)
                values = np.column_stack([scores.values, scores.totals])
            except UserError as error:
                problem = error
        # As whole numbers: JAX would round float64.
        bits, failed = multihost_utils.broadcast_one_to_all((values.view(np.uint32), np.int32(problem is not None)))
        if failed:
            raise problem or UserError("a reward failed: the message of process 0 says which")
        values = np.asarray(bits).view(np.float64)
        return Scores(values[:, :-1], values[:, -1], scores.problems if scores else ())


def answer_metrics(rewards: Sequence[Reward], answered: Sequence[Answered]) -> dict[str, float]:
    """Means over answers, named as in TRL 1.10: `reward`, `rewards/<name>/mean` and `/std`, `completions/...`.

    Lengths are in tokens, with the stop token; `terminated` are the answers that ended with one, `clipped_ratio` is
    the share of the others. Answers on which a reward failed are in `rewards/failed` and in no mean of rewards.
    """
    totals = np.asarray([one.reward for one in answered])
    scores = Scores(np.stack([one.values for one in answered]), totals)
    lengths = np.asarray([len(one.tokens) for one in answered], np.float64)
    stopped = np.asarray([one.stopped for one in answered])
    good = totals[np.isfinite(totals)]
    return {
        "reward": float(good.mean()) if len(good) else 0.0,
        **reward_metrics(rewards, scores),
        **_spread("completions/{}_length", lengths),
        **_spread("completions/{}_terminated_length", lengths[stopped]),
        "completions/clipped_ratio": float(1 - stopped.mean()),
    }


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean, min and max; 0 where there is no value."""
    found = {"mean": values.mean(), "min": values.min(), "max": values.max()} if len(values) else {}
    return {name.format(kind): float(found.get(kind, 0.0)) for kind in ("mean", "min", "max")}


def evaluate(
    answerer: Answerer, params: Tree, prompts: Sequence[Prompt], *, temperature: float = 0.0
) -> tuple[dict[str, float], Answers]:
    """One answer to each prompt, greedy by default: `answer_metrics` and the answers themselves.

    The same prompts and parameters give the same answers, whatever was trained or evaluated before.
    """
    answers = answerer(params, prompts, first_request=FIRST_EVALUATION_REQUEST, temperature=temperature)
    return answer_metrics(answerer.rewards, answers.answered), answers


def sample_row(answerer: Answerer, one: Answered, **more: Any) -> dict[str, Any]:
    """An answer as a JSON object: prompt, reference, completion, rewards."""
    values = {r.name: _number(v) for r, v in zip(answerer.rewards, one.values, strict=True)}
    return {
        **more,
        "prompt": one.prompt.text,
        "answer": one.prompt.columns.get("answer"),
        "completion": one.text,
        "num_tokens": len(one.tokens),
        "truncated": not one.stopped,
        "rewards": values,
        "reward": _number(one.reward),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
