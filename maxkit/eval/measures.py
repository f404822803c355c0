# SPDX-License-Identifier: Apache-2.0
"""`evaluate`: tasks in, results out, with every item kept so that a number can be looked into.

Three measures: the likeliest option of a question, the perplexity of text in disjoint windows, and written answers that
a verifier checks. Next to read: `tasks.py` (what is asked), `likelihood.py` (how options are scored).
"""

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from maxkit.data.questions import Question, questions
from maxkit.data.report import RowReport
from maxkit.data.sources import documents
from maxkit.data.tokenizer import Tokenizer
from maxkit.data.verify import VERIFIERS
from maxkit.errors import UserError
from maxkit.eval.likelihood import Continuations, continuation_logps
from maxkit.eval.tasks import CHOICE, PERPLEXITY, Problem, Task, problems, unique_tasks
from maxkit.infer.engine import Engine
from maxkit.infer.generate import HasWeights, encode

Z_95 = 1.959963984540054  # the normal distribution has 95 % within so many standard deviations
BATCH_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A question, the log-likelihood of each option (nats, summed over its tokens), and their numbers of tokens."""

    question: Question
    prompt: str
    logps: tuple[float, ...]
    num_tokens: tuple[int, ...]

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Of the options among themselves: exp(logps), scaled to sum to 1."""
        shifted = np.exp(np.asarray(self.logps) - max(self.logps))
        return tuple((shifted / shifted.sum()).tolist())

    def best(self, lengths: Sequence[float] | None = None) -> int:
        """The option of the highest log-likelihood, divided by `lengths` where given; the first of several."""
        return int(np.argmax(np.asarray(self.logps) / (1.0 if lengths is None else np.asarray(lengths, float))))


@dataclasses.dataclass(frozen=True)
class Window:
    """A piece of text: its negative log-likelihood (nats, summed), and its tokens, UTF-8 bytes and words."""

    text: str
    nll: float
    tokens: int
    bytes: int
    words: int


@dataclasses.dataclass(frozen=True)
class Written:
    """A problem, what the model wrote, and whether its verifier accepts that."""

    problem: Problem
    text: str
    passed: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """What one task gave.

    metrics: {name: value}, see `choice_metrics`, `text_metrics`; written answers have `acc`. main: the one to quote.
    intervals: {name: (low, high)}, 95 %. chance: what guessing reaches in `acc`. report: the rows that were not used.
    """

    task: Task
    main: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    chance: float | None
    items: tuple[Any, ...]
    report: RowReport
    seconds: float

    @property
    def value(self) -> float:
        """The metric to quote."""
        return self.metrics[self.main]

    def row(self) -> dict[str, Any]:
        """One row of a table."""
        low, high = self.intervals.get(self.main, (None, None))
        interval = None if low is None else f"{low:.3f} to {high:.3f}"
        named = {"task": self.task.name, "items": len(self.items), "metric": self.main}
        return {**named, "value": round(self.value, 4), "95 % interval": interval, "chance": self.chance}


def evaluate(
    loaded: HasWeights,
    tasks: Sequence[str | Task],
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    seq_len: int = 512,
) -> dict[str, Result]:
    """{task's name: result} for a model with its weights and tokenizer, in the order of `tasks`.

    Args:
        loaded: what `maxkit.load` returns, or `run.loaded` of a run.
        tasks: names out of `TASKS`, "MEASURE:DATASET", or `Task`s.
        limit: items of each task, from its beginning (questions, problems, windows of text); None takes all.
        batch_size: rows computed at a time; it changes no result beyond rounding.
        seq_len: tokens in a window of text.

    Checked against transformers 5.23.0 (log-likelihoods, `tests/oracle/test_eval.py`) and lm-eval 0.4.13 (accuracies,
    docs/evaluation.md).

    Raises:
        UserError: an unknown task, a model without tokenizer, a data set without usable items, scores that are not
            finite.
    """
    found = unique_tasks(list(tasks))
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.source} has no tokenizer: an evaluation turns text into tokens")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1, or None for all")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    measures = {CHOICE: _choice, PERPLEXITY: _perplexity}
    results = {}
    for task in found:
        start, report = time.perf_counter(), RowReport()
        settings = _Settings(limit, batch_size, seq_len)
        result = measures.get(task.measure, _written)(loaded, task, settings, report)
        results[task.name] = dataclasses.replace(result, seconds=time.perf_counter() - start)
    return results


