# SPDX-License-Identifier: Apache-2.0
"""Tokenizer, prompts and rewards in the forms that Tunix's learners take. Imports no Tunix.

Tunix tells padding from text by the token alone, and hands texts, not tokens, to its rollout and rewards.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maxkit.data import chat
from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError
from maxkit.rl.prompts import Prompt
from maxkit.rl.rewards import Answer, Reward, score

LAST_BYTE = "\xff"  # how a byte-level vocabulary writes the byte 255
NOT_IN_TUNIX = ("num_tokens", "truncated")  # what a maxkit reward may ask for, and Tunix does not say


class TunixTokenizer:
    """A `Tokenizer` with the five methods that Tunix calls, and a pad token that is in no text.

    pad: the tokenizer's own where it is neither the beginning nor the end of a text; else the first id of the model
    that stands for no text; else a special token without a role; else a byte that no UTF-8 text has. Were pad the end
    (as in SmolLM2), Tunix would take the end of every answer for padding and never train it.

    There is no BOS token: prompts have theirs, where the chat template puts one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, pad_id: int | None = None):
        """`vocab_size` of the model; `pad_id` where another one is wanted.

        Raises:
            UserError: no token ends a text, or none is left for padding.
        """
        self.tokenizer = tokenizer
        if tokenizer.eos_id is None:
            raise UserError("the tokenizer names no token that ends a text (eos): Tunix needs one")
        self._eos_id = tokenizer.eos_id
        self._pad_id = _free_id(tokenizer, vocab_size) if pad_id is None else pad_id
        taken = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id}
        for role, number in taken.items():
            if self._pad_id == number:
                raise UserError(f"pad_id={pad_id} is the tokenizer's {role}: Tunix would take every {role} for padding")
        if not 0 <= self._pad_id < vocab_size:
            raise UserError(f"pad_id={pad_id} is not below the model's vocab_size={vocab_size}")

    def encode(self, text: str, **_: Any) -> list[int]:
        """Ids of a text, with nothing added."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Any, **_: Any) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(np.asarray(ids).reshape(-1).tolist(), skip_special=True)

    def bos_id(self) -> int | None:
        """None: nothing is put in front."""
        return None

    def eos_id(self) -> int:
        """The token that ends a text or turn."""
        return self._eos_id

    def pad_id(self) -> int:
        """The token that fills up rows."""
        return self._pad_id

    def apply_chat_template(
        self, messages: Sequence[chat.Message], add_generation_prompt: bool = True, tokenize: bool = False, **_: Any
    ) -> str | list[int]:
        """A conversation in the model's format, for the agentic learners."""
        text = chat.render(self.tokenizer, list(messages), add_generation_prompt=add_generation_prompt)
        return self.encode(text) if tokenize else text


def _free_id(tokenizer: Tokenizer, vocab_size: int) -> int:
    roles = {tokenizer.bos_id, tokenizer.eos_id}
    if tokenizer.pad_id is not None and tokenizer.pad_id not in roles:
        return tokenizer.pad_id
    if tokenizer.vocab_size < vocab_size:
        return tokenizer.vocab_size
    template = tokenizer.chat_template or ""
    for number, token in sorted(tokenizer.backend.get_added_tokens_decoder().items()):
        if token.special and number not in roles and token.content not in template:
            return number
    byte = tokenizer.backend.token_to_id(LAST_BYTE)
    if byte is not None and tokenizer.decode([byte]) == "\ufffd":
        return byte
    raise UserError(
        "no token is left for padding: the tokenizer's pad is its eos, every id is a text and every special token has "
        "a role; give pad_id, or a model with a larger vocab_size"
    )


def prompt_rows(prompts: Sequence[Prompt], tokenizer: TunixTokenizer, batch_size: int) -> list[dict[str, np.ndarray]]:
    """Batches of `batch_size` prompts for GRPOLearner.train: {"prompts", and the rows' other columns}, arrays [B].

    What does not fill a batch is left out. NumPy arrays, because Tunix takes a list for a tree of texts.

    Raises:
        UserError: fewer prompts than a batch; a prompt whose tokens its text does not give back; another column
            in one row than in the others.
    """
    if len(prompts) < batch_size:
        raise UserError(f"{len(prompts)} prompts do not fill a batch of {batch_size}")
    texts = []
    for prompt in prompts:
        text = tokenizer.tokenizer.decode(prompt.ids)
        if tokenizer.encode(text) != list(prompt.ids):
            raise UserError(f"{prompt.place}: its tokens cannot be written as a text, which is what Tunix takes")
        if tokenizer.pad_id() in prompt.ids:
            raise UserError(f"{prompt.place}: it holds the pad token {tokenizer.pad_id()}: choose another pad_id")
        if prompt.columns.keys() != prompts[0].columns.keys():
            raise UserError(
                f"{prompt.place} has the columns {sorted(prompt.columns)}, others {sorted(prompts[0].columns)}"
            )
        texts.append(text)
    columns = {"prompts": texts} | {name: [p.columns[name] for p in prompts] for name in prompts[0].columns}
    return [
        {name: _objects(values[at : at + batch_size]) for name, values in columns.items()}
        for at in range(0, len(prompts) - batch_size + 1, batch_size)
    ]


def _objects(values: Sequence[Any]) -> np.ndarray:
    """[B]: texts, or whatever the values are, one an entry."""
    if all(isinstance(value, str) for value in values):
        return np.array(values)
    found = np.empty(len(values), object)
    found[:] = values
    return found


def reward_functions(rewards: Sequence[Reward]) -> list[Callable[..., list[float]]]:
    """Rewards of maxkit as Tunix's reward functions, which are added up; each has its weight in it.

    A reward that fails, or gives no number, stops the run with the prompt it failed on. (Tunix would count NaN as 0.)

    Raises:
        UserError: a reward that needs the number of tokens, which Tunix does not tell.
    """
    return [_reward_function(reward) for reward in rewards]


def _reward_function(reward: Reward) -> Callable[..., list[float]]:
    if missing := [name for name in reward.needs if name in NOT_IN_TUNIX]:
        raise UserError(f"rewards: {reward.name} needs {', '.join(missing)}, and Tunix tells rewards only the text")

    def judge(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        answers = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            own = {name: value[row] for name, value in columns.items() if _is_column(value, len(prompts))}
            answers.append(Answer({**own, "prompt": prompt, "completion": completion}, f"prompt {prompt!r}"))
        return score([reward], answers).totals.tolist()

    judge.__name__ = reward.name  # names its metric
    return judge


def _is_column(value: Any, rows: int) -> bool:
    """Tunix mixes its own settings (`mode`) with the columns."""
    return not isinstance(value, str) and hasattr(value, "__len__") and len(value) == rows
