# SPDX-License-Identifier: Apache-2.0
"""Distillation as a run: teachers of other layouts and widths, students of some layers, stored teachers, resume."""

import functools
import shutil

import jax
import numpy as np
import pytest
from tiny_chat import TEMPLATE, tokenizer
from tiny_models import tiny, weights

from maxkit import run as runs
from maxkit.checkpoint.kept_layers import KeptLayers, evenly_spaced, shallower
from maxkit.checkpoint.load import Loaded, load, open_source
from maxkit.checkpoint.save import save
from maxkit.config import Distill, resolve
from maxkit.data.tokenizer import Tokenizer, train_bpe
from maxkit.errors import UserError
from maxkit.formats import presets
from maxkit.models.config import BlockSpec, Execution, MoeConfig
from maxkit.models.definition import ModelDefinition

SIZES = {"vocab_size": 257, "max_seq_len": 128}
WIDE = {"embed_dim": 20, "num_heads": 5, "num_kv_heads": 5, "num_layers": 3, "tie_embeddings": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distill")


@pytest.fixture(scope="module")
def model(folder):
    """Makes a folder of a chat model with random weights: (layout, seed, sizes) -> its path."""

    @functools.cache
    def make(scan_layers=True, seed=0, tokens=None, **sizes):
        definition = ModelDefinition(tiny(**SIZES | sizes), Execution(scan_layers=scan_layers))
        path = folder / f"model-{make.cache_info().currsize}"
        save(Loaded(definition, weights(definition, seed), tokens or tokenizer(), (), "test"), path)
        return path

    return make


def begin(run_dir, student, teacher, **settings):
    given = {"steps": 4, "batch_size": 4, "seq_len": 48, "dataset": "synthetic", "checkpoint_period": 2}
    given |= {"run_dir": str(run_dir), "model": str(student), "teacher": str(teacher), "learning_rate": 0.01}
    given |= {"student_layers": 0, "nll_weight": 0.0, "num_vocab_tiling": 2, **settings}
    run = runs.start(resolve(Distill, environ={}, given={name: (value, "keyword") for name, value in given.items()}))
    run.load_data()
    run.load_model()
    return run


def measured(*arguments, **settings):
    """The held-out metrics before the first update."""
    run = begin(*arguments, **settings)
    found = run.evaluate().metrics
    run.store.close()
    return found


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(ours, theirs, **tolerance):
    ours, theirs = leaves(ours), leaves(theirs)
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_allclose(ours[path], value, err_msg=path, **{"rtol": 0, "atol": 0, **tolerance})


# ---------------------------------------------------------------- which layers


@pytest.mark.parametrize(
    ("num_layers", "count", "kept"),
    [
        (30, 10, (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)),
        (7, 4, (0, 2, 4, 6)),
        (5, 2, (0, 4)),
        (5, 1, (0,)),
        (3, 3, (0, 1, 2)),
    ],
)
def test_layers_are_evenly_spaced_and_both_ends_are_kept(num_layers, count, kept):
    assert evenly_spaced(num_layers, count) == kept


def test_every_count_gives_different_layers():
    for length in range(1, 40):
        for count in range(1, length + 1):
            found = evenly_spaced(length, count)
            assert len(set(found)) == count and found == tuple(sorted(found)) and found[0] == 0
            assert count == 1 or found[-1] == length - 1
            gaps = np.diff(found)
            assert not gaps.size or gaps.max() - gaps.min() <= 1


def test_layers_of_another_kind_than_their_new_place_are_refused_with_what_is_allowed():
    local, whole = BlockSpec(sliding_window=4), BlockSpec()
    gemma = tiny(num_layers=6, pattern=(local, whole))
    with pytest.raises(UserError, match=r"layers 0, 3, 5 of M are not .* allowed: 1, 2, 6$"):
        shallower(gemma, 3, "M")
    dense_first = tiny(
        num_layers=5,
        leading_blocks=(whole,),
        pattern=(BlockSpec(mlp="moe"),),
        moe=MoeConfig(num_experts=2, experts_per_token=1, mlp_dim=8),
    )
    assert shallower(dense_first, 3, "M")[0].blocks == dense_first.blocks[:3]
    with pytest.raises(UserError, match="student_layers=7: M has num_layers=5"):
        shallower(dense_first, 7, "M")


@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_kept_layers_are_those_of_the_source(scan_layers, model):
    source = open_source(model(scan_layers, num_layers=5))
    kept = KeptLayers(source, 3, "M")
    assert kept.config.num_layers == 3 and kept.facts["layers kept"] == "0, 2, 4 of 5"
    assert len(list(kept.addresses())) == len(set(kept.addresses())) == 2 + 9 * 3 + (not kept.config.tie_embeddings)
    for path, layer in kept.addresses():
        number = None if layer is None else (0, 2, 4)[layer]
        np.testing.assert_array_equal(kept.read(path, layer), source.read(path, number))
        assert kept.shape(path, layer) == kept.read(path, layer).shape
        assert kept.dtype(path, layer) == kept.read(path, layer).dtype


def test_a_damaged_layer_is_noticed_though_it_is_not_kept(model):
    """Of stacked layers there is one digest, which says nothing until all rows were read."""
    source = open_source(model(True, num_layers=5))
    path, read = "layers/mlp/up/kernel", source._reader.read

    def damaged(leaf, shape, dtype, row=None):
        value = np.array(read(leaf, shape, dtype, row))
        return value if row != 1 else -value

    source._reader.read = damaged
    kept = KeptLayers(source, 3, "M")
    with pytest.raises(UserError, match="up/kernel"):
        for layer in range(3):
            kept.read(path, layer)


def test_a_preset_of_a_real_family_loses_layers_too():
    assert shallower(presets.preset_config("gemma3-1b"), 2, "M")[0].num_layers == 2


# ---------------------------------------------------------------- teachers


def test_a_teacher_that_is_the_student_is_no_distance_away(folder, model):
    assert abs(measured(folder / "same", model(), model())["kl"]) < 1e-6


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_teacher_may_have_another_layout_width_and_depth(scan_layers, folder, model):
    """What a scanned teacher says to an unrolled student, and the reverse, is what one of the same layout says."""
    student, wide = model(not scan_layers), functools.partial(model, seed=1, **WIDE)
    settings = {"divergence": "reverse", "distill_temperature": 2.0}
    run = begin(folder / f"layout-{scan_layers}", student, wide(scan_layers), **settings)
    assert run.definition.execution.scan_layers is not scan_layers
    assert run.blueprint.teacher.definition.execution.scan_layers is scan_layers
    found = run.evaluate().metrics
    run.store.close()
    same = measured(folder / f"same-layout-{scan_layers}", student, wide(not scan_layers), **settings)
    assert found == pytest.approx(same, rel=1e-5) and found["kl"] > 0.1


def test_what_a_stored_teacher_says_is_nearly_all_of_it(folder, model):
    """With every token stored it is the whole teacher; of fewer, the divergence is at most the whole one."""
    whole = measured(folder / "online", model(), model(seed=1))
    assert measured(folder / "every", model(), model(seed=1), teacher_top_k=257) == pytest.approx(whole, rel=1e-4)
    some = measured(folder / "some", model(), model(seed=1), teacher_top_k=8)
    assert 0 < some["kl"] < whole["kl"] and some["loss/nll"] == pytest.approx(whole["loss/nll"], rel=1e-6)


# ---------------------------------------------------------------- runs


def broken_off(run, copy):
    """The run's folder as it was when update 2 had just been saved."""
    shutil.copytree(run.folder, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    return copy


@pytest.fixture(scope="module")
def deep(model):
    """A teacher of five layers, whose student keeps three."""
    return model(True, num_layers=5, seed=2)


@pytest.fixture(scope="module")
def learned(folder, deep):
    run = begin(folder / "learned", deep, deep, student_layers=3)
    before = run.evaluate().metrics
    run.train()
    return run, before


def test_the_divergence_falls(learned):
    run, before = learned
    assert run.definition.config.num_layers == 3 and "layers kept: 0, 2, 4 of 5" in run.report
    assert run.history[0]["kl"] > 0.05 and run.evaluate().metrics["kl"] < 0.9 * before["kl"]
    assert "teacher" in run.estimate().text


def test_a_distilled_student_loads_and_is_exported_as_the_shallow_model_it_is(learned, folder):
    run, _ = learned
    loaded = load(run.folder)
    assert loaded.config.num_layers == 3
    assert_same(loaded.params, run.params)
    save(run.loaded, folder / "exported", format="hf")
    assert load(folder / "exported").config.num_layers == 3


@pytest.mark.parametrize("stored", [False, True])
def test_a_resumed_run_is_the_unbroken_one(stored, learned, folder, deep, monkeypatch):
    whole, settings = learned[0], {"student_layers": 3}
    if stored:
        # Nothing is held out, and so has no columns.
        settings |= {"teacher_top_k": 4, "holdout_fraction": 0.0}
        whole = begin(folder / "stored", deep, deep, **settings)
        assert whole.frozen is None and whole.data.train.columns["teacher_ids"].shape[1:] == (48, 4)
        whole.train()
    copy = folder / f"again-{stored}"
    shutil.copytree(whole.folder, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    if stored:
        monkeypatch.setattr("maxkit.run.tasks.teacher_columns", lambda *_: pytest.fail("they are in the folder"))
    again = begin(copy, deep, deep, **settings)
    assert again.resumed_from == 2
    again.train()
    assert_same((again.params, again.state.opt_state), (whole.params, whole.state.opt_state))
    if not stored:
        assert again.baseline().metrics == pytest.approx(learned[1], rel=1e-6)
    again.store.close()


def test_accumulation_is_one_big_batch(learned, folder, deep):
    """Rows of very different lengths: the mean of means of the parts would be another update."""
    start, updates = leaves(learned[0].initial_params()), []
    for parts in (1, 4):
        settings = {"gradient_accumulation_steps": parts, "steps": 1, "optimizer": "sgd", "packing": False}
        run = begin(folder / f"parts-{parts}", deep, deep, student_layers=3, nll_weight=0.3, **settings)
        trained = run.data.train.columns["loss_mask"].sum(axis=1)
        assert trained.max() > trained.min()
        run.train()
        updates.append(np.concatenate([(x - start[path]).ravel() for path, x in leaves(run.params).items()]))
        run.store.close()
    assert np.linalg.norm(updates[1] - updates[0]) < 1e-5 * np.linalg.norm(updates[0])


# ---------------------------------------------------------------- what cannot be


def refused(match, *arguments, **settings):
    with pytest.raises(UserError, match=match) as caught:
        begin(*arguments, **settings)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_distilled_is_refused_in_one_line(folder, model):
    run_dir, student = folder / "refused", model()
    small = model(True, vocab_size=259)
    refused(f"teacher={small} has vocab_size=259 and model={student} has 257", run_dir, student, small)
    tokens = train_bpe(["abc"], 257).backend.to_str().replace('"<|endoftext|>"', '"<|end|>"')
    backend = type(tokenizer().backend).from_str(tokens)
    other = model(True, tokens=Tokenizer(backend, special={"eos": "<|end|>"}, chat_template=TEMPLATE))
    refused("token 0 is '<|end|>' to the teacher and '<|endoftext|>' to the student", run_dir, student, other)
    refused("seq_len=64: teacher=.* allows max_seq_len=32", run_dir, student, model(True, max_seq_len=32), seq_len=64)
    refused("teacher_top_k=300: teacher=.* has vocab_size=257", run_dir, student, student, teacher_top_k=300)
    refused("student_layers=3: .* has num_layers=2", run_dir, student, student, student_layers=3)
    refused("neither a path that exists nor a known name", run_dir, student, "smolm2")
