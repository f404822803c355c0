# SPDX-License-Identifier: Apache-2.0
"""A recipe's part of a run: how its data are read, where batches come from, what its evaluation measures.

`Run` (session.py) does everything else and does not ask which recipe it is. One class per kind of data:

    load_data   before the weights are there
    prepare     when they are: columns that a model computes, a teacher, a reference
    source      the updates' batches
    evaluate    the held-out examples
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp

from maxkit import build
from maxkit.checkpoint import load
from maxkit.config import BYTE_VOCABULARY, Distill, Dpo, Grpo, Pretrain, RecipeConfig, Sft
from maxkit.data.build import ChatData, PreferenceData, TextData, chat_rows, preference_rows, text_rows
from maxkit.data.config import DataConfig
from maxkit.data.report import RowReport
from maxkit.data.tokenizer import Tokenizer, train_bpe
from maxkit.errors import UserError
from maxkit.rl.answers import Answerer, sample_row
from maxkit.rl.answers import evaluate as evaluate_answers
from maxkit.rl.batches import RolloutBatches
from maxkit.rl.prompts import Prompt, Prompts, load_prompts
from maxkit.rl.rollout import EngineRollout
from maxkit.run.batches import RowBatches
from maxkit.run.columns import kept_columns, reference_logps, rows_digest, teacher_columns
from maxkit.train.loop import BatchSource
from maxkit.types import Tree

if TYPE_CHECKING:
    from maxkit.run.session import Run

SAMPLES = 8  # answers that an evaluation shows


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the held-out examples say: metrics by name, over `count` trained tokens or generated answers.

    samples: the first of the generated answers, as `rl.answers.sample_row` writes them.
    """

    metrics: dict[str, float]
    count: int
    samples: tuple[dict[str, Any], ...] = dataclasses.field(default=(), kw_only=True)

    @property
    def loss(self) -> float:
        """The mean loss: nats per trained token for next-token prediction, else the objective's own."""
        return self.metrics["loss"]

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


class Task(Protocol):
    """What `Run` asks of a recipe. `headline` is the metric of its evaluation that the figures follow."""

    headline: str

    def load_data(self, run: "Run") -> tuple[Any, Tokenizer]:
        """The data, with a `.report`, and the tokenizer they were read with."""

    def prepare(self, run: "Run") -> None:
        """Called when `run.state` is there, before `source`; may set `run.frozen`."""

    def source(self, run: "Run") -> BatchSource:
        """Where the batches come from."""

    def digest(self, run: "Run") -> str:
        """Of the examples: a continued run refuses others."""

    def evaluate(self, run: "Run", params: Tree) -> Evaluation:
        """What the held-out examples say of `params`."""


@dataclasses.dataclass(frozen=True)
class NextTokenTask:
    """Rows that are made once, by `read`: text or conversations."""

    read: Callable[["Run", Tokenizer | None], tuple[ChatData | TextData, Tokenizer]]
    headline = "loss"

    def load_data(self, run: "Run") -> tuple[ChatData | TextData, Tokenizer]:
        """Read, encode, split and pack."""
        source = run.blueprint.source
        return self.read(run, source.tokenizer() if source is not None else None)

    def prepare(self, run: "Run") -> None:
        """Rows need no weights."""

    def source(self, run: "Run") -> BatchSource:
        """The training rows."""
        return row_source(run)

    def digest(self, run: "Run") -> str:
        """Of the training rows."""
        return rows_digest(run.data.train)

    def evaluate(self, run: "Run", params: Tree) -> Evaluation:
        """Mean negative log-likelihood of the held-out rows, in nats per trained token."""
        found = run.evaluate_rows(run.data.held_out, params)
        metrics = dict(found.metrics)
        # Balance terms belong to training; what is compared is the likelihood.
        return dataclasses.replace(found, metrics=metrics | {"loss": metrics.pop("loss/nll")})


def read_text(run: "Run", tokenizer: Tokenizer | None) -> tuple[TextData, Tokenizer]:
    """Plain text; a model that has no tokenizer gets one that is trained here."""
    cfg = run.cfg
    assert isinstance(cfg, Pretrain)
    data = text_rows(cfg, seed=cfg.seed, tokenizer=tokenizer, vocab_size=None if tokenizer else cfg.vocab_size)
    return data, data.tokenizer


