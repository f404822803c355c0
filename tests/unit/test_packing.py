# SPDX-License-Identifier: Apache-2.0
"""Packing against a naive row-by-row reading: nothing lost, nothing twice, nothing across a segment."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxkit.data.packing import chunk_text, first_fit, pack

# pad (0) and the ids overlap on purpose: padding must be told by segment, never by id.
TOKEN = st.integers(0, 5)
EXAMPLE = st.lists(st.tuples(TOKEN, st.integers(0, 1)), min_size=1, max_size=14).map(
    lambda pairs: ([token for token, _ in pairs], [trained for _, trained in pairs])
)
EXAMPLES = st.lists(EXAMPLE, max_size=25)


def segments_of(columns):
    """Every segment of every row as (tokens, targets, loss_mask, positions), read place by place."""
    found = []
    for row in range(len(columns["tokens"])):
        by_segment = {}
        for at, segment in enumerate(columns["segment_ids"][row]):
            if segment:
                by_segment.setdefault(int(segment), []).append(at)
        assert sorted(by_segment) == list(range(1, len(by_segment) + 1))
        for places in by_segment.values():
            assert places == list(range(places[0], places[-1] + 1)), "a segment must be contiguous"
            names = ("tokens", "targets", "loss_mask", "positions")
            found.append(tuple(tuple(columns[name][row, places].tolist()) for name in names))
    return found


def reference_segment(ids, mask):
    """One example as the contract describes it, written out by hand."""
    targets = [*ids[1:], 0]
    trained = [float(value) for value in [*mask[1:], 0]]
    return tuple(ids), tuple(targets), tuple(trained), tuple(range(len(ids)))


@given(EXAMPLES, st.integers(2, 12), st.booleans(), st.sampled_from(["drop", "truncate"]))
def test_each_example_is_one_segment_and_none_is_lost(examples, seq_len, packing, too_long):
    packed = pack(examples, seq_len, packing=packing, too_long=too_long)
    long = [i for i, (ids, _) in enumerate(examples) if len(ids) > seq_len]
    expected, untrained = [], []
    for index, (ids, mask) in enumerate(examples):
        if index in long and too_long == "drop":
            continue
        if not any(mask[1:seq_len]):
            untrained.append(index)
            continue
        expected.append(reference_segment(ids[:seq_len], mask[:seq_len]))
    assert Counter(segments_of(packed.columns)) == Counter(expected)
    assert packed.untrained == untrained
    assert packed.too_long == (long if too_long == "drop" else [])
    assert packed.truncated == ([] if too_long == "drop" else [i for i in long if i not in untrained])
    if not packing:
        assert segments_of(packed.columns) == expected


@given(EXAMPLES, st.integers(2, 12))
def test_padding_is_zero_everywhere_but_in_the_ids(examples, seq_len):
    columns = pack(examples, seq_len, too_long="truncate", pad_id=3).columns
    padding = columns["segment_ids"] == 0
    for name, value in {"tokens": 3, "targets": 3, "loss_mask": 0, "positions": 0}.items():
        assert columns[name].shape == padding.shape == (len(columns["tokens"]), seq_len)
        assert (columns[name][padding] == value).all()
    assert {str(column.dtype) for column in columns.values()} == {"int32", "float32"}
    assert columns["loss_mask"].dtype == np.float32


@given(st.lists(st.integers(1, 10), max_size=60), st.integers(1, 4))
def test_first_fit_uses_every_length_once_and_never_overfills(lengths, open_rows):
    rows = first_fit(lengths, 10, open_rows)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= 10 for row in rows)


def test_first_fit_fills_rows():
    lengths = np.random.default_rng(0).integers(10, 60, 2000).tolist()
    rows = first_fit(lengths, 256)
    assert sum(lengths) / (len(rows) * 256) > 0.97


def test_packing_saves_rows():
    examples = [([1, 2, 3], [0, 1, 1])] * 8
    assert len(pack(examples, 6).columns["tokens"]) == 4
    assert len(pack(examples, 6, packing=False).columns["tokens"]) == 8


@given(st.lists(TOKEN, max_size=70), st.integers(2, 12))
def test_chunked_text_has_every_pair_of_neighbours_exactly_once(ids, seq_len):
    columns = chunk_text(ids, seq_len, pad_id=2)
    trained = columns["loss_mask"] == 1
    pairs = list(zip(columns["tokens"][trained].tolist(), columns["targets"][trained].tolist(), strict=True))
    assert pairs == list(zip(ids[:-1], ids[1:], strict=True))
    assert len(columns["tokens"]) == -(-max(len(ids) - 1, 0) // seq_len)
    np.testing.assert_array_equal(columns["segment_ids"], trained)
    np.testing.assert_array_equal(columns["positions"][trained], np.nonzero(trained)[1])
    assert (columns["tokens"][~trained] == 2).all() and (columns["positions"][~trained] == 0).all()


def test_a_mask_of_another_length_is_an_error():
    with pytest.raises(AssertionError, match="3 ids, 2 mask"):
        pack([([1, 2, 3], [1, 1])], 8)
