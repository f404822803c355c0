# SPDX-License-Identifier: Apache-2.0
"""Tokens to fixed-length rows: several chat examples a row, one a row, or one long text cut into rows.

The columns are those of `types.Batch`, as numpy arrays [rows, seq_len]. Padding has segment id 0, loss mask 0
and the pad id as token and target; it is recognised by its segment, never by its id (SmolLM2's pad is its end
of turn).
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

Columns = dict[str, np.ndarray]
# Ids and, of the same length, 1 where the assistant wrote the token.
Example = tuple[Sequence[int], Sequence[int]]

# Rows still open for a later example. More fill a little better and cost time: first fit looks at each of
# them.
OPEN_ROWS = 64


class Packed(NamedTuple):
    """Rows, and the indices of the examples that were not used, or were cut.

    untrained: none of the tokens to predict is the assistant's (after a cut, if there was one).
    """

    columns: Columns
    too_long: list[int]
    truncated: list[int]
    untrained: list[int]


def pack(
    examples: Iterable[Example],
    seq_len: int,
    *,
    packing: bool = True,
    too_long: Literal["drop", "truncate"] = "drop",
    pad_id: int = 0,
) -> Packed:
    """Put examples into rows of `seq_len`: by first fit in the order given, or one a row with packing=False.

    Each example is one segment (ids from 1 in each row, positions from 0). The target of a token is the next
    token of its segment, trained if the assistant wrote it; the last token of a segment has no target (loss
    mask 0).
    An example longer than seq_len is dropped or cut at seq_len, and listed either way.
    """
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    packed = Packed({}, [], [], [])
    for index, (ids, mask) in enumerate(examples):
        assert len(ids) == len(mask), f"example {index}: {len(ids)} ids, {len(mask)} mask values"
        tokens, trained = np.asarray(ids, np.int32), np.asarray(mask, np.float32)
        if len(ids) > seq_len and too_long == "drop":
            packed.too_long.append(index)
            continue
        if not trained[1:seq_len].any():
            packed.untrained.append(index)
            continue
        if len(ids) > seq_len:
            packed.truncated.append(index)
        kept.append((tokens[:seq_len], trained[:seq_len]))
    lengths = [len(tokens) for tokens, _ in kept]
    rows = first_fit(lengths, seq_len) if packing else [[index] for index in range(len(kept))]
    return packed._replace(columns=lay_out([[kept[index] for index in row] for row in rows], seq_len, pad_id))


def first_fit(lengths: Sequence[int], capacity: int, open_rows: int = OPEN_ROWS) -> list[list[int]]:
    """Assign each length to the oldest open row with room for it; the indices in each row.

    At most `open_rows` rows are open, the fullest is closed first: time grows with len(lengths) * open_rows.
    """
    rows: list[list[int]] = []
    room: dict[int, int] = {}  # free tokens of each open row; a dict keeps the order of opening
    for index, length in enumerate(lengths):
        assert 0 < length <= capacity, f"length {length} in rows of {capacity}"
        row = next((row for row, free in room.items() if free >= length), None)
        if row is None:
            if len(room) == open_rows:
                del room[min(room, key=room.__getitem__)]
            row = len(rows)
            rows.append([])
            room[row] = capacity
        rows[row].append(index)
        room[row] -= length
        if room[row] < 2:  # no example that can be trained is shorter than two tokens
            del room[row]
    return rows


def chunk_text(ids: Sequence[int] | np.ndarray, seq_len: int, *, pad_id: int = 0) -> Columns:
    """Cut one stream of N tokens into rows of `seq_len` inputs; each token but the first is a target once.

    The windows hold seq_len + 1 tokens and overlap by one, so ceil((N - 1) / seq_len) rows. All of a row is
    segment 1 with positions from 0; only the last row may be padded.
    """
    stream = np.asarray(ids, np.int32)
    inputs = max(len(stream) - 1, 0)
    shape = (-(-inputs // seq_len), seq_len)
    columns = _empty(shape, pad_id)
    flat = {name: column.reshape(-1) for name, column in columns.items()}  # views: the arrays are fresh
    flat["tokens"][:inputs] = stream[:inputs]
    flat["targets"][:inputs] = stream[1:]
    flat["loss_mask"][:inputs] = 1
    flat["segment_ids"][:inputs] = 1
    flat["positions"][:inputs] = np.arange(inputs) % seq_len
    return columns


def lay_out(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], seq_len: int, pad_id: int) -> Columns:
    """Rows of segments, each (ids, 1 where a token is trained), as columns; numbered from 1 in each row."""
    columns = _empty((len(rows), seq_len), pad_id)
    for row, segments in enumerate(rows):
        start = 0
        for segment, (tokens, trained) in enumerate(segments, start=1):
            end = start + len(tokens)
            columns["tokens"][row, start:end] = tokens
            columns["targets"][row, start : end - 1] = tokens[1:]
            columns["loss_mask"][row, start : end - 1] = trained[1:]
            columns["segment_ids"][row, start:end] = segment
            columns["positions"][row, start:end] = np.arange(len(tokens))
            start = end
    return columns


def _empty(shape: tuple[int, int], pad_id: int) -> Columns:
    return {
        "tokens": np.full(shape, pad_id, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
