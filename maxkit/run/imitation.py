# SPDX-License-Identifier: Apache-2.0
"""First weights for reinforcement learning: a model that is built here imitates a teacher who often miscounts.

It learns what a question and an answer look like, and to be about right. Imitation cannot make it better than its
examples; that is left to the reward. A model with a name needs none of this.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxkit.checkpoint import load
from maxkit.config import Grpo
from maxkit.data.build import ChatData
from maxkit.data.loader import Rows
from maxkit.data.packing import pack
from maxkit.data.report import RowReport
from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError
from maxkit.rl.prompts import Prompt
from maxkit.run.session import Run
from maxkit.run.tasks import NextTokenTask

EXAMPLES = 16384  # about so many, each with an error of its own: too many to learn by heart


@dataclasses.dataclass(frozen=True)
class Imitated:
    """What was imitated, (question, right answer, answer shown) each, and the history of the updates.

    Both are empty where the model had weights.
    """

    examples: list[dict[str, Any]]
    history: list[dict[str, float]]


def imitate(run: Run) -> Imitated:
    """Give the model of a GRPO run its first weights; between `run.load_data()` and `run.load_model()`.

    It is a run of its own, with the same training step, in the folder `imitation` of the run: it resumes as any other,
    and its checkpoint is the source of the run's weights. Held-out questions are not in it.

    Raises:
        UserError: an answer of the data set is no whole number, so that nobody can be off by some.
        Stopped: as `Run.train`.
    """
    cfg = run.cfg
    assert isinstance(cfg, Grpo)
    if cfg.model or cfg.load_parameters_path or not cfg.imitation_steps:
        return Imitated([], [])
    examples = careless(run.data.train, cfg.imitation_error, cfg.seed)
    held_out = careless(run.data.held_out, cfg.imitation_error, cfg.seed)
    data = ChatData(
        _rows(examples, cfg.imitation().seq_len, run.tokenizer),
        _rows(held_out, cfg.imitation().seq_len, run.tokenizer),
        RowReport(kept=len(examples)),
        [],
    )
    first = Run(cfg.imitation(), NextTokenTask(lambda *_: (data, run.tokenizer)))
    first.load_data()
    first.load_model()
    history = first.train()
    first.finish()
    source = load.open_source(first.folder)
    run.blueprint = dataclasses.replace(run.blueprint, source=source, start=str(first.folder))
    seen = examples[:: max(len(examples) // len(run.data.train), 1)]  # one of each question
    return Imitated(
        [{"question": p.text, "right answer": p.columns["answer"], "answer shown": text} for p, text in seen], history
    )


def careless(prompts: Sequence[Prompt], error: int, seed: int) -> list[tuple[Prompt, str]]:
    """Answers to each prompt, as many to each, each off by a whole number drawn evenly from -error to error.

    Raises:
        UserError: the answer of a prompt is no whole number; names the row.
    """
    draw, copies = np.random.default_rng([seed, error]), max(EXAMPLES // max(len(prompts), 1), 1)
    found = []
    for prompt in prompts:
        try:
            right = int(prompt.columns.get("answer", ""))
        except ValueError:
            raise UserError(
                f"{prompt.place}: the answer {prompt.columns.get('answer')!r} is no whole number, so it cannot be "
                "imitated with errors: name a model, or set imitation_steps=0"
            ) from None
        found += [(prompt, str(right + int(off))) for off in draw.integers(-error, error, copies, endpoint=True)]
    return found


def _rows(examples: Sequence[tuple[Prompt, str]], seq_len: int, tokenizer: Tokenizer) -> Rows:
    """Question and answer as a segment each, the answer and the token that ends it trained."""
    encoded = []
    for prompt, text in examples:
        answer = [*tokenizer.encode(text), tokenizer.eos_id]
        encoded.append(([*prompt.ids, *answer], [0] * len(prompt.ids) + [1] * len(answer)))
    order = np.random.default_rng(0).permutation(len(encoded))  # a row shall not hold one question again and again
    return Rows(pack([encoded[at] for at in order], seq_len).columns)
