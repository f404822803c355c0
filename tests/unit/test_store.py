# SPDX-License-Identifier: Apache-2.0
"""The checkpoint store: what comes back is what went in, on any mesh; policies; one message for what does not
fit.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxkit import mesh as meshes
from maxkit.checkpoint import digest, manifest, restore
from maxkit.checkpoint.arrays import ArrayReader
from maxkit.checkpoint.store import CheckpointStore, RunRecord, set_iterator_state
from maxkit.errors import UserError
from maxkit.types import TrainState


def make_params(num_layers=2, embed_dim=8, mlp_dim=16, scan_layers=True, dtype=jnp.float32):
    def block(key, lead=()):
        up, scale = jax.random.split(key)
        return {
            "attention_norm": {"scale": jax.random.normal(scale, (*lead, embed_dim), dtype)},
            "mlp": {"up": {"kernel": jax.random.normal(up, (*lead, embed_dim, mlp_dim), dtype)}},
        }

    key = jax.random.key(0)
    if scan_layers:
        layers = {"block_0": block(key, (num_layers,))}
    else:
        layers = {f"layer_{i}": block(jax.random.fold_in(key, i)) for i in range(num_layers)}
    return {"embed": {"table": jax.random.normal(key, (32, embed_dim), dtype)}, "layers": layers}


def make_state(step=0, optimizer=None, **sizes):
    params = make_params(**sizes)
    optimizer = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = optimizer.init(params)
    grads = jax.tree.map(lambda x: x * (step + 1), params)
    _, opt_state = optimizer.update(grads, opt_state, params)
    return TrainState(jnp.int32(step), params, {}, opt_state, jax.random.fold_in(jax.random.key(1), step))


RECORD = RunRecord(
    scan_layers=True,
    config={"embed_dim": 8, "betas": (0.9, 0.999), "limit": float("inf"), "none": None},
    explicit={"embed_dim": "papermill"},
    model={"family": "llama"},
    groups=(manifest.GroupRecord(name="layers", pattern_length=1, repeats=2),),
    optimizer="adamw",
    tokenizer={"tokenizer.json": b'{"version": "1.0"}', "sub/merges.txt": b"a b\n"},
    parent="smollm2",
    data="Shakespeare",
)


def abstract(state):
    return jax.eval_shape(lambda: state)


def test_round_trip_is_bit_equal(tmp_path):
    state = make_state(7)
    with CheckpointStore(tmp_path / "run" / "checkpoints") as store:
        assert store.latest_step() is None
        assert store.save(7, state, RECORD, {"position": [1, 2]}, {"loss": 1.5, "bad": float("nan")})
        assert store.save(7, state, RECORD) is False
        found, record, position, notes = store.restore(None, abstract(state))
    assert digest.digest_tree(found) == digest.digest_tree(state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert found.rng.dtype == state.rng.dtype and (jax.random.bits(found.rng) == jax.random.bits(state.rng))
    assert position == {"position": [1, 2]} and notes == ()
    assert record.step == 7 and record.scan_layers is True and record.explicit == {"embed_dim": "papermill"}
    assert record.metrics["loss"] == 1.5 and np.isnan(record.metrics["bad"])
    assert record.config["limit"] == float("inf") and record.num_params() == sum(
        leaf.size for leaf in jax.tree.leaves(state.params)
    )
    step_path = store.step_path(7)
    assert manifest.read_tokenizer(step_path, record) == RECORD.tokenizer
    custom = json.loads((step_path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert custom == {"scan_layers": True, "format": "maxkit", "version": 1}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "momentum", "injected", "masked", "none"])
def test_every_kind_of_optimizer_state(tmp_path, optimizer):
    kinds = {
        "adamw": optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
        "sgd": optax.sgd(1e-2),
        "momentum": optax.sgd(optax.linear_schedule(1.0, 0.0, 10), momentum=0.9),
        "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        "masked": optax.masked(optax.adam(1e-3), {"embed": True, "layers": False}),
        "none": optax.identity(),
    }
    state = make_state(3, kinds[optimizer])
    with CheckpointStore(tmp_path) as store:
        store.save(3, state, RECORD)
        found = store.restore(3, abstract(state)).state
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert digest.digest_tree(found) == digest.digest_tree(state)


def test_other_dtypes_keys_and_empty_arrays(tmp_path):
    tree = {
        "half": jnp.ones((3,), jnp.bfloat16),
        "byte": jnp.arange(-3, 3, dtype=jnp.int8),
        "flag": jnp.array([True, False]),
        "empty": jnp.zeros((0, 4)),
        "scalar": jnp.float32(-0.0),
        "keys": jax.random.split(jax.random.key(5, impl="rbg"), 3),
        "host": np.arange(4, dtype=np.float32),
        "eight": jnp.ones((2, 2), jnp.float8_e4m3fn),
    }
    state = TrainState(jnp.int32(0), tree, {"frozen": jnp.ones(2)}, (), jax.random.key(0))
    with CheckpointStore(tmp_path) as store:
        store.save(0, state, RECORD)
        found = store.restore(0, abstract(state)).state
    assert digest.digest_tree(found) == digest.digest_tree(state)
    assert found.params["keys"].dtype == tree["keys"].dtype and found.params["empty"].shape == (0, 4)


def test_donated_buffers_are_safe(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    params = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    state = TrainState(jnp.int32(0), params, {}, {"m": params["w"] + 1}, jnp.zeros(2, jnp.uint32))
    expected = {}
    with CheckpointStore(tmp_path) as store:
        for number in range(4):
            state = step(state)
            expected[number] = digest.digest_tree(state)
            store.save(number, state, RECORD)
            for _ in range(3):
                state = step(state)  # overwrites the buffers that are being saved
        for number in range(4):
            assert digest.digest_tree(store.restore(number, abstract(state)).state) == expected[number]


def test_keeps_the_newest_the_best_and_every_nth(tmp_path):
    state = make_state()
    losses = {1: 3.0, 2: 0.5, 3: float("nan"), 4: 2.0, 5: 0.5, 6: 4.0, 7: 4.0, 8: 5.0}
    with CheckpointStore(tmp_path, max_to_keep=2, best_metric="loss", keep_period=4) as store:
        for step, loss in losses.items():
            store.save(step, state, RECORD, metrics={"loss": loss})
        store.wait()
        assert store.all_steps() == [4, 5, 7, 8]  # 5 is as good as 2 and newer; 4 and 8 are multiples of 4
        assert store.best_step() == 5 and store.latest_step() == 8
    with CheckpointStore(tmp_path, max_to_keep=1, best_metric="loss", best_mode="max") as store:
        assert store.best_step() == 8
        store.save(9, state, RECORD, metrics={"loss": 1.0})
        store.wait()
        assert store.all_steps() == [8, 9]
    assert not [p.name for p in tmp_path.iterdir() if not p.name.isdecimal() and p.name != ".lock"]
    with pytest.raises(UserError, match="max_to_keep=0"):
        CheckpointStore(tmp_path, max_to_keep=0)


def test_a_save_that_is_still_running_never_costs_the_only_good_step(tmp_path):
    state = make_state()
    with CheckpointStore(tmp_path, max_to_keep=1) as store:
        for step in range(1, 6):
            store.save(step, state, RECORD)
            whole = [s for s in store.all_steps()]
            assert step == 1 or whole, "the step before is there until the new one is"
        store.wait()
        assert store.all_steps() == [5]


def message_of(tmp_path, saved, target):
    with CheckpointStore(tmp_path) as store:
        store.save(1, saved, RECORD)
        with pytest.raises(UserError) as caught:
            store.restore(1, abstract(target))
    assert not isinstance(caught.value, manifest.DamagedCheckpoint)
    return str(caught.value)


def test_mismatch_lists_every_shape_with_its_field(tmp_path):
    text = message_of(tmp_path, make_state(), make_state(embed_dim=12, mlp_dim=24, num_layers=3))
    kernel = "layers/block_0/mlp/up/kernel: expected float32[3, 12, 24], found float32[2, 8, 16]"
    assert f"params/{kernel} -> num_layers, embed_dim, mlp_dim" in text
    for moment in ("mu", "nu"):
        assert f"opt_state/1/0/{moment}/{kernel} -> num_layers, embed_dim, mlp_dim" in text
    assert "params/embed/table: expected float32[32, 12], found float32[32, 8] -> embed_dim" in text
    assert "params/layers/block_0/attention_norm/scale" in text
    assert "(9 differences)" in text and len(text.splitlines()) == 10
    assert "ShapeDtypeStruct" not in text


def test_mismatch_names_layout_depth_optimizer_and_dtype(tmp_path):
    text = message_of(tmp_path / "a", make_state(), make_state(scan_layers=False))
    assert "params/layers/layer_1/mlp/up/kernel: expected float32[8, 16], found nothing -> scan_layers" in text
    assert "found float32[2, 8, 16] -> scan_layers" in text
    text = message_of(tmp_path / "b", make_state(scan_layers=False), make_state(scan_layers=False, num_layers=3))
    assert "params/layers/layer_2/mlp/up/kernel: expected float32[8, 16], found nothing -> num_layers" in text
    text = message_of(tmp_path / "c", make_state(), make_state(optimizer=optax.sgd(0.1, momentum=0.9)))
    assert all(line.endswith("-> optimizer") for line in text.splitlines()[1:]) and "/trace/" in text
    text = message_of(tmp_path / "d", make_state(), make_state(dtype=jnp.bfloat16))
    assert "params/embed/table: expected bfloat16[32, 8], found float32[32, 8] -> dtype of the weights" in text


def test_steps_that_are_not_there(tmp_path):
    state = make_state()
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(UserError, match="no checkpoint there"):
            store.restore(None, abstract(state))
        store.save(2, state, RECORD)
        store.wait()
        with pytest.raises(UserError, match="no step 3; there are 2"):
            store.restore(3, abstract(state))
    with CheckpointStore(tmp_path) as store, pytest.raises(UserError, match="step 2 exists already"):
        store.save(2, state, RECORD)
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert store.restore(2, abstract(state)).manifest.step == 2
        with pytest.raises(UserError, match="read_only"):
            store.save(3, state, RECORD)


def test_opening_a_folder_again_in_one_process_closes_the_earlier_store(tmp_path):
    state = make_state()
    earlier = CheckpointStore(tmp_path)
    earlier.save(1, state, RECORD)
    with CheckpointStore(tmp_path) as store:
        assert store.all_steps() == [1]
        store.save(2, state, RECORD)
        with pytest.raises(UserError, match="opened again"):
            earlier.save(3, state, RECORD)


def test_grain_iterators_resume(tmp_path):
    state = make_state()
    dataset = grain.MapDataset.range(100).shuffle(seed=3).batch(4).to_iter_dataset()
    iterator = iter(dataset)
    for _ in range(5):
        next(iterator)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, RECORD, iterator)
        rest = [next(iterator).tolist() for _ in range(3)]  # goes on while the save runs
        position = store.restore(1, abstract(state)).iterator_state
        fresh = iter(dataset)
        set_iterator_state(fresh, position)
        assert [next(fresh).tolist() for _ in range(3)] == rest
        again = iter(dataset)
        grain.checkpoint.CheckpointHandler().restore(store.step_path(1) / "iterator", item=again)
        assert [next(again).tolist() for _ in range(3)] == rest


def test_grain_data_loader_whose_state_is_bytes(tmp_path):
    state = make_state()
    sampler = grain.samplers.IndexSampler(
        20, shuffle=True, seed=1, num_epochs=2, shard_options=grain.sharding.NoSharding()
    )
    loader = grain.DataLoader(data_source=list(range(20)), sampler=sampler, worker_count=0)
    iterator = iter(loader)
    for _ in range(7):
        next(iterator)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, RECORD, iterator)
        rest = [next(iterator) for _ in range(5)]
        fresh = iter(loader)
        set_iterator_state(fresh, store.restore(1, abstract(state)).iterator_state)
        assert [next(fresh) for _ in range(5)] == rest


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_readable_without_the_optimizers_types(tmp_path):
    import orbax.checkpoint as ocp

    state = make_state(2)
    with CheckpointStore(tmp_path) as store:
        store.save(2, state, RECORD)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(store.step_path(2) / "state")
    moment = tree["opt_state"]["1"]["0"]["mu"]["embed"]["table"]
    np.testing.assert_array_equal(moment, state.opt_state[1][0].mu["embed"]["table"])


def test_reading_some_leaves_reads_only_those(tmp_path):
    state = make_state(2)
    with CheckpointStore(tmp_path) as store:
        store.save(2, state, RECORD)
        store.wait()
        path = "params/embed/table"
        wanted = {path: jax.ShapeDtypeStruct((32, 8), jnp.float32)}
        found = restore.read_leaves(store.step_path(2), wanted, store.manifest(2))
    assert list(found) == [path]
    np.testing.assert_array_equal(found[path], state.params["embed"]["table"])


def test_nnx_variables_are_refused(tmp_path):
    from flax import nnx

    state = TrainState(jnp.int32(0), {"w": nnx.Param(jnp.ones(2))}, {}, (), jax.random.key(0))
    with CheckpointStore(tmp_path) as store, pytest.raises(AssertionError, match="pure trees"):
        store.save(0, state, RECORD)


MESHES = """
import sys, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from maxkit.checkpoint import digest
from maxkit.checkpoint.store import CheckpointStore, RunRecord
from maxkit.types import TrainState