@dataclasses.dataclass(frozen=True)
class _Settings:
    limit: int | None
    batch_size: int
    seq_len: int


# ---------------------------------------------------------------- multiple choice


def choice_metrics(items: Sequence[Chosen]) -> dict[str, float]:
    """Shares of the questions whose right option has the highest log-likelihood, with the names of lm-eval:

    acc: as it is; acc_norm: divided by the option's characters; acc_bytes: by its UTF-8 bytes; acc_tokens (not in
    lm-eval): by its tokens. The space before an option does not count. Of equal options the first wins.
    probability: mean probability of the right option among the options; it moves before an accuracy does.
    """

    def share(lengths: Callable[[Chosen], Sequence[float] | None]) -> float:
        return float(np.mean([item.best(lengths(item)) == item.question.answer for item in items]))

    return {
        "acc": share(lambda item: None),
        "acc_norm": share(lambda item: [len(option) for option in item.question.options]),
        "acc_bytes": share(lambda item: [len(option.encode()) for option in item.question.options]),
        "acc_tokens": share(lambda item: item.num_tokens),
        "probability": float(np.mean([item.probabilities[item.question.answer] for item in items])),
    }


def _choice(loaded: HasWeights, task: Task, settings: _Settings, report: RowReport) -> Result:
    limit = loaded.definition.config.max_seq_len
    kept: list[tuple[Question, str, Continuations]] = []
    for question in _first(settings.limit, questions(task.dataset, report)):
        prompt = task.prompt.format(question=question.question)
        encoded = _encoded(loaded.tokenizer, prompt, question.options)
        longest = len(encoded.context) + max(map(len, encoded.options))
        if not all(encoded.options) or not encoded.context:
            report.reject_kept("malformed", question.row, "the prompt or an option has no tokens", question.source)
        elif longest > limit:
            report.reject_kept("too_long", question.row, f"{longest} tokens, max_seq_len={limit}", question.source)
        else:
            kept.append((question, prompt, encoded))
    _need_items(task, kept, report)
    logps = continuation_logps(
        loaded.definition,
        loaded.params,
        [encoded for _, _, encoded in kept],
        batch_size=settings.batch_size,
        mesh=loaded.mesh,
    )
    items = tuple(
        Chosen(question, prompt, tuple(_sum(option) for option in found), tuple(len(option) for option in found))
        for (question, prompt, _), found in zip(kept, logps, strict=True)
    )
    for item in items:
        _need_finite(task, item.question.row, item.logps)
    metrics = choice_metrics(items)
    accuracies = [name for name in metrics if name.startswith("acc")]
    intervals = {name: wilson_interval(round(metrics[name] * len(items)), len(items)) for name in accuracies}
    chance = float(np.mean([1 / len(item.question.options) for item in items]))
    return Result(task, "acc_norm", metrics, intervals, chance, items, report, 0.0)


def _encoded(tokenizer: Tokenizer, prompt: str, options: Sequence[str]) -> Continuations:
    """The prompt's tokens, and for each option those that follow in the tokens of the whole text.

    White space at the prompt's end belongs to the options, as in lm-eval: a word's token begins with its space.
    """
    bare = prompt.rstrip()
    space = prompt[len(bare) :] or " "
    context, *wholes = tokenizer.encode_batch([bare, *(bare + space + option for option in options)])
    return Continuations(context, [whole[len(context) :] for whole in wholes])


# ---------------------------------------------------------------- perplexity


def text_metrics(items: Sequence[Window]) -> dict[str, float]:
    """From sums over all windows: nll (nats per token), perplexity (of tokens), and per byte and word of the text.

    bits_per_byte, byte_perplexity and word_perplexity do not depend on the tokenizer; words are separated by white
    space. With the names and definitions of lm-eval's rolling log-likelihood.
    """
    nll = math.fsum(item.nll for item in items)
    tokens, size, words = (sum(getattr(item, name) for item in items) for name in ("tokens", "bytes", "words"))
    return {
        "nll": nll / tokens,
        "perplexity": _exp(nll / tokens),
        "bits_per_byte": nll / size / math.log(2),
        "byte_perplexity": _exp(nll / size),
        "word_perplexity": _exp(nll / max(words, 1)),
    }


