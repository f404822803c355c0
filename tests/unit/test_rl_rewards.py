# SPDX-License-Identifier: Apache-2.0
import math
import sys
import types

import numpy as np
import pytest

from maxkit.errors import UserError
from maxkit.rl.rewards import (
    Answer,
    check_rewards,
    contains,
    exact,
    is_json,
    last_number,
    length,
    matches,
    overlong_penalty,
    parse_rewards,
    reward_metrics,
    score,
    tags,
)


def answer(completion, reference="7", **more):
    values = {"prompt": "3+4=", "completion": completion, "answer": reference, "num_tokens": 3, "truncated": False}
    return Answer(values | more, "file.jsonl row 5")


def test_exact():
    assert exact(" 7\n", "7") == 1 and exact("07", "7") == 0 and exact("", "7") == 0
    assert exact("<answer>1</answer> <answer> 7 </answer>", "7", tag="answer") == 1
    assert exact("7", "7", tag="answer") == 0


def test_last_number():
    assert last_number("3 + 4 = 7.", "7") == 1 and last_number("7, not 8", "7") == 0 and last_number("none", "7") == 0
    assert last_number("$1,000.0", "1000") == 1 and last_number("= -4", "-4") == 1 and last_number("7-4", "4") == 1


def test_matches_and_tags():
    good = "<think>a\nb</think>\n<answer>7</answer>"
    assert matches(f" {good}\n") == 1 and matches(good + "!") == 0 and matches("ab", pattern="a.?") == 1
    assert tags(good, names=["think", "answer"]) == 1
    assert tags("<answer>7</answer><think></think>", names=["think", "answer"]) == 0  # in the wrong order
    assert tags("<think>x</think><answer>7", names=["think", "answer"]) == 0.5
    assert tags(good + "<answer></answer>", names=["think", "answer"]) == 0.5  # twice


def test_length_and_overlong_penalty_count_tokens():
    assert [length(n, limit=4) for n in (1, 4, 6, 8, 20)] == [1, 1, 0.5, 0, 0]
    # equation 13 of 2503.14476 with L_max 20 and L_cache 8
    found = overlong_penalty(np.array([1, 12, 14, 16, 20]), max_new_tokens=20, buffer=8, penalty=2.0)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1, -2])
    assert not overlong_penalty(np.array([20]), max_new_tokens=20, buffer=0).any()


def test_contains():
    assert contains("It is 7.", "7") == 1 and contains("It is 17.", "7") == 0


def test_json_is_read_and_never_run():
    assert (
        is_json('{"a": 1}', keys=["a"]) == 1
        and is_json('{"a": 1}', keys=["b"]) == 0
        and is_json("[1]", keys=["a"]) == 0
    )
    assert is_json('```json\n{"a": [1, null]}\n```') == 1 and is_json("3") == 1
    for wrong in ("NaN", '{"a": Infinity}', "{'a': 1}", "__import__('os')", "", "[" * 100_000):
        assert is_json(wrong) == 0


def test_composition_with_weights_and_metrics():
    rewards = parse_rewards(r"exact:1, format(\d(,\d)?):0.5,length(2):-1")
    scores = score(rewards, [answer("7"), answer("8,9"), answer("x", num_tokens=1)])
    np.testing.assert_array_equal(scores.values, [[1, 1, 0.5], [0, 1, 0.5], [0, 0, 1]])
    np.testing.assert_allclose(scores.totals, [1.0, 0.0, -1.0])
    metrics = reward_metrics(rewards, scores)
    assert metrics["rewards/exact/mean"] == pytest.approx(1 / 3) and metrics["rewards/failed"] == 0
    assert metrics["rewards/format/std"] == pytest.approx(np.std([1, 1, 0], ddof=1))


@pytest.fixture
def module():
    """A user's module, `mine`."""
    found = types.ModuleType("mine")
    found.half = lambda completion: 0.5
    found.everything = lambda **values: len(values)
    found.nan = lambda completion: math.nan
    found.list = lambda completion: [1.0, 2.0]
    found.fails = lambda completion: completion["x"]
    found.batch = lambda completions: completions
    found.level = lambda completion, difficulty: difficulty
    found.number = 3
    sys.modules["mine"] = found
    yield found
    del sys.modules["mine"]


def test_functions_of_a_user(module):
    rewards = parse_rewards("mine:half:2,mine:everything,mine:level")
    assert [r.name for r in rewards] == ["mine.half", "mine.everything", "mine.level"]
    np.testing.assert_array_equal(score(rewards, [answer("7", difficulty=4)]).values, [[0.5, 6, 4]])
    with pytest.raises(UserError, match=r"file row 1: the reward mine.level needs difficulty; there are answer, "):
        check_rewards(rewards, ["answer"], "file row 1")
    check_rewards(rewards, ["answer", "difficulty"], "file row 1")


@pytest.mark.parametrize(
    ("name", "said"),
    [("nan", "it returned nan"), ("list", "it returned a list, not a number"), ("fails", "string indices must be")],
)
def test_a_reward_that_fails_is_told_with_its_row(module, name, said):
    rewards = parse_rewards(f"exact,mine:{name}")
    with pytest.raises(
        UserError, match=f"^file.jsonl row 5: the reward mine.{name} failed: {said}.*on_reward_error=skip"
    ):
        score(rewards, [answer("7")])
    scores = score(rewards, [answer("7"), answer("7")], "skip")
    assert np.isnan(scores.totals).all() and scores.values[:, 0].tolist() == [1, 1] and len(scores.problems) == 2
    assert reward_metrics(rewards, scores)["rewards/failed"] == 2


def test_a_reference_that_is_no_number_is_a_failure_not_a_zero():
    with pytest.raises(UserError, match="row 5: the reward last_number failed: the answer 'seven' is not a number"):
        score(parse_rewards("last_number"), [answer("7", "seven")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exat", "unknown reward 'exat'; did you mean 'exact'?"),
        ("exact:much", "the weight 'much', which is not a number"),
        ("exact,exact:2", "names exact more than once"),
        ("length", r"length needs an argument, as in length\(...\)"),
        ("length(0)", "must be a number of tokens, at least 1"),
        ("format([)", "no regular expression"),
        ("format(a", "a parenthesis without its partner"),
        ("last_number(3)", "it takes no argument"),
        (" , ", "rewards is empty"),
        ("mine:haf", "mine has no function 'haf'; did you mean 'half'?"),
        ("mine:number", "is a int, not a function"),
        ("mine:batch", "takes `completions`, a whole batch"),
        ("no_such_module:f", "no_such_module cannot be imported"),
    ],
)
def test_what_cannot_be_read_is_refused(module, text, said):
    with pytest.raises(UserError, match=said):
        parse_rewards(text)
