# SPDX-License-Identifier: Apache-2.0
"""The recipes themselves, executed by papermill as a user would, at a size for CI."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from maxkit.checkpoint.inspect import describe
from maxkit.checkpoint.load import load
from maxkit.config import RECIPES

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"batch_size": 2, "seq_len": 64}
TINY = {**SMALL, "num_layers": 2, "embed_dim": 32, "mlp_dim": 64}


def papermill(recipe: str, run_dir: Path, **parameters) -> subprocess.CompletedProcess:
    """`papermill recipes/X.ipynb` with -p for each parameter, exactly the command of the README."""
    arguments = [
        item for name, value in {"run_dir": run_dir, **parameters}.items() for item in ("-p", name, str(value))
    ]
    command = [sys.executable, "-m", "papermill", f"recipes/{recipe}.ipynb", f"{run_dir}.ipynb", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def report(run_dir: Path) -> dict:
    return json.loads((run_dir / "report.json").read_text())


def losses(run_dir: Path) -> list[float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def sft_runs(tmp_path_factory) -> dict[str, Path]:
    """SmolLM2 fine-tuned for three updates, unrolled and scanned."""
    folder = tmp_path_factory.mktemp("sft")
    runs = {}
    for value in ("false", "true"):
        done = papermill("sft", folder / value, scan_layers=value, steps=3, **SMALL)
        assert done.returncode == 0, done.stderr[-3000:]
        runs[value] = folder / value
    return runs


def test_scan_layers_false_is_false(sft_runs):
    found = report(sft_runs["false"])
    assert found["parameters"]["scan_layers"] is False
    assert found["explicit"]["scan_layers"] == "papermill"
    assert found["steps_done"] == found["steps_this_run"] == 3
    assert all(check["passed"] for check in found["checks"]) and found["checks"]
    assert report(sft_runs["true"])["parameters"]["scan_layers"] is True


def test_checkpoints_have_the_layout_that_was_asked_for(sft_runs):
    for value, prefix in (("false", "params/layers/layer_29/"), ("true", "params/layers/block_0/")):
        manifest = json.loads((sft_runs[value] / "checkpoints/3/manifest/manifest.json").read_text())
        assert any(path.startswith(prefix) for path in manifest["leaves"]), prefix
        assert manifest["scan_layers"] is (value == "true")
        assert describe(sft_runs[value])["scan_layers"] is (value == "true")
    stacked = manifest["leaves"]["params/layers/block_0/attention/query/kernel"]
    assert stacked["shape"] == [30, 576, 9, 64]


def test_both_layouts_train_alike(sft_runs):
    # float32, another order of additions in the compiled program: 1e-4 on losses near 3
    assert losses(sft_runs["false"]) == pytest.approx(losses(sft_runs["true"]), abs=1e-4)
    assert report(sft_runs["false"])["metrics"]["held_out/after"] == pytest.approx(
        report(sft_runs["true"])["metrics"]["held_out/after"], abs=1e-3
    )


def test_a_finished_run_starts_again_in_no_updates(sft_runs):
    done = papermill("sft", sft_runs["true"], scan_layers="true", steps=3, **SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    again = report(sft_runs["true"])
    assert (again["steps_done"], again["steps_this_run"]) == (3, 0)


def test_another_layout_in_the_same_folder_is_refused(sft_runs):
    done = papermill("sft", sft_runs["true"], scan_layers="false", steps=3, **SMALL)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert "scan_layers=False was given (papermill)" in last and "scan_layers=True" in last and "convert" in last


def test_the_checkpoint_loads_without_flags(sft_runs):
    loaded = load(sft_runs["false"])
    assert loaded.config.num_layers == 30 and not loaded.definition.execution.scan_layers
    assert loaded.tokenizer.encode("x\n\n7") == [104, 1116, 39]


@pytest.mark.parametrize(
    ("parameter", "value", "words"),
    [("scan_layer", "false", "scan_layers"), ("steps", "many", "steps='many'"), ("mesh", "fsdp:3", "devices")],
)
def test_mistakes_end_in_one_clear_last_line(tmp_path, parameter, value, words):
    done = papermill("pretrain", tmp_path / "run", **{parameter: value})
    assert done.returncode != 0
    assert words in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "report.json").exists()


def test_lora_trains_a_sliver(tmp_path):
    command = [sys.executable, "-m", "maxkit.cli", "run", "sft", "-p", "steps=2", "-p", "lora_rank=8"]
    command += [item for name, value in SMALL.items() for item in ("-p", f"{name}={value}")]
    command += ["-p", f"run_dir={tmp_path / 'run'}", "-p", "learning_rate=1e-3", "-o", str(tmp_path / "out.ipynb")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = report(tmp_path / "run")
    assert found["explicit"]["lora_rank"] == "command line"
    assert load(tmp_path / "run").definition.lora.rank == 8
    cell = next(c for c in nbformat.read(tmp_path / "out.ipynb", 4).cells if "describe_model" in c.source)
    assert "2,442,240 of them trained" in cell.outputs[0]["data"]["text/plain"]


def test_pretrain_resumes(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run_dir, steps in ((whole, 6), (parts, 6)):
        extra = {"learning_rate_schedule": "constant", "checkpoint_period": 3}
        if run_dir is parts:
            assert papermill("pretrain", run_dir, steps=3, **extra, **TINY).returncode == 0
        done = papermill("pretrain", run_dir, steps=steps, **extra, **TINY)
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(whole) == losses(parts)
    assert report(parts)["steps_this_run"] == 3


def test_convert_proves_what_it_wrote_and_fails_where_it_is_wrong(tmp_path):
    source = ROOT / "tests/fixtures/llama_tiny_full"
    given = {"load_parameters_path": source, "to": "hf", "dtype": "bfloat16", "max_new_tokens": 4}
    done = papermill("convert", tmp_path / "run", **given)
    assert done.returncode == 0, done.stderr[-3000:]
    found = report(tmp_path / "run")
    assert found["explicit"]["dtype"] == "papermill" and len(found["checks"]) == 5
    assert all(check["passed"] for check in found["checks"])
    assert load(tmp_path / "run" / "converted").config.num_layers == load(source).config.num_layers
    weights = tmp_path / "run" / "converted" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 0x40  # the exponent of the last value: the file still loads
    weights.write_bytes(content)
    done = papermill("convert", tmp_path / "run", **given)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "differences is 1, expected 0" in last
    assert "tensors that came back with other bytes is 1, expected 0" in last
    assert not all(check["passed"] for check in report(tmp_path / "run")["checks"])


def test_dpo_starts_at_its_reference(tmp_path):
    mine = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"What is {i} + 1?", "chosen": str(i + 1), "rejected": "blue"} for i in range(8)]
    mine.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "?", "chosen": "a", "rejected": "a"}])))
    done = papermill("dpo", tmp_path / "run", dataset=mine, steps=2, batch_size=2, seq_len=128, limit=0)
    assert done.returncode == 0, done.stderr[-3000:]
    found = report(tmp_path / "run")
    assert found["parameters"]["limit"] == 0 and found["explicit"]["limit"] == "papermill"
    assert losses(tmp_path / "run")[0] == pytest.approx(0.6931, abs=1e-4)
    assert found["metrics"]["held_out/before"] == pytest.approx(0.6931, abs=1e-4)
    assert "held_out/rewards/margins_at_2" in found["metrics"] and (tmp_path / "run" / "reference.npz").exists()
    assert load(tmp_path / "run").definition.lora.rank == 8


def test_eval_measures_what_it_is_told(tmp_path):
    mine = tmp_path / "mine.jsonl"
    row = {"question": "The capital of France is", "options": ["Tokyo", "Paris"], "answer": "Paris"}
    mine.write_text(json.dumps(row) + "\n")
    tasks = f"piqa,choice:{mine},pydoc"
    done = papermill("eval", tmp_path / "run", tasks=tasks, limit=2, seq_len=16, scan_layers="false")
    assert done.returncode == 0, done.stderr[-3000:]
    found = report(tmp_path / "run")
    assert found["parameters"]["tasks"] == tasks.split(",") and found["explicit"]["tasks"] == "papermill"
    assert found["environment"]["scan_layers"] is False
    assert (found["metrics"]["piqa/items"], found["metrics"][f"choice:{mine}/acc_norm"]) == (2, 1.0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "items.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["piqa", "piqa", f"choice:{mine}", "pydoc", "pydoc"]
    assert {check["name"] for check in found["checks"]} == {"tasks measured", "items in the smallest task"}
    done = papermill("eval", tmp_path / "other", tasks="pica")
    assert done.returncode != 0 and "did you mean 'piqa'?" in done.stderr.strip().splitlines()[-1]


def test_distill_learns_from_a_stored_teacher(tmp_path):
    given = {"steps": 2, "student_layers": 2, "teacher_top_k": 4, "holdout_fraction": 0.01, "scan_layers": "false"}
    done = papermill("distill", tmp_path / "run", eval_period=0, dataset="chatterbot", **given, **SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    found = report(tmp_path / "run")
    assert found["explicit"]["teacher_top_k"] == "papermill" and (tmp_path / "run" / "teacher.npz").exists()
    assert found["metrics"]["held_out/after"] < found["metrics"]["held_out/before"]
    loaded = load(tmp_path / "run")
    assert loaded.config.num_layers == 2 and not loaded.definition.execution.scan_layers


def test_grpo_in_tunix_and_in_maxkit_sees_the_same_answers(tmp_path):
    """The reward is one that a model of random weights earns now and then, so that advantages are not all 0."""
    pytest.importorskip("tunix")
    given = {**RECIPES["grpo_tunix"].smoke, "imitation_steps": 0, "rewards": r"format([\x00-\x7f].*)"}
    done = papermill("grpo_tunix", tmp_path / "run", **given)
    assert done.returncode == 0, done.stderr[-3000:]
    found = report(tmp_path / "run")
    assert all(check["passed"] for check in found["checks"]) and len(found["checks"]) == 2
    assert found["metrics"]["reward/last/Tunix"] == found["metrics"]["reward/last/maxkit"]
    assert load(tmp_path / "run" / "tunix").config == load(tmp_path / "run" / "maxkit").config


def test_grpo_imitates_then_learns_from_rewards_and_goes_on(tmp_path):
    small = {"batch_size": 16, "num_generations": 4, "imitation_steps": 2, "eval_period": 0}
    done = papermill("grpo", tmp_path / "run", steps=2, scan_layers="false", **small)
    assert done.returncode == 0, done.stderr[-3000:]
    found = report(tmp_path / "run")
    assert found["explicit"]["batch_size"] == "papermill" and found["steps_done"] == 2
    assert all(check["passed"] for check in found["checks"]) and len(found["checks"]) == 4
    assert describe(tmp_path / "run")["scan_layers"] is describe(tmp_path / "run" / "imitation")["scan_layers"] is False
    assert len((tmp_path / "run" / "completions.jsonl").read_text().splitlines()) == 8