def _perplexity(loaded: HasWeights, task: Task, settings: _Settings, report: RowReport) -> Result:
    tokenizer, limit = loaded.tokenizer, loaded.definition.config.max_seq_len
    if not 2 <= settings.seq_len <= limit:
        raise UserError(f"seq_len={settings.seq_len}: a window has from 2 to max_seq_len={limit} tokens")
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise UserError(f"{loaded.source}: its tokenizer names neither bos nor eos, so a text has no beginning")
    texts = documents(task.dataset, report)
    pieces = (piece for text in texts for piece in windows(tokenizer, text, first, settings.seq_len))
    kept = list(_first(settings.limit, pieces))
    _need_items(task, kept, report)
    encoded = [encoded for _, encoded in kept]
    logps = continuation_logps(
        loaded.definition, loaded.params, encoded, batch_size=settings.batch_size, mesh=loaded.mesh
    )
    items = tuple(
        dataclasses.replace(window, nll=-_sum(found)) for (window, _), (found,) in zip(kept, logps, strict=True)
    )
    for number, item in enumerate(items, start=1):
        _need_finite(task, number, (item.nll,))
    return Result(task, "perplexity", text_metrics(items), {}, None, items, report, 0.0)


def windows(tokenizer: Tokenizer, text: str, first: int, seq_len: int) -> Iterator[tuple[Window, Continuations]]:
    """Yield pieces of `text` with up to `seq_len` tokens, each token in exactly one; their nll is not known yet.

    The first is read after the token `first`, every other one after the token before it; the last also sees what makes
    its row full. As `loglikelihood_rolling` of lm-eval does.
    """
    ids, spans = tokenizer.encode_with_offsets(text)
    word_starts = np.asarray([match.start() for match in re.finditer(r"\S+", text)])
    for begin in range(0, len(ids), seq_len):
        end = min(begin + seq_len, len(ids))
        context = [first] if begin == 0 else ids[max(end - seq_len - 1, 0) : begin]
        left = spans[begin][0] if begin else 0
        right = spans[end][0] if end < len(ids) else len(text)
        words = int(np.sum((word_starts >= left) & (word_starts < right)))
        window = Window(text[left:right], math.nan, end - begin, len(text[left:right].encode()), words)
        yield window, Continuations(context, [ids[begin:end]])


# ---------------------------------------------------------------- written answers


def _written(loaded: HasWeights, task: Task, settings: _Settings, report: RowReport) -> Result:
    tokenizer, limit = loaded.tokenizer, loaded.definition.config.max_seq_len - task.max_new_tokens
    kept: list[tuple[Problem, list[int]]] = []
    for number, problem in enumerate(_first(settings.limit, problems(task, report))):
        ids = encode(tokenizer, problem.prompt, number)
        if len(ids) > limit:
            reason = f"{len(ids)} tokens, with max_new_tokens={task.max_new_tokens} more than the model allows"
            report.reject_kept("too_long", problem.row, reason, problem.source)
        else:
            kept.append((problem, ids))
    _need_items(task, kept, report)
    eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    engine = Engine(loaded.definition, loaded.params, batch_size=settings.batch_size, eos_ids=eos_ids, mesh=loaded.mesh)
    out = engine.generate_batch([ids for _, ids in kept], max_new_tokens=task.max_new_tokens)
    verify = VERIFIERS[task.measure]
    items = []
    for (problem, _), tokens in zip(kept, out.tokens, strict=True):
        text = tokenizer.decode(tokens, skip_special=True)
        items.append(Written(problem, text, verify(text, problem.answer)))
    passed = sum(item.passed for item in items)
    intervals = {"acc": wilson_interval(passed, len(items))}
    return Result(task, "acc", {"acc": passed / len(items)}, intervals, None, tuple(items), report, 0.0)


# ---------------------------------------------------------------- statistics


def wilson_interval(successes: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22): 95 % with the default z.

    It stays inside [0, 1] and has a width also at 0 and 1, where the normal approximation has none.
    """
    assert 0 <= successes <= count and count > 0, (successes, count)
    share = successes / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _first(limit: int | None, items: Iterator[Any]) -> Iterator[Any]:
    return itertools.islice(items, limit)


def _sum(logps: np.ndarray) -> float:
    return float(np.sum(logps, dtype=np.float64))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _need_items(task: Task, kept: Sequence[Any], report: RowReport) -> None:
    if not kept:
        raise UserError(f"task {task.name!r}: no usable row in {task.dataset}: {'; '.join(report.lines())}")


def _need_finite(task: Task, row: int, values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise UserError(f"task {task.name!r}: row {row} has a log-likelihood of {values}: look for NaN in the weights")
