# SPDX-License-Identifier: Apache-2.0
"""Chat templates and assistant masks: SmolLM2's template, awkward ones, transformers as the oracle."""

import pytest

from maxkit.checkpoint.sources import resolve
from maxkit.data.chat import check_messages, encode_chat, render
from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError
from maxkit.formats.gguf import GGUFFile

CHAT = [
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "It is 7.\n\n7 \U0001f642"},
    {"role": "user", "content": "caf\u00e9"},
    {"role": "assistant", "content": "Yes "},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *CHAT]
GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(resolve("smollm2-135m-instruct")).metadata)


@pytest.fixture(scope="module")
def theirs(smollm2, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    smollm2.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    return Tokenizer(tokenizer.backend, special=tokenizer.special, chat_template=template)


def masked(tokenizer: Tokenizer, messages) -> list[str]:
    """The runs of tokens that are trained on, as text."""
    ids, mask = encode_chat(tokenizer, messages)
    runs, before = [], 0
    for number, flag in zip(ids, mask, strict=True):
        if flag:
            runs = [*runs, []] if not before else runs
            runs[-1].append(number)
        before = flag
    return [tokenizer.decode(run) for run in runs]


TEMPLATES = [
    None,
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] | upper }}] {{ m.content | trim }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT] {% endif %}",
    "{%- for m in messages %}\n    {%- if loop.first %}\n{{ m | tojson }}\n    {%- endif %}\n"
    "    {% if m.role == 'user' %}{% continue %}{% endif %}\n{{ m.content }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    "<b>{{ m.content }}</b>{% endfor %}{{ tools is none }}{{ strftime_now('%Y') | length }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", [CHAT, SYSTEM, CHAT[:1]])
def test_rendered_text_equals_transformers(smollm2, theirs, template, prompt, messages):
    tokenizer = with_template(smollm2, template or smollm2.chat_template)
    wanted = theirs.apply_chat_template(
        messages, chat_template=tokenizer.chat_template, tokenize=False, add_generation_prompt=prompt
    )
    assert render(tokenizer, messages, prompt) == wanted


@pytest.mark.parametrize("messages", [CHAT, SYSTEM, CHAT[:2]])
def test_mask_is_the_answer_and_the_token_that_ends_it(smollm2, messages):
    ids, mask = encode_chat(smollm2, messages)
    assert smollm2.decode(ids) == render(smollm2, messages) and len(ids) == len(mask)
    wanted = ["It is 7.\n\n7 \U0001f642<|im_end|>", "Yes <|im_end|>"]
    assert masked(smollm2, messages) == wanted[: len(messages) // 2]
    # The same id ends turns of the user and the system, which are not trained on (and is also the padding).
    ends = [flag for number, flag in zip(ids, mask, strict=True) if number == smollm2.eos_id]
    assert ends.count(1) == len(messages) // 2 and ends.count(0) >= len(messages) // 2


def test_what_comes_before_an_answer_is_the_prompt_of_generation(smollm2):
    ids, mask = encode_chat(smollm2, CHAT[:2])
    assert ids[: mask.index(1)] == smollm2.encode(render(smollm2, CHAT[:1], add_generation_prompt=True))


def test_a_token_that_begins_before_the_answer_is_not_trained_on(smollm2):
    # The line break of the template and the first space of the answer are one token here.
    messages = [CHAT[0], {"role": "assistant", "content": "  Yes"}]
    ids, mask = encode_chat(smollm2, messages)
    assert smollm2.decode([ids[mask.index(1) - 1]]) == "\n "
    assert masked(smollm2, messages) == [" Yes<|im_end|>"]


def test_generation_blocks_decide_the_mask(smollm2, theirs):
    tokenizer = with_template(smollm2, GENERATION)
    assert masked(tokenizer, CHAT) == ["It is 7.\n\n7 \U0001f642<|im_end|>", "Yes <|im_end|>"]
    encoded = theirs.apply_chat_template(
        CHAT, chat_template=GENERATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encode_chat(tokenizer, CHAT) == (encoded["input_ids"], encoded["assistant_masks"])


def test_a_template_that_trims_or_ends_without_a_token(smollm2):
    tokenizer = with_template(
        smollm2,
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content | trim }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}",
    )
    assert masked(tokenizer, CHAT) == ["It is 7.\n\n7 \U0001f642", "Yes"]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_turn(smollm2):
    tokenizer = with_template(
        smollm2,
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else 'cut' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    with pytest.raises(UserError, match="message 1 .assistant.: the chat template writes this turn differently"):
        encode_chat(tokenizer, CHAT)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list"),
        (["hi"], "message 0 is a str"),
        ([{"role": "bot", "content": "x"}], "message 0 has role 'bot'; allowed: system, user"),
        ([{"content": "x"}], "message 0 has role None"),
        ([{"role": "user", "content": None}], "message 0 .user. has content of type NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has content of type list"),
        (CHAT[:1], "no assistant turn"),
        (CHAT[1:], "message 0 is an assistant turn"),
        ([CHAT[0], {"role": "assistant", "content": " \n"}], "message 1 .assistant. has empty content"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(smollm2, messages, words):
    with pytest.raises(UserError, match=words) as caught:
        encode_chat(smollm2, messages)
    assert "\n" not in str(caught.value)


def test_rendering_needs_no_assistant_turn():
    check_messages(CHAT[:1])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{% if %}", "the chat template is not valid"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ messages[9].content.x }}", "refuses this conversation"),
        ("{{ 1 / 0 }}", "fails on this conversation: ZeroDivisionError"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation"),
        ("{% for i in range(999999999) %}x{% endfor %}", "fails on this conversation: OverflowError"),
    ],
)
def test_templates_that_fail_or_try_to_escape(smollm2, template, words):
    with pytest.raises(UserError, match=words):
        render(with_template(smollm2, template), CHAT)