def specs(tree):  # the first dimension over fsdp, the last over tensor
    return jax.tree.map(lambda x: P("fsdp", *[None] * (x.ndim - 2), "tensor") if x.ndim > 1 else P(), tree)

def host_state():
    draw = np.random.default_rng(0).normal
    kernel = jnp.asarray(draw(size=(8, 16, 24)), jnp.float32)
    params = {"layers": {"block_0": {"mlp": {"up": {"kernel": kernel}}}},
              "embed": {"table": jnp.asarray(draw(size=(64, 16)), jnp.bfloat16)}}
    opt_state = jax.tree.map(lambda x: x + 1, optax.adamw(1e-3).init(params))
    return TrainState(jnp.int32(4), params, {}, opt_state, jax.random.split(jax.random.key(3), 8))

def mesh_of(shape, kind):
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(kind, kind))

def placed(state, mesh):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), state, specs(state))

state = host_state()
expected = digest.digest_tree(state)
with CheckpointStore(sys.argv[1]) as store:
    for number, kind in enumerate((AxisType.Explicit, AxisType.Auto)):
        mesh = mesh_of((4, 2), kind)
        with jax.set_mesh(mesh):
            store.save(number, placed(state, mesh), RunRecord(scan_layers=True))
            store.wait()
    for number in (0, 1):
        for shape in ((1, 1), (2, 1), (1, 2), (2, 2), (8, 1), (4, 2)):
            for kind in (AxisType.Explicit, AxisType.Auto):
                mesh = mesh_of(shape, kind)
                place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s))
                target = jax.tree.map(place, state, specs(state))
                with jax.set_mesh(mesh):
                    found = store.restore(number, target).state
                assert digest.digest_tree(found) == expected
                for leaf, want in zip(jax.tree.leaves(found), jax.tree.leaves(target)):
                    assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
