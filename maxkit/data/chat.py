# SPDX-License-Identifier: Apache-2.0
"""Chat messages to text with a model's own template, and to tokens with a mask of what the assistant said.

The mask comes from character offsets, never from token ids: in SmolLM2 the padding token is the token that
ends a turn. Templates are programs of strangers, so they run in Jinja's sandbox. Not here: packing and
batches (`packing.py`).
"""

import datetime
import functools
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]
Span = tuple[int, int]  # characters [start, end)


def check_messages(messages: Sequence[Message], *, training: bool = False) -> None:
    """Raise a UserError that names the first problem: not a list, unknown role, content that is no string.

    For `training` at least one assistant turn with text is needed, and it must not be the first turn.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("messages must be a non-empty list of {'role': ..., 'content': ...}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"message {number} is a {type(message).__name__}, not {{'role': ..., 'content': ...}}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"message {number} has role {role!r}; allowed: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(
                f"message {number} ({role}) has content of type {type(content).__name__}; it must be a string"
            )
        if training and role == "assistant" and not content.strip():
            raise UserError(f"message {number} (assistant) has empty content")
    if training and not any(message["role"] == "assistant" for message in messages):
        raise UserError("no assistant turn: nothing to train on")
    if training and messages[0]["role"] == "assistant":
        raise UserError("message 0 is an assistant turn: nothing comes before it that it answers")


def render(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """Return the text of a conversation by the tokenizer's chat template.

    `add_generation_prompt` ends it with the opening of an assistant turn. Raises UserError for bad messages,
    a tokenizer without a template and a template that refuses the conversation.
    """
    check_messages(messages)
    return _render_spans(tokenizer, messages, add_generation_prompt)[0]


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation and its assistant mask.

    The mask is 1 for the content of an assistant turn and the token that ends it.

    A template with `{% generation %}` blocks says itself what is masked; otherwise an assistant turn is the
    text that appears behind the generation prompt. A token that begins before the turn is not in it. Raises
    UserError for a row that cannot be trained on, naming the turn.
    """
    check_messages(messages, training=True)
    text, spans = _render_spans(tokenizer, messages, False)
    if not _compiled(_template_of(tokenizer)).marks_generation:
        spans = list(_turn_spans(tokenizer, messages, text))
    ids, offsets = tokenizer.encode_with_offsets(text)
    return ids, _mask(offsets, spans)


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """1 for each token that begins inside a span; both lists are in order of their starts."""
    mask, spans_left = [], list(spans)[::-1]
    for start, _ in offsets:
        while spans_left and spans_left[-1][1] <= start:
            spans_left.pop()
        mask.append(int(bool(spans_left) and spans_left[-1][0] <= start))
    return mask


def _turn_spans(tokenizer: Tokenizer, messages: Sequence[Message], text: str) -> Iterator[Span]:
    """Each assistant turn in the text: from behind the generation prompt to the token that ends it."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render_spans(tokenizer, messages[:number], True)[0]
        after = _render_spans(tokenizer, messages[: number + 1], False)[0]
        if not after.startswith(before) or not text.startswith(after):
            raise UserError(
                f"message {number} (assistant): the chat template writes this turn differently depending on "
                "what follows it, so what the model says cannot be marked; use a template that has "
                "{% generation %} blocks"
            )
        # White space behind the end of the turn (a line break in ChatML) belongs to the template, not to the
        # model.
        yield len(before), len(after.rstrip())


def _template_of(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template: use a chat model, or train on plain text")
    return tokenizer.chat_template


def _render_spans(tokenizer: Tokenizer, messages: Sequence[Message], prompt: bool) -> tuple[str, list[Span]]:
    """The rendered text and the spans of its `{% generation %}` blocks."""
    compiled = _compiled(_template_of(tokenizer))
    names = {f"{role}_token": text for role, text in tokenizer.special.items()}
    try:
        marked = compiled.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=prompt,
            tools=None,
            documents=None,
            **names,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses this conversation: {str(error)[:200]}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"the chat template fails on this conversation: {type(error).__name__}: {error}") from None
    return _take_marks(marked, compiled.mark)


def _take_marks(marked: str, mark: str) -> tuple[str, list[Span]]:
    """Remove the marks around generation blocks; every second piece lies inside one."""
    pieces, text, spans = marked.split(mark), "", []
    for number, piece in enumerate(pieces):
        if number % 2:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


class _Compiled:
    """A compiled template, the mark it puts around generation blocks, and whether it has any."""

    def __init__(self, source: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._template = environment.from_string(source)
        block = environment.extensions[_GenerationBlock.identifier]
        assert isinstance(block, _GenerationBlock)
        self.mark, self.marks_generation = block.mark, block.used

    def render(self, **names: Any) -> str:
        return self._template.render(**names)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> _Compiled:
    try:
        return _Compiled(source)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template is not valid: {str(error)[:200]}") from None


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: output unchanged, but its place is marked."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.mark = f"\x02{secrets.token_hex(16)}\x02"  # cannot be guessed, so no message can contain it
        self.used = False

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.used = True
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{self.mark}{caller()}{self.mark}"


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes < and > for HTML, which no model has seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
