# SPDX-License-Identifier: Apache-2.0
"""Plans without the TPU compiler: its texts come from files, its process is replaced."""

import dataclasses
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import pytest

from maxkit import build
from maxkit import mesh as meshes
from maxkit.config import resolve
from maxkit.errors import UserError
from maxkit.plan import abstract, command, hlo, topology
from maxkit.plan.report import Memory, Plan
from maxkit.train.step import compile_train_step

SNIPPETS = Path(__file__).parents[1] / "fixtures" / "hlo"
TINY = {
    "vocab_size": 300,
    "num_layers": 2,
    "embed_dim": 32,
    "mlp_dim": 64,
    "seq_len": 16,
    "num_kv_heads": 4,
    "batch_size": 8,
}


def found_in(name: str) -> dict[str, tuple[int, int, int]]:
    text = (SNIPPETS / f"{name}.txt").read_text(encoding="utf-8")
    return {one.opcode: (one.ops, one.runs, one.bytes) for one in hlo.collectives(text)}


def test_one_asynchronous_collective_is_counted_once_and_a_loop_as_often_as_it_runs():
    text = (SNIPPETS / "scan.txt").read_text(encoding="utf-8")
    assert text.count(" all-gather(") == 4 and " reduce-scatter(" not in text
    # Six layers: bfloat16 weights gathered forward and backward, float32 gradients scattered.
    weight = 1024 * 1024
    assert found_in("scan") == {
        "all-gather": (2, 12, 12 * 2 * weight),
        "reduce-scatter": (1, 6, 6 * 4 * weight),
    }


def test_start_and_done_are_one_and_half_of_a_started_tuple_is_its_operand():
    half = 512 * 256 * 4
    assert found_in("exchange") == {"all-to-all": (1, 1, half), "collective-permute": (1, 1, half)}


def test_loops_inside_loops_multiply_and_an_unknown_trip_count_is_one():
    text = """
%inner_cond (p: (u32[])) -> pred[] {
  %limit.1 = u32[] constant(4)
  ROOT %lt.1 = pred[] compare(%i, %limit.1), direction=LT
}

%inner (p: (u32[])) -> (u32[]) {
  %ar.1 = (f32[8]{0}, bf16[2,4]{1,0}) all-reduce(%a, %b), channel_id=7, to_apply=%add
}

%outer_cond (p: (s32[])) -> pred[] {
  %limit.2 = s32[]{:T(128)} constant(3)
  ROOT %lt.2 = pred[] compare(%i, %limit.2), direction=LT
}

%outer (p: (s32[])) -> (s32[]) {
  %w.2 = (u32[]) while(%t), condition=%inner_cond, body=%inner
}

%open_cond (p: (s32[])) -> pred[] {
  ROOT %any = pred[] fusion(%i), kind=kLoop, calls=%something
}

%open (p: (s32[])) -> (s32[]) {
  ROOT %ag.1 = pred[16]{0} all-gather(%c), channel_id=8, dimensions={0}
}

ENTRY %main (p: f32[]) -> f32[] {
  %w.1 = (s32[]) while(%t), condition=%outer_cond, body=%outer
  %w.3 = (s32[]) while(%t), condition=%open_cond, body=%open
}
"""
    all_reduce, all_gather = hlo.collectives(text)
    assert (all_reduce.ops, all_reduce.runs, all_reduce.bytes) == (1, 12, 12 * (32 + 16))
    assert (all_gather.ops, all_gather.runs, all_gather.bytes) == (1, 1, 16)


def test_a_gather_under_way_in_a_loop_runs_once():
    """Begun and done outside, steps of it fused into the loop's work; channel 3 begins in the body, in every turn."""
    text = """
%fused_computation.1 (p: bf16[4]) -> bf16[16] {
  %ag.1 = bf16[16]{0} all-gather(%p), channel_id=2, dimensions={0}
}

%async_collective_fusion.1 (p: bf16[4]) -> bf16[16] {
  %ag.2 = bf16[16]{0} all-gather(%p), channel_id=2, dimensions={0}
}

%fused_computation.2 (p: bf16[2]) -> bf16[8] {
  %ag.3 = bf16[8]{0} all-gather(%p), channel_id=3, dimensions={0}
}

%async_collective_fusion.2 (p: bf16[2]) -> bf16[8] {
  %ag.4 = bf16[8]{0} all-gather(%p), channel_id=3, dimensions={0}
}

%cond (p: (s32[])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %s.1 = bf16[16] fusion(%a), kind=kOutput, calls=%async_collective_fusion.1
  %b.1 = bf16[8] fusion(%b), kind=kLoop, calls=%fused_computation.2
  %s.2 = bf16[8] fusion(%b), kind=kOutput, calls=%async_collective_fusion.2
}

ENTRY %main (p: f32[]) -> f32[] {
  %f.1 = bf16[16] fusion(%a), kind=kLoop, calls=%fused_computation.1
  %w.1 = (s32[]) while(%t), condition=%cond, body=%body
}
"""
    (gather,) = hlo.collectives(text)
    assert (gather.ops, gather.runs, gather.bytes) == (2, 1 + 5, 2 * 16 + 5 * 2 * 8)


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(34.85G) exceeds available HBM (15.75G).",
            (34.85, 15.75),
        ),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 20.5G of 15.75G hbm.", (20.5, 15.75)),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", None),
        ("INVALID_ARGUMENT: something else (1.0G) exceeds available HBM (2.0G)", None),
    ],
)
def test_the_sizes_of_a_refusal(message, sizes):
    expected = tuple(round(size * 2**30) for size in sizes) if sizes else None
    assert hlo.out_of_memory(message) == expected


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v9:2x2", "v5e:2x0", "cpu:2x2", ""])
def test_an_unknown_topology_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=r"is not known.*v5e:2x2.*tpu7x:2x2x1") as refusal:
        command.plan("sft", name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", topology.KNOWN)
def test_known_topologies_are_well_formed(name):
    topology.check_name(name)


def test_without_libtpu_one_line_says_what_makes_it(monkeypatch, tmp_path):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "ENVIRONMENT", str(tmp_path))
    with pytest.raises(UserError, match="`make plan`"):
        command.plan("pretrain", "v5e:2x2")


