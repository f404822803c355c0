# SPDX-License-Identifier: Apache-2.0
"""MaxText's own checkpoints through maxkit and Hugging Face and back: every array's digest is what MaxText wrote.

`MAXKIT_MAXTEXT_FIXTURES` names a folder with more of the kind.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import train, write_corpus

from maxkit.checkpoint.compare import compare, compare_contents
from maxkit.checkpoint.contents import StoreContents
from maxkit.checkpoint.convert import convert
from maxkit.checkpoint.inspect import find
from maxkit.checkpoint.load import load
from maxkit.checkpoint.raw import RawContents
from maxkit.checkpoint.save import save
from maxkit.errors import UserError
from maxkit.formats.orbax_arrays import OrbaxArrays

FOLDER = Path(__file__).parent.parent / "fixtures" / "maxtext"
MORE = os.environ.get("MAXKIT_MAXTEXT_FIXTURES")
FIXTURES = {
    p.parent.name: p.parent for root in (MORE, FOLDER) if root for p in Path(root).glob("*/config_resolved.txt")
}
NAMES = sorted(FIXTURES)
# Written by no release in this form; what is converted back is in the form of today's NNX runs.
OTHER_FORM = [name for name in NAMES if name.startswith("nnxnative")]
every = pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHER_FORM])


def source(name):
    return FIXTURES[name] / "checkpoints", FIXTURES[name] / "config_resolved.txt"


def recorded(name):
    manifest = json.loads((FIXTURES[name] / "manifest.json").read_text())
    leaves = manifest["leaves"] if "leaves" in manifest else next(iter(manifest["steps"].values()))["leaves"]
    return {path: leaf["sha256"] for path, leaf in leaves.items() if leaf}


def stored(folder):
    arrays = OrbaxArrays(folder / "0" / "items")
    return {
        path: hashlib.sha256(np.ascontiguousarray(arrays.read(path)).tobytes()).hexdigest()
        for path, leaf in arrays.leaves.items()
        if leaf.is_array
    }


@every
def test_to_maxkit_and_back_every_array_has_its_bytes(tmp_path, name):
    path, config = source(name)
    there = convert(path, tmp_path / "there", to="maxkit", config=config)
    assert compare(path, there.path, config_a=config, values=True, only="all", atol=0, rtol=0).equal
    back = convert(
        there.path,
        tmp_path / "back",
        to="maxtext-linen" if "linen" in name else "maxtext-nnx",
        params_only=name.startswith("paramonly"),
        param_scan_axis=0 if name.startswith("axis0") else None,
    )
    assert stored(back.path) == recorded(name)
    # What was converted says what it is: no config is needed any more.
    found = compare(path, back.path, config_a=config, values=True, only="all", atol=0, rtol=0)
    assert found.equal, list(found.lines())


@every
def test_by_way_of_the_other_layout(tmp_path, name):
    path, config = source(name)
    there = convert(path, tmp_path / "there", to="maxkit", config=config)
    scan = there.plan.scan_layers
    other = convert(there.path, tmp_path / "other", to="maxkit", scan_layers=not scan)
    back = convert(other.path, tmp_path / "back", to="maxkit", scan_layers=scan)
    one, two = (StoreContents(find(x.path).path).manifest for x in (there, back))
    assert one == two
    assert compare(path, other.path, config_a=config, values=True, only="all", atol=0, rtol=0).equal


@pytest.mark.parametrize("name", [name for name in NAMES if "deepseek" not in name])
def test_through_a_hugging_face_folder(tmp_path, name):
    """Rewritten tensors (the factor in the queries, the 1 in Gemma's norms) within rounding, all others exactly."""
    path, config = source(name)
    there = convert(path, tmp_path / "hf", to="hf", config=config)
    rewritten = {note.rpartition(" in ")[2] for note in there.plan.notes if note.startswith("rewritten: ")}
    assert rewritten and rewritten <= {leaf.tensors[0].path for leaf in there.plan.leaves}
    back = convert(there.path, tmp_path / "back", to="maxtext-nnx", params_only=True)
    half = any(leaf.dtype == "bfloat16" for leaf in there.plan.leaves)
    exact = compare(path, back.path, config_a=config, values=True, atol=0, rtol=0)
    assert {d.path for d in exact.differences} <= rewritten
    step = 2**-7 if half else 2**-22
    assert compare(path, back.path, config_a=config, values=True, atol=step, rtol=step).equal


def test_deepseek_as_maxtext_computes_it_is_refused_for_hugging_face(tmp_path):
    path, config = source("deepseek_nnx_scanned_025")
    with pytest.raises(UserError, match="deepseek_v3 model cannot have moe=") as caught:
        convert(path, tmp_path / "hf", to="hf", config=config)
    assert "\n" not in str(caught.value) and not (tmp_path / "hf").exists()


def test_without_a_config_it_is_refused(tmp_path):
    with pytest.raises(UserError, match="config"):
        convert(source("muon_scanned_025")[0], tmp_path / "a", to="maxkit")


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_compared_without_a_config_by_names_and_values(tmp_path, kind):
    """The unrolled fixtures are slices of the scanned ones."""
    version = "024" if kind == "linen" else "025"
    a, b = (FIXTURES[f"paramonly_{kind}_{layout}_{version}"] for layout in ("scanned", "unrolled"))
    found = compare(a, b, values=True, atol=0, rtol=0)
    assert found.equal and found.compared == 39 and "is not undone" in found.notes[0]
    one = compare(a, b, config_b=b / "config_resolved.txt", values=True, atol=0, rtol=0)
    assert one.equal and "records no architecture: read as" in one.notes[0]
    other = compare(a, FIXTURES["sgd_unscanned_025"])
    assert not other.equal and {d.kind for d in other.differences} == {"shape"}


def test_every_pattern_of_layers_is_known_by_its_names(tmp_path):
    for name in ("gemma3_nnx_scanned_025", "deepseek_nnx_scanned_025"):
        path, config = source(name)
        there = convert(path, tmp_path / name, to="maxtext-linen", config=config, scan_layers=False)
        found = compare_contents(RawContents(path), RawContents(there.path), values=True, atol=0, rtol=0, only="all")
        assert found.equal and found.compared > 200, list(found.lines())


def test_one_flipped_value_is_located_across_formats(tmp_path):
    path, config = source("gemma3_nnx_scanned_025")
    loaded = load(path, config=config, scan_layers=True)
    leaves = loaded.definition.flat(loaded.params)
    place = next(p for p in leaves if p.endswith("block_0/mlp/up/kernel"))
    leaves[place] = leaves[place].at[0, 3, 5].add(0.5)
    save((loaded.definition, loaded.definition.unflat(leaves)), tmp_path / "changed", scan_layers=False)
    found = compare(path, tmp_path / "changed", config_a=config, values=True)
    (difference,) = found.differences
    assert (difference.path, difference.index, difference.count) == ("layers/mlp/up/kernel", (3, 5), 1)
    assert difference.layer == loaded.definition.parameters[place].layers[0]
    assert difference.absolute == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("format", ["maxtext-linen", "maxtext-nnx"])
def test_saved_for_maxtext(tmp_path, format):
    path, config = source("sgd_unscanned_025")
    loaded = load(path, config=config)
    save(loaded, tmp_path / "saved", format=format, scan_layers=True)
    assert compare(path, tmp_path / "saved", config_a=config, values=True, atol=0, rtol=0).equal
    metadata = json.loads((tmp_path / "saved" / "0" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert metadata["scan_layers"] is True
    assert load(tmp_path / "saved").definition.execution.scan_layers is True


def test_a_run_goes_on_from_state_that_maxtext_keeps(tmp_path):
    """Two updates, to MaxText's form and back, two more: all is there but the position in the data, which is said."""
    corpus = write_corpus(tmp_path / "corpus.txt")
    train(tmp_path / "first", corpus, steps=2).finish()
    theirs = convert(tmp_path / "first", tmp_path / "theirs", to="maxtext-linen")
    folder = convert(theirs.path, tmp_path / "ours", to="maxkit").path
    # MaxText keeps the factor of attention in the queries' kernel: a config without it is another model.
    with pytest.raises(
        UserError, match="holds a checkpoint of another model .attention_scale: 1.0, and None.*: model="
    ):
        train(folder, corpus)
    again = train(folder, corpus, model=str(folder))
    assert (again.resumed_from, again.steps_done, int(again.state.opt_state[0].count)) == (2, 4, 4)
    (line,) = [line for line in again.report if line.startswith("data: from the beginning")]
    assert line.endswith("goes on from update 2")
    again.finish()