print("equal")
"""


def run_script(code, *arguments, devices):
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)


def test_saved_on_eight_devices_restored_on_any_mesh(tmp_path):
    run = run_script(MESHES, tmp_path, devices=8)
    assert run.stdout.strip() == "equal", run.stderr[-3000:]


EXERCISER = Path(__file__).parents[2] / "benchmarks" / "checkpoint.py"


def exerciser():
    description = importlib.util.spec_from_file_location("benchmark_of_checkpoints", EXERCISER)
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module


def test_every_number_is_known_after_resharding(tmp_path):
    """Saved on 8 devices; restored in processes with 1, 2 and 4, and compared with a formula, bit by bit."""
    command = [sys.executable, EXERCISER, "--reshard", "--layers=2", "--embed=64", f"--folder={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["wrong"] == [] and found["saved"]["fsdp:4,tensor:2"]["divided"] > 20
    divided = {mesh: result["divided"] for mesh, result in found["restored"].items()}
    assert len(divided) == 6 and divided.pop("one device") == 0 and min(divided.values()) > 10


def test_the_exerciser_measures_and_finds_a_wrong_number(tmp_path):
    module = exerciser()
    arguments = module.parse(["--layers=2", "--embed=32", "--repeats=1", "--optimizer=adam_pax", "--mesh=fsdp:1"])
    found = module.measure(arguments, tmp_path / "a")
    assert found["wrong"] == [] and found["parameters"] * 12 < found["bytes"] < found["parameters"] * 12 + 50
    mesh = meshes.make_mesh()
    state = module.known_state(module.abstract_state(module.definition_of(2, 32), "adamw", mesh), mesh)
    assert module.wrong_leaves(state) == []
    state.opt_state[0].nu["embed"]["table"] = state.opt_state[0].nu["embed"]["table"].at[5, 7].add(2**-24)
    assert module.wrong_leaves(state) == ["opt_state/0/nu/embed/table"]


def test_an_array_with_large_rows_is_stored_row_by_row(tmp_path):
    """So that a layer can be read without the others; all else is one chunk, as it always was."""
    stack = jnp.arange(3 * 256 * 256, dtype=jnp.float32).reshape(3, 256, 256)
    state = TrainState(jnp.int32(0), {"stack": stack, "half": stack.astype(jnp.bfloat16)}, {}, (), jax.random.key(0))
    with CheckpointStore(tmp_path) as store:
        store.save(0, state, RECORD)
        assert digest.digest_tree(store.restore(0, abstract(state)).state) == digest.digest_tree(state)
    reader = ArrayReader(tmp_path / "0" / "state")
    assert reader.by_rows("params/stack", stack.shape, np.dtype(np.float32))
    assert not reader.by_rows("params/half", stack.shape, jnp.dtype(jnp.bfloat16))
    np.testing.assert_array_equal(reader.read("params/stack", stack.shape, np.dtype(np.float32), 1), stack[1])
