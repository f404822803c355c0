# SPDX-License-Identifier: Apache-2.0
"""safetensors files that nobody should trust: one clear error, nothing allocated beyond the file."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maxkit.errors import UserError
from maxkit.formats.mapped import MappedFile
from maxkit.formats.safetensors import SafetensorsFile, SafetensorsWriter


def packed(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def tensor(shape=(2, 3), offsets=(0, 24), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BODY = bytes(range(24))
BAD = {
    "empty": b"",
    "only a length": (5).to_bytes(8, "little"),
    "header longer than the file": packed({"a": tensor()}, BODY, length=10**6),
    "length of 2**64 - 1": packed({"a": tensor()}, BODY, length=2**64 - 1),
    "no JSON": packed(b"{" * 50, BODY),
    "deep JSON": packed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", BODY),
    "deep metadata": packed(b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, BODY),
    "not UTF-8": packed(b'{"\xff": 1}', BODY),
    "a list": packed([1, 2], BODY),
    "metadata no object": packed({"__metadata__": [1], "a": tensor()}, BODY),
    "the same key twice": packed(b'{"a": %b, "a": %b}' % ((json.dumps(tensor()).encode(),) * 2), BODY),
    "tensor no object": packed({"a": 3}, BODY),
    "no dtype": packed({"a": {"shape": [2], "data_offsets": [0, 8]}}, BODY),
    "three offsets": packed({"a": tensor(offsets=(0, 24, 24))}, BODY),
    "negative offset": packed({"a": tensor(offsets=(-8, 16))}, BODY),
    "negative shape": packed({"a": tensor(shape=(-2, -3))}, BODY),
    "shape of booleans": packed({"a": tensor(shape=(True, 6))}, BODY),
    "shape of floats": packed({"a": tensor(shape=(2.0, 3.0))}, BODY),
    "end before begin": packed({"a": tensor(offsets=(24, 0))}, BODY),
    "end behind the file": packed({"a": tensor(shape=(3, 3), offsets=(0, 36))}, BODY),
    "offsets of 2**63": packed({"a": tensor(shape=(2**62,), offsets=(0, 2**64))}, BODY),
    "huge shape": packed({"a": tensor(shape=(2**40, 2**40))}, BODY),
    "shape that overflows to the right size": packed({"a": tensor(shape=(2**63, 2, 6))}, BODY),
    "shape too small": packed({"a": tensor(shape=(2, 2))}, BODY),
    "a thousand dimensions": packed({"a": tensor(shape=(1,) * 1000 + (6,))}, BODY),
    "overlap": packed({"a": tensor(), "b": tensor(shape=(1,), offsets=(20, 24))}, BODY),
    "a huge number": packed(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 24]}}', BODY),
    "NaN": packed(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 24]}}', BODY),
    "dtype a list": packed({"a": tensor(dtype=["F32"])}, BODY),
}


def read_all(path) -> None:
    file = SafetensorsFile(path)
    for name in file.entries:
        assert file.read(name).nbytes == file.entries[name].num_bytes


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    path.write_bytes(BAD[kind])
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert peak < 40e6


def test_a_whole_file_is_read(tmp_path):
    (tmp_path / "a").write_bytes(
        packed({"a": tensor(), "n": tensor((0, 5), (24, 24)), "__metadata__": {"x": "y"}}, BODY)
    )
    file = SafetensorsFile(tmp_path / "a")
    np.testing.assert_array_equal(file.read("a"), np.frombuffer(BODY, "<f4").reshape(2, 3))
    assert file.read("n").shape == (0, 5) and file.metadata == {"x": "y"}


@pytest.mark.parametrize("dtype", ["I64", "F4", "U8", "F8_E4M3"])
def test_what_is_no_weight_is_refused_when_read(tmp_path, dtype):
    width = {"I64": 8, "F4": 1, "U8": 1, "F8_E4M3": 1}[dtype]
    (tmp_path / "a").write_bytes(packed({"a": tensor((24 // width,), (0, 24), dtype)}, BODY))
    with pytest.raises(UserError, match=f"stored as {dtype}"):
        read_all(tmp_path / "a")


WHOLE = packed(
    {"first": tensor(), "second": tensor((6,), (24, 36), "BF16"), "__metadata__": {"format": "pt"}}, BODY * 2
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_read(tmp_path, data):
    damaged = bytearray(WHOLE[: data.draw(st.integers(0, len(WHOLE)))] if data.draw(st.booleans()) else WHOLE)
    for _ in range(data.draw(st.integers(0, 5)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a").write_bytes(damaged)
    try:
        read_all(tmp_path / "a")
    except UserError as error:
        assert "\n" not in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "X"]) | json_values,
        "shape": st.lists(st.integers(-3, 2**65), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-3, 30), min_size=2, max_size=2) | json_values,
    },
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=3))
def test_any_header_is_refused_or_read(tmp_path, header):
    (tmp_path / "a").write_bytes(packed(header, BODY))
    try:
        read_all(tmp_path / "a")
    except UserError as error:
        assert "\n" not in str(error)


def test_a_tensor_is_written_part_by_part(tmp_path):
    writer = SafetensorsWriter(tmp_path / "a", {"x": (2, 3), "y": (4,)}, np.dtype(np.float32))
    for row in range(2):
        part = writer.read_back("x")
        part[row] = row + 1
        writer.write("x", part)
    writer.write("y", np.arange(4, dtype=np.float32))
    writer.finish()
    file = SafetensorsFile(tmp_path / "a")
    np.testing.assert_array_equal(file.read("x"), [[1, 1, 1], [2, 2, 2]])
    np.testing.assert_array_equal(file.read("y"), np.arange(4))


def test_a_view_is_right_after_its_pages_were_let_go(tmp_path):
    numbers = np.arange(3 << 16, dtype=np.float32)
    (tmp_path / "file").write_bytes(numbers.tobytes())
    file = MappedFile(tmp_path / "file")
    views = [file.view(numbers.dtype, start * 4, 1 << 16) for start in (0, 1 << 16, 5)]
    for view, start in zip(views, (0, 1 << 16, 5), strict=True):
        np.testing.assert_array_equal(view, numbers[start : start + (1 << 16)])
    assert not views[0].flags.writeable
