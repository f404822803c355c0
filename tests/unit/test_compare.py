# SPDX-License-Identifier: Apache-2.0
"""Comparison: equal is equal in every layout and format; one changed value is found where it is; nothing is hidden."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny_checkpoints import LORA, MODELS, definition_of, save_run
from tiny_models import weights

from maxkit import cli
from maxkit.checkpoint import compare as comparing
from maxkit.checkpoint.compare import compare, compare_contents, largest_difference
from maxkit.checkpoint.contents import StoreContents, TreeContents
from maxkit.checkpoint.convert import convert
from maxkit.checkpoint.inspect import find
from maxkit.errors import UserError
from maxkit.models.config import BlockSpec


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """{model: folder of its scanned run}, each made when first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def make(name, lora=None):
        if (name, lora) not in made:
            made[name, lora] = folder / str(len(made))
            save_run(made[name, lora], definition_of(name, True, lora))
        return made[name, lora]

    return make


def in_memory(name="gemma", scan=True, change=None, dtype=np.float32, **config):
    """A model's weights as contents; `change(leaves)` edits them."""
    definition = definition_of(name, scan)
    leaves = {path: np.array(x, dtype) for path, x in definition.flat(weights(definition)).items()}
    if change:
        change(leaves)
    return TreeContents(MODELS[name].model_copy(update=config), leaves, scan_layers=scan)


# ---------------------------------------------------------------- equal


@pytest.mark.parametrize("name", ["llama", "gemma", "deepseek"])
def test_layouts_of_one_state_are_equal_to_the_last_bit(run, tmp_path, name):
    convert(run(name), tmp_path / "unrolled", to="maxkit", scan_layers=False)
    found = compare(run(name), tmp_path / "unrolled", values=True, only="all", atol=0, rtol=0)
    assert found.equal and found.dtypes == {} and found.compared >= 90
    assert compare(tmp_path / "unrolled", run(name), only="all").equal


def test_a_run_and_its_export_are_equal(run, tmp_path):
    convert(run("llama"), tmp_path / "hf", to="hf")
    found = compare(run("llama"), tmp_path / "hf", values=True, atol=0, rtol=0)
    assert found.equal and found.compared == 30
    assert any("random numbers or dropout only in" in note and note.endswith("rng") for note in found.notes)
    everything = compare(run("llama"), tmp_path / "hf", only="all")
    assert {d.kind for d in everything.differences} == {"only in a", "scalar"}
    assert {d.slot for d in everything.differences} == {"params", "mu", "nu"}


def test_without_values_nothing_is_read(run, tmp_path, monkeypatch):
    convert(run("gemma"), tmp_path / "unrolled", to="maxkit", scan_layers=False)

    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(StoreContents, "read", refuse)
    assert compare(run("gemma"), tmp_path / "unrolled").equal


# ---------------------------------------------------------------- one difference, found where it is


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_one_changed_value_is_located(scan):
    def change(leaves):
        leaf = leaves["layers/block_0/mlp/up/kernel"] if scan else leaves["layers/layer_0/mlp/up/kernel"]
        row = leaf[0] if scan else leaf
        row[3, 17] += 0.25

    found = compare_contents(in_memory(scan=scan, change=change), in_memory(scan=not scan), values=True, atol=0, rtol=0)
    (difference,) = found.differences
    assert (difference.kind, difference.path, difference.layer) == ("values", "layers/mlp/up/kernel", 0)
    assert difference.index == (3, 17) and difference.count == 1
    assert difference.absolute == pytest.approx(0.25, rel=1e-5)
    assert difference.relative == pytest.approx(0.25 / abs(difference.b), rel=1e-5)
    assert "layers/mlp/up/kernel (layer 0) at [3, 17]" in difference.line()
    assert compare_contents(in_memory(scan=scan, change=change), in_memory(), values=True, atol=0.3).equal


def test_every_kind_of_difference_is_named():
    def change(leaves):
        del leaves["layers/layer_8/attention_norm/scale"]
        leaves["layers/layer_6/mlp/up/kernel"] = leaves["layers/layer_6/mlp/up/kernel"][..., :20]

    found = compare_contents(in_memory("llama"), in_memory("llama", rope_theta=500.0, family="mistral"))
    assert [d.line() for d in found.differences] == ["config: rope_theta: 10000.0 | 500.0"]
    same = {"max_seq_len": 7, "leading_blocks": (BlockSpec(),), "pattern": (BlockSpec(),) * 2}
    assert compare_contents(in_memory("llama"), in_memory("llama", **same)).equal
    windows = in_memory("llama", scan=False, pattern=(BlockSpec(), BlockSpec(sliding_window=4)))
    (difference,) = compare_contents(in_memory("llama"), windows).differences
    assert difference.line() == "config: kind of block (layer 1): {} | {'sliding_window': 4}" and difference.count == 1
    found = compare_contents(in_memory(scan=False, change=change), in_memory())
    assert [d.line() for d in found.differences] == [
        "only in b: layers/attention_norm/scale (layer 8)",
        "shape: layers/mlp/up/kernel (layer 6): [16, 20] | [16, 24]",
    ]