def test_the_environment_of_the_checkout_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "ENVIRONMENT", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    with pytest.raises(UserError, match="make plan"):  # cut off while installing: no stamp
        command._python_with_libtpu()
    (tmp_path / ".stamp").touch()
    assert command._python_with_libtpu() == str(tmp_path / "bin" / "python")


def state_and_batch(**given):
    cfg = resolve("pretrain", environ={}, given={k: (v, "keyword") for k, v in (TINY | given).items()})
    mesh = meshes.make_mesh(cfg.mesh, jax.devices()[:1])
    made = abstract.blueprint(cfg)
    with jax.set_mesh(mesh):
        return made, abstract.abstract_state(made, mesh), build.batch_shapes(cfg, mesh)


def test_no_device_array_is_made():
    before = {id(array) for array in jax.live_arrays()}
    made, state, batch = state_and_batch()
    leaves = jax.tree.leaves((state, batch))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None for leaf in leaves)
    assert {id(array) for array in jax.live_arrays()} <= before


def test_bytes_are_counted_from_shapes():
    made, state, batch = state_and_batch()
    assert abstract.device_bytes(state.params) == 4 * made.definition.num_params
    moments = abstract.device_bytes(state.opt_state) - 2 * 4 * made.definition.num_params
    assert 0 < moments <= 16  # the counters
    assert abstract.device_bytes(batch) == 5 * 4 * 8 * 16


@pytest.mark.parametrize("scan", [True, False])
def test_the_layout_asked_for_is_the_layout_planned(scan):
    made, state, _ = state_and_batch(scan_layers=scan)
    assert ("block_0" in state.params["layers"]) == scan
    assert made.definition.execution.scan_layers == scan


def folder(path: Path, **changes) -> str:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    described = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **heads, **changes}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return str(path)


def test_a_config_json_alone_is_a_model(tmp_path):
    given = {"model": folder(tmp_path), "seq_len": 128, "lora_rank": 4}
    cfg = resolve("sft", environ={}, given={k: (v, "keyword") for k, v in given.items()})
    made = abstract.blueprint(cfg)
    assert made.definition.config.embed_dim == 32
    trained, base = made.definition.split_trainable(made.definition.shapes)
    assert trained and base


@pytest.mark.parametrize(
    ("recipe", "given", "columns"),
    [
        ("sft", {"lora_rank": 4}, set()),
        ("dpo", {}, {"ref_logps"}),
        ("grpo", {"beta": 0.1}, {"advantages", "ref_logps"}),
        ("distill", {"student_layers": 1}, set()),
        ("distill", {"student_layers": 1, "teacher_top_k": 8}, {"teacher_ids", "teacher_logps"}),
    ],
)
def test_a_plan_traces_the_step_of_every_objective(tmp_path, recipe, given, columns):
    given = {"model": folder(tmp_path / "model"), "batch_size": 4, "seq_len": 32} | given
    if recipe == "distill":
        given["teacher"] = folder(tmp_path / "teacher", hidden_size=64, num_hidden_layers=3)
    if recipe == "grpo":
        given |= {"num_generations": 2, "max_new_tokens": 8}
    cfg = resolve(recipe, environ={}, given={k: (v, "keyword") for k, v in given.items()})
    mesh = meshes.make_mesh("", jax.devices()[:1])
    made = abstract.blueprint(cfg)
    with jax.set_mesh(mesh):
        batch, teacher = build.batch_shapes(cfg, mesh), abstract.abstract_teacher(made, mesh)
        step = compile_train_step(made.definition, made.objective, made.optimizer)
        traced = step.trace(abstract.abstract_state(made, mesh), batch, teacher)
    assert set(batch.columns) == columns and "loss" in traced.out_info[1]
    online = recipe == "distill" and not cfg.teacher_top_k
    assert (teacher is not None) == online
    if online:
        assert made.teacher.definition.config.embed_dim == 64 and made.definition.config.num_layers == 1
        assert abstract.device_bytes(teacher) == 4 * made.teacher.definition.num_params


