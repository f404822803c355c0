# SPDX-License-Identifier: Apache-2.0
"""Missing, unexpected, misshapen and mistyped tensors, of weights and of a run's state: each policy, all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import MODELS, POSITION, definition_of, record_of, save_run, state_of
from tiny_models import tiny, weights

from maxkit import mesh as meshes
from maxkit.checkpoint import digest, mismatch
from maxkit.checkpoint.contents import TreeContents
from maxkit.checkpoint.convert import convert
from maxkit.checkpoint.load import read_params, source_dtype
from maxkit.checkpoint.store import CheckpointStore
from maxkit.errors import UserError
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition

DEFINITION = definition_of("llama", True)


# ---------------------------------------------------------------- weights


def contents(change=None, dtype=np.float32, scan=True):
    definition = definition_of("llama", scan)
    leaves = {path: np.array(x, dtype) for path, x in definition.flat(weights(definition)).items()}
    if change:
        change(leaves)
    return TreeContents(MODELS["llama"], leaves, scan_layers=scan)


def read(source, definition=DEFINITION, **policies):
    report = []
    return definition.flat(read_params(source, definition, None, report=report, **policies)), report


def broken(leaves):
    """One of each kind of problem."""
    del leaves["layers/layer_2/mlp_norm/scale"]
    leaves["layers/layer_1/mlp/up/kernel"] = np.zeros((16, 20), np.float32)
    leaves["embed/table"] = np.zeros((40, 16), np.float32)
    leaves["layers/layer_0/attention/query/bias"] = np.zeros((4, 4), np.float32)
    leaves["final_norm/scale"] = np.ones(16, np.float64)


def test_everything_that_does_not_fit_is_in_one_message():
    with pytest.raises(UserError) as caught:
        read(contents(broken, scan=False), cast=False)
    text = str(caught.value)
    for words in (
        "1 tensor of the model is not in the checkpoint: layers/mlp_norm/scale (layer 2): expected float32[16], "
        "found nothing -> model",
        "2 tensors of the checkpoint have another shape: embed/table: expected [48, 16], found [40, 16] -> vocab_size",
        "layers/mlp/up/kernel (layer 1): expected [16, 24], found [16, 20] -> mlp_dim",
        "1 tensor of the checkpoint is not part of the model: layers/attention/query/bias (layer 0): expected nothing, "
        "found float32[4, 4] -> model",
        "final_norm/scale is stored as float64, which float32 does not hold: say which with dtype=",
    ):
        assert words in text, words
    assert "\n" not in text
    # In the same order again.
    with pytest.raises(UserError) as again:
        read(contents(broken, scan=False), cast=False)
    assert str(again.value) == text


def test_of_many_problems_each_is_named_and_in_one_order():
    """A model of 30 layers and other widths: 26 layers of 9 tensors missing, 3 of another shape, none left out."""
    deep = ModelDefinition(tiny(num_layers=30, embed_dim=24, mlp_dim=20), Execution())
    texts = set()
    for scan in (True, False):
        with pytest.raises(UserError) as caught:
            read(contents(scan=scan), deep)
        texts.add(str(caught.value))
    (text,) = texts  # layouts that differ are no problem, and none is blamed on them
    assert "243 tensors of the model are not in the checkpoint" in text and "and more" not in text
    assert "layers/mlp/up/kernel (layers 3-29): expected float32[24, 20], found nothing -> num_layers" in text
    assert "layers/mlp/up/kernel (layers 0-2): expected [24, 20], found [16, 24] -> embed_dim, mlp_dim" in text
    assert "embed/table: expected [48, 24], found [48, 16] -> embed_dim" in text and "scan_layers" not in text
    assert text.count(" -> ") == 9 + 12  # each name once, with its hint
    fewer = ModelDefinition(tiny(num_layers=1), Execution())
    with pytest.raises(UserError, match=r"mlp/up/kernel \(layers 1-2\): expected nothing, found .* -> num_layers"):
        read(contents(), fewer)
    tied = ModelDefinition(tiny(num_layers=3, tie_embeddings=True), Execution())
    with pytest.raises(UserError, match=r"output/kernel: expected nothing, found float32\[48, 16\] -> tie_embeddings"):
        read(contents(), tied)


def test_foreign_names_are_collapsed_and_none_is_left_out():
    names = [f"vision.layers.{n}.{part}.weight" for part in ("key", "query") for n in (*range(24), 30)]
    assert mismatch.collapsed([*names, "vision.head", "a.2"]) == [
        "vision.layers.{0-23, 30}.key.weight",
        "vision.layers.{0-23, 30}.query.weight",
        "vision.head",
        "a.2",
    ]


@pytest.mark.parametrize("missing", ["warn", "init"])
def test_of_a_stack_only_the_missing_layer_is_made_up(missing):
    def change(leaves):
        del leaves["layers/layer_1/mlp/up/kernel"]

    leaves, report = read(contents(change, scan=False), missing=missing)
    want = DEFINITION.flat(weights(DEFINITION))["layers/block_0/mlp/up/kernel"]
    made = np.asarray(leaves["layers/block_0/mlp/up/kernel"])
    np.testing.assert_array_equal(made[[0, 2]], want[np.array([0, 2])])
    assert np.any(made[1]) == (missing == "init")
    fill = "zeros" if missing == "warn" else "its initial value"
    assert report == [f"missing, filled with {fill}: layers/block_0/mlp/up/kernel [3, 16, 24] float32"]


def test_shapes_are_an_error_under_every_policy():
    def change(leaves):
        leaves["final_norm/scale"] = np.zeros(17, np.float32)

    for missing in ("error", "warn", "init"):
        with pytest.raises(UserError, match=r"final_norm/scale: expected \[16\], found \[17\] -> embed_dim"):
            read(contents(change), missing=missing, unexpected="warn")


def test_a_type_is_cast_only_when_asked_for():
    half = ModelDefinition(MODELS["llama"], Execution(), None, "bfloat16")
    with pytest.raises(UserError, match="is stored as float32, which bfloat16 does not hold: say which with dtype="):
        read(contents(), half, cast=False)
    leaves, report = read(contents(), half, cast=True)
    assert {x.dtype for x in leaves.values()} == {jnp.dtype("bfloat16")} and report == ["cast from float32 to bfloat16"]
    assert read(contents(dtype="bfloat16"), cast=False)[1] == ["cast from bfloat16 to float32"]  # loses nothing


def test_a_layer_of_another_type_is_not_cast_unasked():
    """The type of a stack is not that of its first layer."""

    def change(leaves):
        leaves["layers/layer_1/mlp/up/kernel"] = leaves["layers/layer_1/mlp/up/kernel"].astype(np.float32)

    half = ModelDefinition(MODELS["llama"], Execution(), None, "bfloat16")
    with pytest.raises(
        UserError, match=r"layers/mlp/up/kernel \(layer 1\) is stored as float32, which bfloat16 does not"
    ):
        read(contents(change, dtype="bfloat16", scan=False), half, cast=False)
    _, report = read(contents(change, dtype="bfloat16", scan=False), half, cast=True)
    assert report == ["cast from float32 to bfloat16"]


def test_layouts_of_teacher_and_student_may_differ():
    """Two checkpoints of different layouts in one process, and one read in a layout that it is not stored in."""
    for stored in (True, False):
        for wanted in (True, False):
            definition = definition_of("llama", wanted)
            leaves, _ = read(contents(scan=stored), definition)
            for path, leaf in definition.flat(weights(definition)).items():
                np.testing.assert_array_equal(leaves[path], leaf)


# ---------------------------------------------------------------- the state of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, save_run(folder, DEFINITION)


def abstract(state):
    return jax.eval_shape(lambda: state)


def other_state():
    """The state of a model with biases, trained with another optimizer."""
    wider = ModelDefinition(tiny(num_layers=3, attention_bias=True), Execution())
    return state_of(wider, "adam_pax")


def restore(folder, target, **policies):
    with CheckpointStore(folder / "checkpoints", read_only=True) as store:
        return store.restore(None, abstract(target), **policies)


def test_a_missing_statistic_is_an_error_unless_a_policy_says_otherwise(run):
    folder, state = run
    target = other_state()
    with pytest.raises(UserError) as caught:
        restore(folder, target)
    for words in (
        "params/layers/block_0/attention/query/bias: expected float32[3, 4, 4], found nothing",
        "opt_state/mu/embed/table: expected float32[48, 16], found nothing -> optimizer",
        "opt_state/0/nu/embed/table: expected nothing, found float32[48, 16] -> optimizer",
    ):
        assert words in str(caught.value), words
    with pytest.raises(UserError, match="opt_state/0/nu/embed/table: expected nothing"):
        restore(folder, target, missing="warn")
    found = restore(folder, target, missing="warn", unexpected="warn")
    assert not np.any(found.state.opt_state.mu["embed"]["table"]) and int(found.state.step) == 7
    np.testing.assert_array_equal(found.state.params["embed"]["table"], state.params["embed"]["table"])
    assert "missing, filled with zeros: opt_state/count" in found.notes
    assert "not used: opt_state/2/count" in found.notes
    begun = restore(folder, target, missing="init", unexpected="warn", initial=lambda: target)
    np.testing.assert_array_equal(begun.state.opt_state.nu["embed"]["table"], target.opt_state.nu["embed"]["table"])
    assert "missing, filled with its initial value: opt_state/count" in begun.notes


@pytest.mark.parametrize("missing", ["error", "warn", "init"])
@pytest.mark.parametrize("unexpected", ["error", "warn"])
def test_every_policy_for_weights_and_statistics(run, missing, unexpected):
    """What the policies allow is done and said, what they do not is listed, at once and in order."""
    folder, _ = run
    target = other_state()
    expected, found = (set(digest.named_leaves(state)) for state in (target, run[1]))
    absent, extra = expected - found, found - expected
    assert {path.split("/")[0] for path in absent} == {"params", "opt_state"}
    refused = sorted((absent if missing == "error" else set()) | (extra if unexpected == "error" else set()))
    policies = {"missing": missing, "unexpected": unexpected, "initial": lambda: target}
    if refused:
        texts = []
        for _ in range(2):
            with pytest.raises(UserError) as caught:
                restore(folder, target, **policies)
            texts.append(str(caught.value))
        assert texts[0] == texts[1] and "ShapeDtypeStruct" not in texts[0]
        lines = [line.strip() for line in texts[0].splitlines()[1:]]
        assert [line.partition(":")[0] for line in lines] == refused
        assert all(" -> " in line for line in lines)
        return
    restored = restore(folder, target, **policies)
    assert len(restored.notes) == len(absent) + len(extra)
    leaves, begun = digest.named_leaves(restored.state), digest.named_leaves(target)
    for path in absent:
        wanted = np.asarray(begun[path]) if missing == "init" else np.zeros_like(begun[path])
        np.testing.assert_array_equal(leaves[path], wanted, err_msg=path)


@pytest.mark.parametrize("policies", [{}, {"missing": "warn"}, {"missing": "init", "unexpected": "warn"}])
def test_a_statistic_of_another_type_or_shape_is_an_error_under_every_policy(run, policies):
    folder, state = run

    def other(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("mu/final_norm/scale"):
            return leaf.astype(jnp.bfloat16)
        return leaf[:-1] if name.endswith("nu/embed/table") else leaf

    target = jax.tree_util.tree_map_with_path(other, state)
    with pytest.raises(UserError) as caught:
        restore(folder, target, **policies, initial=lambda: target)
    assert str(caught.value).splitlines()[1:] == [
        "  opt_state/0/mu/final_norm/scale: expected bfloat16[16], found float32[16] -> dtype of the weights",
        "  opt_state/0/nu/embed/table: expected float32[47, 16], found float32[48, 16] -> vocab_size",
    ]


def test_a_shape_is_an_error_under_every_policy(run):
    target = state_of(ModelDefinition(tiny(num_layers=3, mlp_dim=20), Execution()))
    for missing in ("error", "warn", "init"):
        with pytest.raises(UserError, match=r"mlp/up/kernel: expected float32\[3, 16, 20\], found .* -> mlp_dim"):
            restore(run[0], target, missing=missing, unexpected="warn", initial=lambda: target)


def test_an_absent_key_is_made_from_seed_0_whatever_the_policy(run, tmp_path):
    folder, state = run
    keys = {"rng": state.rng, "rngs": {"key": jax.random.split(jax.random.key(9), 3), "count": jnp.uint32(4)}}
    target = state.__class__(state.step, state.params, {}, state.opt_state, keys)
    with CheckpointStore(tmp_path / "checkpoints") as store:
        partial = state.__class__(state.step, state.params, {}, state.opt_state, {"rng": state.rng})
        store.save(7, partial, record_of(DEFINITION), POSITION)
    found = restore(tmp_path, target)
    again = restore(tmp_path, target)
    made, remade = (x.state.rng["rngs"]["key"] for x in (found, again))
    assert made.shape == (3,) and made.dtype == keys["rngs"]["key"].dtype
    np.testing.assert_array_equal(jax.random.key_data(made), jax.random.key_data(remade))
    assert len(np.unique(np.asarray(jax.random.key_data(made)), axis=0)) == 3
    assert int(found.state.rng["rngs"]["count"]) == 0
    assert jax.random.bits(found.state.rng["rng"]) == jax.random.bits(state.rng)
    assert found.notes == (
        "missing, filled with seed 0: rng/rngs/count",
        "missing, filled with seed 0: rng/rngs/key",
    )


def test_what_is_made_up_lies_where_the_target_says(run):
    mesh = meshes.make_mesh("")
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.replicated(mesh)), abstract(other_state())
    )
    with CheckpointStore(run[0] / "checkpoints", read_only=True) as store:
        found = store.restore(None, target, missing="warn", unexpected="warn")
    for leaf in jax.tree.leaves(found.state):
        assert leaf.sharding.is_equivalent_to(meshes.replicated(mesh), leaf.ndim)


def test_weights_alone_are_no_run_to_continue(run, tmp_path):
    convert(run[0], tmp_path / "weights", to="maxkit", params_only=True)
    with pytest.raises(UserError, match="holds weights alone.*load_parameters_path=") as caught:
        restore(tmp_path / "weights", run[1])
    assert "\n" not in str(caught.value)
    found = restore(tmp_path / "weights", run[1], missing="init", initial=lambda: run[1])
    assert digest.digest_tree(found.state.params) == digest.digest_tree(run[1].params)


def test_weights_of_two_types_are_loaded_in_the_one_that_holds_both():
    """DeepSeek publishes bfloat16 weights with float32 corrections; nothing is lost without being asked."""

    def change(leaves):
        leaves["final_norm/scale"] = np.full(16, 1 + 2**-20, np.float32)

    source = contents(change, dtype="bfloat16")
    assert [source_dtype(contents(dtype="bfloat16")), source_dtype(source)] == ["bfloat16", "float32"]
    leaves, report = read(source, cast=False)
    assert {x.dtype for x in leaves.values()} == {jnp.dtype("float32")} and report == ["cast from bfloat16 to float32"]
    assert leaves["final_norm/scale"][0] == np.float32(1 + 2**-20)
