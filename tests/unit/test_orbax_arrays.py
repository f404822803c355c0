# SPDX-License-Identifier: Apache-2.0
"""Arrays of an Orbax item one at a time: what Orbax wrote is read, what we write Orbax reads, damage is an error."""

import json
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxkit.errors import UserError
from maxkit.formats import maxtext, orbax_arrays
from maxkit.formats.maxtext import writer as maxtext_writer
from maxkit.formats.orbax_arrays import OrbaxArrays, OrbaxWriter, new_step

FIXTURE = Path(__file__).parents[1] / "fixtures" / "maxtext" / "deepseek_nnx_scanned_025"
TREE = {
    "a": {"wide": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "half": np.ones((3, 2), ml_dtypes.bfloat16)},
    "list": [{"count": np.int32(5)}, None, {"count": np.int32(6)}],
    "zeros": np.zeros((4, 2), np.float32),
    "byte": np.arange(5, dtype=np.int8),
    "empty": {},
    "scalar": np.float32(2.5),
}


@pytest.mark.parametrize(("ocdbt", "zarr3"), [(True, True), (True, False), (False, False)])
def test_every_form_that_orbax_writes(tmp_path, ocdbt, zarr3):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "item", TREE)
    arrays = OrbaxArrays(tmp_path / "item")
    assert arrays.shapes == {
        "a/wide": (2, 3, 4),
        "a/half": (3, 2),
        "list/0/count": (),
        "list/2/count": (),
        "zeros": (4, 2),
        "byte": (5,),
        "scalar": (),
    }
    for path, wanted in (("a/wide", TREE["a"]["wide"]), ("a/half", TREE["a"]["half"]), ("zeros", TREE["zeros"])):
        found = arrays.read(path)
        assert found.dtype == wanted.dtype == arrays.leaves[path].dtype
        assert np.array_equal(found, wanted)
    assert np.array_equal(arrays.read("a/wide", (slice(None), 1)), TREE["a"]["wide"][:, 1])
    assert (int(arrays.read("list/2/count")), float(arrays.read("scalar"))) == (6, 2.5)
    assert not arrays.leaves["list/1"].is_array
    assert not arrays.leaves["empty"].is_array
    assert (arrays.is_sequence("list/0/count", 1), arrays.is_sequence("a/wide", 1)) == (True, False)
    with pytest.raises(UserError, match="holds no array 'a/narrow'"):
        arrays.read("a/narrow")


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_restores_what_we_write(tmp_path):
    key = jax.random.key(3, impl="unsafe_rbg")
    with new_step(tmp_path / "0", {"scan_layers": True}) as writer:
        for path in ("a/wide", "a/half"):
            writer.write(tuple(path.split("/")), TREE["a"][path[2:]])
        indices = frozenset((1,))
        for number in ("0", "2"):
            writer.write(("list", number, "count"), TREE["list"][int(number)]["count"].reshape(()), indices)
        writer.empty(("list", "1"), "None", indices)
        for name in ("zeros", "byte", "scalar"):
            writer.write((name,), np.asarray(TREE[name]))
        writer.empty(("empty",), "Dict")
        writer.write(("key",), np.asarray(jax.random.key_data(key)), impl="unsafe_rbg")
        target = writer.create(("stack",), (2, 5, 3), np.dtype(np.float32), 1)
        for row in range(5):
            target[:, row].write(np.full((2, 3), row, np.float32)).result()
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "0" / "items")
    assert jnp.array_equal(jax.random.key_data(found.pop("key")), jax.random.key_data(key))
    assert np.array_equal(found.pop("stack"), np.broadcast_to(np.arange(5.0)[:, None], (2, 5, 3)))
    assert jax.tree.structure(found) == jax.tree.structure(TREE)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, TREE)))
    arrays = OrbaxArrays(tmp_path / "0" / "items")
    assert arrays.leaves["stack"].chunks == (2, 1, 3)
    assert arrays.extension("key") == {"random_key_impl": "unsafe_rbg"}


def test_one_layer_of_a_stack_does_not_read_the_others(tmp_path):
    rows, width = 32, 1 << 18
    writer = OrbaxWriter(tmp_path / "item")
    target = writer.create(("stack",), (2, rows, width), np.dtype(np.float32), 1)
    for row in range(rows):
        target[:, row].write(np.full((2, width), row, np.float32)).result()
    writer.finish()
    arrays = OrbaxArrays(tmp_path / "item")
    tracemalloc.start()
    layer = arrays.read("stack", (slice(None), 7))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert layer.shape == (2, width)
    assert set(np.unique(layer)) == {7.0}
    assert peak < 2 * layer.nbytes  # of 64 times as much


def test_large_arrays_and_stacks_piece_by_piece_are_the_same(tmp_path, monkeypatch):
    contents = maxtext.open(FIXTURE, FIXTURE / "config_resolved.txt")
    whole = maxtext.write(tmp_path / "whole", contents, layout="maxtext-nnx")
    monkeypatch.setattr(orbax_arrays, "_COMMIT_BYTES", 1000)
    monkeypatch.setattr(maxtext_writer, "STACK_BYTES", 1000)
    pieces = maxtext.write(tmp_path / "pieces", maxtext.open(whole.path), layout="maxtext-nnx")
    again = maxtext.write(tmp_path / "again", maxtext.open(pieces.path), layout="maxtext-nnx", scan_axis=0)
    one, other = OrbaxArrays(whole.path / "items"), OrbaxArrays(pieces.path / "items")
    assert one.leaves.keys() == other.leaves.keys()
    assert all(np.array_equal(one.read(path), other.read(path)) for path in one.shapes)
    path = "params/params/decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_0"
    assert (one.leaves[path].chunks, other.leaves[path].chunks) == ((6, 3, 48, 32), (6, 1, 48, 32))
    moved = OrbaxArrays(again.path / "items")
    assert moved.leaves[path].chunks == (1, 6, 48, 32)
    assert np.array_equal(np.moveaxis(moved.read(path), 0, 1), one.read(path))


def test_damage_is_an_error(tmp_path):
    ocp.PyTreeCheckpointer().save(tmp_path / "item", TREE)
    metadata = tmp_path / "item" / "_METADATA"
    good = metadata.read_text()
    for text, words in (("{", "cannot be read"), ("[]", "cannot be read")):
        metadata.write_text(text)
        with pytest.raises(UserError, match=words):
            OrbaxArrays(tmp_path / "item")
    changed = json.loads(good)
    name = "('a', 'more')"
    changed["tree_metadata"][name] = json.loads(json.dumps(changed["tree_metadata"]["('a', 'wide')"]))
    changed["tree_metadata"][name]["key_metadata"][1]["key"] = "more"
    metadata.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="a/more is listed in _METADATA but not stored"):
        OrbaxArrays(tmp_path / "item")
    metadata.unlink()
    with pytest.raises(UserError, match="no _METADATA: not an Orbax item, or one whose saving was interrupted"):
        OrbaxArrays(tmp_path / "item")
    metadata.write_text(good)
    for file in tmp_path.glob("item/**/d/*"):
        file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match="cannot be read"):
        arrays = OrbaxArrays(tmp_path / "item")
        for path in arrays.shapes:
            arrays.read(path)


def test_a_step_appears_only_when_it_is_whole(tmp_path):
    with pytest.raises(RuntimeError), new_step(tmp_path / "0", {}) as writer:  # noqa: PT012
        writer.write(("a",), np.ones(3, np.float32))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_step(tmp_path / "0", {}) as writer:
        writer.write(("a",), np.ones(3, np.float32))
    with pytest.raises(UserError, match="exists already"), new_step(tmp_path / "0", {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