def example(**changes) -> Plan:
    text = (SNIPPETS / "scan.txt").read_text(encoding="utf-8")
    fields = {
        "recipe": "sft",
        "topology": "v5e:2x2",
        "device_kind": "TPU v5 lite",
        "num_devices": 4,
        "mesh": "fsdp:4",
        "parameters": {"batch_size": 4},
        "scan_layers": True,
        "num_params": 1000,
        "tokens_per_step": 2048,
        "fits": True,
        "refusal": None,
        "required_bytes": 2 << 30,
        "available_bytes": 16 << 30,
        "memory": Memory(1 << 30, 2 << 30, 100, 3 << 30, 1 << 30, 3 << 30, 3 << 30, 1 << 20),
        "collectives": tuple(hlo.collectives(text)),
        "flops_per_step": 1e12,
        "least_seconds_per_step": 0.25,
        "unsharded": ("K=3 is left unsharded: tensor=2 does not divide it",),
        "seconds": {"trace": 1.0, "compile": 20.0},
        "versions": {"jax": "1", "libtpu": "2"},
    }
    return Plan(**fields | changes)


def test_the_text_of_a_plan():
    text = "\n".join(example().lines())
    assert text.startswith("FITS on v5e:2x2: 2.00 of 16.00 GiB of HBM per device")
    for part in (
        "batch_size=4",
        "K=3 is left unsharded",
        "reduce-scatter",
        "1e+12 FLOPs",
        "0.25 s",
        "libtpu 2",
    ):
        assert part in text
    assert "optimal" not in text  # the compiler's own estimate of seconds was negative once


def test_a_teacher_has_a_line_of_its_own_and_older_records_have_none():
    memory = Memory(1 << 30, 2 << 30, 100, 3 << 30, teacher=3 << 29)
    assert re.search(r"^    teacher +1\.50  ", "\n".join(example(memory=memory).lines()), re.MULTILINE)
    record = example().to_dict()
    del record["memory"]["teacher"]
    assert Plan.from_dict(record) == example() and "  teacher " not in "\n".join(example().lines())


def test_what_is_needed_is_the_smaller_of_two_bounds():
    memory = Memory(1, 2, 3, arguments=10, temporaries=20, output=9, aliased=8, code=1, peak=25)
    assert memory.needed == 25
    assert dataclasses.replace(memory, peak=200).needed == 10 + 20 + 9 - 8 + 1


def test_the_text_of_what_does_not_fit():
    memory = Memory(1 << 30, 2 << 30, 100)
    plan = example(fits=False, refusal="RESOURCE_EXHAUSTED", memory=memory, required_bytes=20 << 30, collectives=())
    text = "\n".join(plan.lines())
    assert text.startswith("DOES NOT FIT on v5e:2x2: needs 20.00 GiB of HBM per device, 16.00 are there")
    assert "temporaries" not in text and "not known" in text
    nothing = example(fits=False, refusal="RESOURCE_EXHAUSTED: vmem", memory=memory, required_bytes=None)
    assert nothing.lines()[0] == "DOES NOT FIT on v5e:2x2: RESOURCE_EXHAUSTED: vmem"


def test_a_plan_survives_json():
    plan = example()
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def finished(returncode: int, stdout: str = "", stderr: str = "") -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess([], returncode, stdout, stderr)


def test_exit_codes_and_output(monkeypatch, capsys):
    monkeypatch.setattr(command, "_python_with_libtpu", lambda: sys.executable)
    answers = iter([example(), example(fits=False, required_bytes=20 << 30)])
    monkeypatch.setattr(
        command.subprocess,
        "run",
        lambda *a, **k: finished(0, "noise\n" + json.dumps({"plan": next(answers).to_dict()})),
    )
    assert command.main("pretrain", "v5e:2x2") == 0
    assert capsys.readouterr().out.startswith("FITS")
    assert command.main("pretrain", "v5e:2x2", {"batch_size": 4}, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_what_the_compile_process_says_is_passed_on():
    with pytest.raises(UserError, match="mesh is wrong"):
        command._answer(finished(0, json.dumps({"refused": "mesh is wrong"})), "v5e:2x2")
    with pytest.raises(UserError, match=r"gave up on topology='v5e:64x64': F1 Check failed: 64 vs. 16"):
        command._answer(finished(-6, "", "noise\nF1 Check failed: 64 vs. 16\nstack"), "v5e:64x64")
    with pytest.raises(RuntimeError, match="Traceback"):
        command._answer(finished(1, "", "Traceback"), "v5e:2x2")


def test_a_second_plan_waits_for_the_first(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    entered = threading.Event()

    def second() -> None:
        with topology.one_compile_at_a_time():
            entered.set()

    with topology.one_compile_at_a_time() as descriptor:
        with pytest.raises(BlockingIOError):
            other = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()
    os.close(other)
    assert "waiting for it" in capsys.readouterr().err


def test_asking_for_a_plan_imports_no_jax():
    code = "import sys, maxkit.plan as p; p.plan, p.main, p.Plan; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