def test_types_are_reported_and_not_counted():
    found = compare_contents(in_memory(dtype="bfloat16"), in_memory())
    assert found.equal and found.dtypes == {"bfloat16 | float32": found.compared}
    assert "dtype, not counted" in "\n".join(found.lines())
    rounded = compare_contents(in_memory(dtype="bfloat16"), in_memory(), values=True)
    assert not rounded.equal and {d.kind for d in rounded.differences} == {"values"}
    assert compare_contents(in_memory(dtype="bfloat16"), in_memory(), values=True, rtol=2**-8).equal


def test_random_numbers_are_known_by_whole_parts_of_a_path():
    a, b = in_memory("llama"), in_memory("llama")
    a.scalars = {"opt_state/rngs/count": np.uint32(1), "dropout/key": np.zeros(2), "string": np.int32(4)}
    found = compare_contents(a, b, only="all")
    assert [d.line() for d in found.differences] == ["scalar: string: 4 | None"]
    assert "not counted: random numbers or dropout only in a: dropout/key, opt_state/rngs/count" in found.notes


def test_one_function_stated_in_two_ways_is_equal():
    """MaxText keeps the factor of the attention in the queries' kernel, Gemma's norms their 1."""

    def change(leaves):
        for path, leaf in leaves.items():
            if path.endswith("query/kernel"):
                leaf *= 0.5  # head_dim 4
            if path.endswith("norm/scale"):
                leaf -= 1

    a, b = in_memory("llama"), in_memory("llama", change=change, attention_scale=1.0, norm_scale_offset=1.0)
    found = compare_contents(a, b, values=True)
    assert found.equal, found.differences
    assert any("attention_scale, norm_scale_offset" in note and "query scale" in note for note in found.notes)
    assert not compare_contents(a, in_memory("llama", change=change), values=True).equal


# ---------------------------------------------------------------- numbers


VALUES = st.floats(width=32) | st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0])


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from([0.0, 1e-5, 0.5]), st.sampled_from([0.0, 1e-5, 0.5]), st.sampled_from([2, 1000]))
def test_it_agrees_with_numpy(data, atol, rtol, piece):
    shape = data.draw(arrays.array_shapes(min_dims=0, max_dims=3, max_side=4))
    a = data.draw(arrays.arrays(np.float32, shape, elements=VALUES))
    b = np.where(data.draw(arrays.arrays(bool, shape)), a, data.draw(arrays.arrays(np.float32, shape, elements=VALUES)))
    before, comparing._PIECE = comparing._PIECE, piece
    try:
        found = largest_difference(a, b.astype(np.float32), atol, rtol)
    finally:
        comparing._PIECE = before
    x, y = a.astype(np.float64), b.astype(np.float64)
    close = np.isclose(x, y, rtol=rtol, atol=atol, equal_nan=True)
    assert (found is None) == bool(close.all())
    if found is not None:
        assert found["count"] == int((~close).sum())
        with np.errstate(invalid="ignore"):
            gaps = np.where(close, -1, np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf))
        assert found["absolute"] == gaps.max() and gaps[found["index"]] == gaps.max()


def test_nan_and_infinities():
    a = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    assert largest_difference(a, a.copy(), 0, 0) is None
    b = np.array([np.nan, -np.inf, -np.inf, 2.0], np.float32)
    found = largest_difference(a, b, 10.0, 10.0)
    assert found["count"] == 1 and found["index"] == (1,) and found["absolute"] == np.inf
    assert largest_difference(a, np.array([0, np.inf, -np.inf, 1], np.float32), 1, 1)["absolute"] == np.inf


# ---------------------------------------------------------------- the command


def test_exit_codes_and_json(run, tmp_path, capsys):
    folder = run("llama", LORA)
    convert(folder, tmp_path / "same", to="maxkit", scan_layers=False)
    assert cli.main(["compare", str(folder), str(tmp_path / "same"), "--values", "--only", "all"]) == 0
    assert capsys.readouterr().out.startswith("equal: values of ")
    changed = tmp_path / "changed"
    save_run(changed, definition_of("llama", True, LORA), step=9)
    assert cli.main(["compare", str(folder), str(changed), "--only", "all", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["equal"] and found["compared"] > 40
    assert [d for d in found["differences"] if d["path"] == "step"] == [
        {"kind": "scalar", "path": "step", "slot": "params", "a": 7, "b": 9}
    ]
    assert cli.main(["compare", str(folder), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["compare", str(folder), str(folder), "--atol", "-1"]) == 2


def test_infinite_differences_are_valid_json():
    def change(leaves):
        leaves["final_norm/scale"][2] = np.inf

    found = compare_contents(in_memory(change=change), in_memory(), values=True)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["differences"][0]["absolute"] == "inf"


def test_damage_is_refused_and_no_difference(run, tmp_path):
    shutil.copytree(run("llama"), tmp_path / "damaged")
    data = sorted(find(tmp_path / "damaged").path.rglob("d/*"), key=lambda p: p.stat().st_size)[-1]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(UserError, match="digest differs|cannot be read"):
        compare(run("llama"), tmp_path / "damaged", values=True, only="all")
