# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of the real SmolLM2-135M-Instruct, as transformers 5.23.0 gives them in float32."""

import pytest

import maxkit
from maxkit.infer import Engine, sequence_logps
from maxkit.infer.generate import encode

ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Write one sentence about why the sky is blue.": (
        "The sky is blue because of the way the human eye perceives light. When sunlight reaches our planet, "
        "it encounters tiny molecules of air, which scatter the shorter wavelengths of light, including blue, "
        "in a way that makes the sky appear blue."
    ),
    "What is 3 + 4? Reply with only the number.": "3 + 4 = 7",
}


@pytest.fixture(scope="module")
def loaded():
    return maxkit.load("smollm2-135m-instruct", dtype="float32")


def conversations():
    return [[{"role": "user", "content": question}] for question in ANSWERS]


def test_greedy_answers_in_one_batch(loaded):
    assert maxkit.generate(loaded, conversations()) == list(ANSWERS.values())


def test_one_by_one_equals_the_batch_and_a_rendered_string_equals_its_messages(loaded):
    for messages, answer in zip(conversations(), ANSWERS.values(), strict=True):
        assert maxkit.generate(loaded, [messages]) == [answer]
    text = loaded.tokenizer.decode(encode(loaded.tokenizer, conversations()[0]))
    assert maxkit.generate(loaded, [text, conversations()[2]]) == [
        "The capital of France is Paris.",
        "3 + 4 = 7",
    ]


def test_lengths_stop_tokens_and_logps_of_the_answers(loaded):
    prompts = [encode(loaded.tokenizer, messages) for messages in conversations()]
    engine = Engine(loaded.definition, loaded.params, eos_ids=[loaded.tokenizer.eos_id])
    out = engine.generate_batch(prompts)
    assert out.lengths.tolist() == [8, 49, 8] and out.stopped.all()
    scored = sequence_logps(loaded.definition, loaded.params, [p + t for p, t in zip(prompts, out.tokens, strict=True)])
    for prompt, scores, logps in zip(prompts, scored, out.logps, strict=True):
        assert abs(scores[len(prompt) - 1 :] - logps).max() < 1e-3
    cut = engine.generate_batch(prompts, max_new_tokens=8)
    assert cut.lengths.tolist() == [8, 8, 8] and cut.stopped.tolist() == [True, False, True]
    assert cut.tokens[1] == out.tokens[1][:8]