def read_chat(run: "Run", tokenizer: Tokenizer | None) -> tuple[ChatData, Tokenizer]:
    """Conversations, of which the assistant's part is trained."""
    tokenizer = needed(run, tokenizer)
    assert isinstance(run.cfg, DataConfig)
    return chat_rows(run.cfg, tokenizer, seed=run.cfg.seed), tokenizer


def needed(run: "Run", tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of a recipe that cannot do without.

    Raises:
        UserError: the model has none.
    """
    if tokenizer is None:
        raise UserError(f"model={run.cfg.model!r} has no tokenizer: a chat model needs one with a chat template")
    return tokenizer


def row_source(run: "Run") -> RowBatches:
    """The training rows in the order that the recipe's seed and `shuffle` say."""
    cfg = run.cfg
    return RowBatches(run.data.train, run.place, batch_size=cfg.batch_size, seed=cfg.seed, shuffle=cfg.shuffle)


class PreferenceTask:
    """Pairs of answers. A reference's log-probs are computed once, before the first update, and kept in the folder."""

    headline = "rewards/margins"

    def load_data(self, run: "Run") -> tuple[PreferenceData, Tokenizer]:
        """Read, encode, split and pack the pairs."""
        cfg, source = run.cfg, run.blueprint.source
        assert isinstance(cfg, Dpo)
        tokenizer = needed(run, source.tokenizer() if source is not None else None)
        return preference_rows(cfg, tokenizer, seed=cfg.seed, limit=cfg.limit, swap=cfg.swap_labels), tokenizer

    def prepare(self, run: "Run") -> None:
        """Add the column `ref_logps` to the rows of both splits, where the loss has a reference."""
        if "ref_logps" in build.batch_columns(run.cfg):
            splits = {"train": run.data.train, "held_out": run.data.held_out}
            columns = kept_columns(run, "reference", splits, lambda rows: {"ref_logps": reference_logps(run, rows)})
            for name, rows in splits.items():
                rows.columns |= columns[name]

    def source(self, run: "Run") -> BatchSource:
        """The training pairs."""
        return row_source(run)

    def digest(self, run: "Run") -> str:
        """Of the tokens of the training pairs."""
        return rows_digest(run.data.train)

    def evaluate(self, run: "Run", params: Tree) -> Evaluation:
        """Loss, margins and accuracy on the held-out pairs."""
        return run.evaluate_rows(run.data.held_out, params)


class DistillTask:
    """Conversations, and a teacher: in every update, or its likeliest tokens once."""

    headline = "kl"

    def load_data(self, run: "Run") -> tuple[ChatData, Tokenizer]:
        """Read, encode, split and pack.

        Raises:
            UserError: an id means one token to the teacher and another to the student.
        """
        source, teacher = run.blueprint.source, run.blueprint.teacher
        tokenizer = source.tokenizer() if source is not None else None
        assert isinstance(run.cfg, Distill) and teacher is not None
        if tokenizer is not None and run.cfg.teacher != run.cfg.model:
            check_same_tokens(run.cfg, tokenizer, teacher.source.tokenizer())
        return read_chat(run, tokenizer)

    def prepare(self, run: "Run") -> None:
        """Load the teacher; with `teacher_top_k`, add its columns to the rows and let it go."""
        cfg, teacher = run.cfg, run.blueprint.teacher
        assert isinstance(cfg, Distill) and teacher is not None
        read = lambda: load.read_params(teacher.source, teacher.definition, run.mesh, report=run.report)  # noqa: E731
        if not cfg.teacher_top_k:
            run.frozen = read()
            return
        splits = {"train": run.data.train, "held_out": run.data.held_out}
        columns = kept_columns(run, "teacher", splits, functools.partial(teacher_columns, run, functools.cache(read)))
        for name, rows in splits.items():
            rows.columns |= columns[name]

    def source(self, run: "Run") -> BatchSource:
        """The training rows."""
        return row_source(run)

    def digest(self, run: "Run") -> str:
        """Of the tokens of the training rows."""
        return rows_digest(run.data.train)

    def evaluate(self, run: "Run", params: Tree) -> Evaluation:
        """Divergence from the teacher and likelihood on the held-out rows."""
        return run.evaluate_rows(run.data.held_out, params)


def check_same_tokens(cfg: Distill, student: Tokenizer, teacher: Tokenizer | None) -> None:
    """Refuse vocabularies of one size that are not the same; a teacher without a tokenizer is believed.

    Raises:
        UserError: names the first id that differs.
    """
    ours = {number: text for text, number in student.backend.get_vocab(with_added_tokens=True).items()}
    theirs = ours if teacher is None else {n: t for t, n in teacher.backend.get_vocab(with_added_tokens=True).items()}
    differing = sorted(number for number in ours.keys() | theirs.keys() if ours.get(number) != theirs.get(number))
    if differing:
        first = differing[0]
        raise UserError(
            f"teacher={cfg.teacher} and model={cfg.model} have different vocabularies: token {first} is "
            f"{theirs.get(first)!r} to the teacher and {ours.get(first)!r} to the student ({len(differing)} differ in "
            "all); distillation compares token by token, and needs one tokenizer"
        )


@dataclasses.dataclass(frozen=True)
class RolloutData:
    """Prompts to train on and to test with, and what answers and judges them."""

    train: list[Prompt]
    held_out: list[Prompt]
    report: RowReport
    answerer: Answerer


class PolicyTask:
    """Prompts that the model answers itself; the evaluation answers held-out prompts greedily."""

    headline = "reward"

    def load_data(self, run: "Run") -> tuple[RolloutData, Tokenizer]:
        """Read and encode the prompts; check rewards and lengths. A model that is built here reads bytes."""
        cfg, source = run.cfg, run.blueprint.source
        assert isinstance(cfg, Grpo)
        if source is None:
            tokenizer = train_bpe([], BYTE_VOCABULARY)
        else:
            tokenizer = needed(run, source.tokenizer())
        prompts = load_prompts(
            cfg.dataset,
            tokenizer,
            max_prompt_length=cfg.prompt_limit,
            seed=cfg.seed,
            holdout_fraction=cfg.holdout_fraction,
            prompt_format=cfg.prompt_format,
            deduplicate=cfg.deduplicate,
        )
        ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        answerer = Answerer(cfg, EngineRollout.of(cfg, run.definition, ends, run.mesh), tokenizer)
        return RolloutData(prompts.train, prompts.held_out, prompts.report, answerer), tokenizer

    def prepare(self, run: "Run") -> None:
        """Refuse a model without any weights, which would never be right.

        Raises:
            UserError: it was to imitate examples first, and did not.
        """
        assert isinstance(run.cfg, Grpo)
        if run.blueprint.source is None and run.cfg.imitation_steps:
            raise UserError("the model has no weights yet: maxkit.run.imitate(run) comes first, or imitation_steps=0")

    def source(self, run: "Run") -> BatchSource:
        """Rollouts; with `beta`, full weights keep a copy of the first ones as the reference."""
        data, reference = run.data, None
        assert isinstance(run.cfg, Grpo)
        if run.cfg.beta and run.definition.lora is None:
            # The step donates the state's arrays, so the reference needs its own.
            reference = run.initial_params() if run.steps_done else jax.tree.map(jnp.copy, run.params)
        return RolloutBatches(
            data.answerer,
            data.train,
            run.definition,
            run.place,
            mesh=run.mesh,
            reference=reference,
            folder=run.folder,
        )

    def digest(self, run: "Run") -> str:
        """Of the training prompts."""
        return Prompts(run.data.train, run.data.held_out, run.data.report).digest()

    def evaluate(self, run: "Run", params: Tree) -> Evaluation:
        """Rewards and lengths of one greedy answer to each held-out prompt."""
        answerer = run.data.answerer
        metrics, answers = evaluate_answers(answerer, params, run.data.held_out)
        samples = tuple(sample_row(answerer, one) for one in answers.answered[:SAMPLES])
        return Evaluation(metrics, len(answers.answered), samples=samples)


TASKS: dict[type[RecipeConfig], Task] = {
    Pretrain: NextTokenTask(read_text),
    Sft: NextTokenTask(read_chat),
    Dpo: PreferenceTask(),
    Grpo: PolicyTask(),
    Distill: DistillTask(),
}
