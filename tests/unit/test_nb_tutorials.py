# SPDX-License-Identifier: Apache-2.0
"""What the tutorials measure and draw: against sums by hand, with models of a few thousand weights."""

import numpy as np
import pytest

from maxkit.data.chat import encode_chat
from maxkit.data.packing import pack
from maxkit.nb import accumulation, packing_tour

CHATS = [
    [{"role": "user", "content": "a b?"}, {"role": "assistant", "content": "c."}],
    [{"role": "user", "content": "d?"}, {"role": "assistant", "content": "e."}],
]


def is_good(figure) -> bool:
    return 20 <= len(figure.alt) <= 250 and len(figure.png) > 2000


def test_a_token_of_a_short_row_counts_more_in_a_mean_of_means() -> None:
    mask = np.zeros((4, 8))
    for row, length in enumerate((1, 8, 3, 8)):
        mask[row, :length] = 1
    weights = accumulation.token_weights(mask, 4)
    assert weights[:, 0] == pytest.approx([20 / 4, 20 / 32, 20 / 12, 20 / 32])
    assert weights.sum() == pytest.approx(mask.sum()) and not weights[mask == 0].any()
    # Two micro-batches: rows 0 and 2 with 4 tokens, 1 and 3 with 16.
    assert accumulation.token_weights(mask, 2)[:, 0] == pytest.approx([2.5, 0.625, 2.5, 0.625])
    assert np.array_equal(accumulation.token_weights(mask, 1), mask)
    assert is_good(accumulation.votes_figure(mask, 4, title="Votes"))


def test_updates_have_an_angle_and_a_length() -> None:
    true, other = np.array([2.0, 0.0, 0.0]), np.array([0.0, 0.0, 3.0])
    assert accumulation.apart(other, true) == pytest.approx({"cosine": 0, "size": 1.5, "difference": 13**0.5 / 2})
    figure = accumulation.directions_figure(true, {"same": true}, {"other": other}, title="Two updates")
    assert "90 degrees off and 1.50 times as long" in figure.alt
    with pytest.raises(AssertionError, match="'?not the same"):
        accumulation.directions_figure(true, {"same": true + 1}, {"other": other}, title="Two updates")


def test_a_packed_row_is_drawn_and_its_leaks_are_counted() -> None:
    tokenizer = packing_tour.chatml_tokenizer(CHATS)
    encoded = [encode_chat(tokenizer, chat) for chat in CHATS]
    words = packing_tour.spelled(tokenizer, encoded[0][0])
    assert words[:2] == ["<|im_start|>", "user"] and "↵" in words
    assert [w for w, own in zip(words, encoded[0][1], strict=True) if own] == ["c", ".", "<|im_end|>"]
    assert is_good(packing_tour.tokens_figure(words, encoded[0][1], title="Tokens"))
    columns = pack(encoded, 40, pad_id=tokenizer.pad_id).columns
    spelled = packing_tour.spelled(tokenizer, columns["tokens"][0])
    assert "6 trained targets" in packing_tour.row_figure(columns, spelled, spelled, title="Row").alt
    segments, plain = packing_tour.told(columns, False, False)
    assert (segments == 1).all() and (plain == np.arange(40)).all()
    own = columns["segment_ids"][0]
    causal = np.tril(np.ones((40, 40)))
    first, second = int((own == 1).sum()), int((own == 2).sum())
    assert packing_tour.leaks(causal, own) == (first * second, 0)
    assert packing_tour.leaks(causal.T, own) == (first * second, first * second)
    assert packing_tour.leaks(causal * (own[:, None] == own), own) == (0, 0)
    assert is_good(packing_tour.influence_figure({"neither": causal}, own, title="Who sees whom"))
