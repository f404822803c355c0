# SPDX-License-Identifier: Apache-2.0
"""The loader's order and position: the same rows for any process count, exact resume, no row left out."""

import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxkit.data.loader import Rows, eval_batches, make_loader
from maxkit.errors import UserError

COUNT = 23  # prime: no batch size divides an epoch


def numbered(count=COUNT):
    tokens = np.arange(count * 4, dtype=np.int32).reshape(count, 4)
    return Rows({"tokens": tokens, "loss_mask": (tokens % 3 > 0).astype(np.float32)})


def loader(rows=None, **settings):
    return make_loader(numbered() if rows is None else rows, **{"batch_size": 4, "seed": 7, **settings})


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def ids(batches):
    return [(batch["tokens"][:, 0] // 4).tolist() for batch in batches]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def test_batches_are_dicts_of_numpy_columns():
    batch = next(loader())
    assert {name: (value.shape, str(value.dtype)) for name, value in batch.items()} == {
        "tokens": ((4, 4), "int32"),
        "loss_mask": ((4, 4), "float32"),
    }
    rows = numbered()
    for at, row in enumerate(batch["tokens"][:, 0] // 4):
        np.testing.assert_array_equal(batch["loss_mask"][at], rows.columns["loss_mask"][row])


def test_every_epoch_has_every_row_once_in_a_new_order():
    order = np.concatenate(ids(take(loader(), COUNT)))  # 23 batches of 4 = 4 epochs
    epochs = order.reshape(4, COUNT)
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_without_shuffle_the_rows_come_in_order():
    order = np.concatenate(ids(take(loader(shuffle=False), 12)))
    np.testing.assert_array_equal(order, np.arange(48) % COUNT)


def test_the_seed_decides_the_order():
    assert ids(take(loader(seed=1), 5)) == ids(take(loader(seed=1), 5))
    assert ids(take(loader(seed=1), 5)) != ids(take(loader(seed=2), 5))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(count):
    whole = take(loader(batch_size=8), 10)
    parts = [take(loader(batch_size=8, process_index=p, process_count=count), 10) for p in range(count)]
    for k, batch in enumerate(whole):
        joined = np.empty_like(batch["tokens"])
        for p in range(count):
            joined[p::count] = parts[p][k]["tokens"]
        np.testing.assert_array_equal(joined, batch["tokens"])


# 5 is inside the first epoch, 6 straddles its end (5.75 batches an epoch), 30 is in the sixth.
@pytest.mark.parametrize("position", [0, 1, 5, 6, 30])
def test_a_restored_position_continues_bit_for_bit(position):
    first = loader()
    take(first, position)
    state = json.loads(json.dumps(first.get_state()))
    expected = take(first, 15)
    second = loader()
    take(second, 3)  # a state overrides where the iterator is
    second.set_state(state)
    assert_same(take(second, 15), expected)


def test_a_position_fits_another_number_of_processes():
    one = loader(batch_size=8)
    take(one, 7)
    halves = [loader(batch_size=8, process_index=p, process_count=2) for p in range(2)]
    for half in halves:
        half.set_state(one.get_state())
    parts = ids([next(half) for half in halves])
    assert sorted(parts[0] + parts[1]) == sorted(ids([next(one)])[0])


@pytest.mark.parametrize("kind", ["json", "grain"])
def test_orbax_keeps_the_position_of_the_moment_of_saving(tmp_path, kind):
    first = loader()
    take(first, 9)
    save = ocp.args.JsonSave(first.get_state()) if kind == "json" else grain.checkpoint.CheckpointSave(first)
    state = ocp.args.StandardSave({"w": np.ones(100_000)})
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(9, args=ocp.args.Composite(state=state, iterator=save))
        expected = take(first, 12)  # while the save may still be running
    second = loader()
    with ocp.CheckpointManager(tmp_path) as manager:
        if kind == "json":
            found = manager.restore(9, args=ocp.args.Composite(iterator=ocp.args.JsonRestore()))
            second.set_state(found.iterator)
        else:
            manager.restore(9, args=ocp.args.Composite(iterator=grain.checkpoint.CheckpointRestore(second)))
    assert_same(take(second, 12), expected)


def test_fewer_rows_than_a_batch_are_repeated():
    assert sorted(ids([next(loader(numbered(3), batch_size=6))])[0]) == [0, 0, 1, 1, 2, 2]


def test_impossible_requests_are_one_line():
    for settings, words in [
        (
            {"batch_size": 5, "process_count": 2},
            "batch_size=5 must be a positive multiple of the 2 processes",
        ),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rows": numbered(0)}, "no rows"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            loader(**settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no rows"):
        eval_batches(numbered(0), batch_size=2)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_sees_every_row_once_and_fills_up_with_zeros(count):
    rows = Rows({"x": np.arange(1, COUNT + 1), "mask": np.ones((COUNT, 2), np.float32)})
    parts = [list(eval_batches(rows, batch_size=8, process_index=p, process_count=count)) for p in range(count)]
    assert {len(part) for part in parts} == {3}
    assert all(batch["x"].shape == (8 // count,) for part in parts for batch in part)
    seen = np.concatenate([batch["x"] for part in parts for batch in part])
    assert sorted(seen[seen > 0]) == list(range(1, COUNT + 1))
    assert sum(batch["mask"].sum() for part in parts for batch in part) == 2 * COUNT


def test_rows_know_their_content():
    rows = numbered()
    assert rows.digest() == numbered().digest()
    assert rows.digest() != rows.take(np.arange(COUNT)[::-1]).digest()
    assert len(rows.take(slice(2, 5))) == 3
    with pytest.raises(ValueError, match="one length"):
        Rows({"a": np.zeros(2), "b": np.zeros(3)})


def test_batches_of_one_row():
    batches = take(loader(batch_size=1), COUNT)
    assert sorted(row for batch in ids(batches) for row in batch) == list(range(COUNT))
