# SPDX-License-Identifier: Apache-2.0
"""Metrics files (append, resume, crash, NaN), model FLOPs against XLA's own count, MFU, memory."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxkit.errors import UserError
from maxkit.models.config import BlockSpec, ModelConfig
from maxkit.models.definition import ModelDefinition
from maxkit.train import metrics
from maxkit.train.metrics import (
    METRICS_FILE,
    PEAK_RATES,
    MetricsWriter,
    model_flops_per_token,
    peak_flops_per_device,
    peak_memory,
    read_metrics,
    throughput,
)

SIZES = dict(
    vocab_size=96,
    num_layers=3,
    embed_dim=32,
    mlp_dim=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=64,
)


def device(kind: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(device_kind=kind, platform="tpu")


# --- files ---


def test_one_json_line_per_logged_step(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": jnp.float32(2.5), "grad_norm": 1.0})
        lines = (tmp_path / "run" / METRICS_FILE).read_text().splitlines()  # a kill loses nothing
        writer.write(3, {"loss": 2.25})
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.5, "grad_norm": 1.0}]
    assert read_metrics(tmp_path / "run") == [
        {"step": 1, "loss": 2.5, "grad_norm": 1.0},
        {"step": 3, "loss": 2.25},
    ]


def test_resume_drops_what_is_about_to_be_done_again(tmp_path):
    for restored_step, first in ((0, 1), (3, 4), (3, 4)):
        with MetricsWriter(tmp_path, restored_step=restored_step, tensorboard=False) as writer:
            for step in range(first, 6):
                writer.write(step, {"loss": 10 * restored_step + step})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows] == [1, 2, 3, 34, 35]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_run_in_an_old_folder_starts_an_empty_file(tmp_path):
    for loss in (1.0, 2.0):
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.write(1, {"loss": loss})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_last_line_cut_off_by_a_crash_is_dropped(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    with MetricsWriter(tmp_path, restored_step=2, tensorboard=False) as writer:
        writer.write(3, {"loss": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


def test_a_file_that_is_not_metrics_is_refused_and_kept(tmp_path):
    (tmp_path / METRICS_FILE).write_text("my notes\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        MetricsWriter(tmp_path, tensorboard=False)
    assert (tmp_path / METRICS_FILE).read_text() == "my notes\n"


def test_nan_and_infinity_stay_valid_json(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": float("nan"), "grad_norm": jnp.inf, "low": -math.inf})
    line = (tmp_path / METRICS_FILE).read_text()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"]) and row["grad_norm"] == math.inf and row["low"] == -math.inf


def test_values_that_are_not_scalars_are_an_error(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer, pytest.raises(TypeError):
        writer.write(1, {"loss": np.ones(2)})


def test_an_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write metrics into .*file"):
        MetricsWriter(tmp_path / "file" / "run")


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path, tensorboard=False)

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_lines", Full())
    with pytest.raises(UserError, match="No space left on device"):
        writer.write(1, {"loss": 1.0})


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
    assert read_metrics(tmp_path / "run") == []


def test_tensorboard_files_hold_the_same_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.5})
        writer.write(2, {"loss": 1.25, "perf/tokens_per_s": 100.0})
    assert scalars(tmp_path) == [("loss", 1, 2.5), ("loss", 2, 1.25), ("perf/tokens_per_s", 2, 100.0)]


def scalars(run_dir) -> list[tuple[str, int, float]]:
    """Read the event files without TensorBoard: records of length (8), crc (4), event, crc (4)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            at += 12 + length + 4
    return found


# --- FLOPs, MFU, memory ---


def test_model_flops_by_hand():
    config = ModelConfig(**SIZES)
    layer = 32 * (4 * 8) + 2 * 32 * (2 * 8) + (4 * 8) * 32 + 3 * 32 * 80
    keys = sum(range(1, 17)) / 16
    expected = 6 * (3 * layer + 32 * 96) + 12 * 3 * 4 * 8 * keys
    assert model_flops_per_token(config, 16) == pytest.approx(expected)
    frozen = model_flops_per_token(config, 16, frozen_weights=True)
    assert frozen == pytest.approx(expected - 2 * (3 * layer + 32 * 96))
    tied = ModelConfig(**SIZES, tie_embeddings=True)  # the head multiplies all the same
    assert model_flops_per_token(tied, 16) == pytest.approx(expected)


def test_a_sliding_window_sees_fewer_keys_and_a_wide_one_sees_all():
    whole = ModelConfig(**SIZES)
    wide = ModelConfig(**SIZES, pattern=(BlockSpec(sliding_window=64),))
    local = ModelConfig(**SIZES, pattern=(BlockSpec(sliding_window=4), BlockSpec()))
    assert model_flops_per_token(wide, 16) == model_flops_per_token(whole, 16)
    keys = [min(t, 4) for t in range(1, 17)]  # layers 0 and 2 are local
    saved = 12 * 4 * 8 * 2 * (sum(range(1, 17)) - sum(keys)) / 16
    assert model_flops_per_token(whole, 16) - model_flops_per_token(local, 16) == pytest.approx(saved)


def test_chunks_hide_keys():
    whole = ModelConfig(**SIZES)
    chunked = ModelConfig(**SIZES, pattern=(BlockSpec(chunk_size=5),))
    saved = 12 * 4 * 8 * 3 * (sum(range(1, 17)) - sum(t % 5 + 1 for t in range(16))) / 16
    assert model_flops_per_token(whole, 16) - model_flops_per_token(chunked, 16) == pytest.approx(saved)


def test_only_the_experts_that_a_token_chooses_count():
    moe = {"num_experts": 16, "experts_per_token": 3, "mlp_dim": 20, "shared_mlp_dim": 10, "shared_gate": True}
    mixed = ModelConfig(**SIZES, moe=moe, leading_blocks=(BlockSpec(),), pattern=(BlockSpec(mlp="moe"),))
    active = 32 * 16 + 3 * 32 * (3 * 20 + 10) + 32  # router, three experts and the shared one, its gate
    more = 6 * 2 * (active - 3 * 32 * 80)  # layers 1 and 2
    difference = model_flops_per_token(mixed, 16) - model_flops_per_token(ModelConfig(**SIZES), 16)
    assert difference == pytest.approx(more)


@pytest.mark.parametrize(
    "kind", ["gqa", "mla", "mla without q_rank", "gated_delta", "moe", "no gate", "gated attention"]
)
def test_the_weights_part_equals_the_matrices_of_the_definition(kind):
    """All matrices but the embedding; of the experts, experts_per_token of num_experts."""
    mla = {"kv_rank": 12, "nope_head_dim": 6, "rope_head_dim": 2, "v_head_dim": 5}
    delta = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 6, "value_head_dim": 5}
    changes = {
        "mla": {"mla": mla | {"q_rank": 10}},
        "mla without q_rank": {"mla": mla},
        "gated_delta": {"gated_delta": delta, "pattern": (BlockSpec(mixer="gated_delta"),)},
        "moe": {
            "moe": {"num_experts": 8, "experts_per_token": 2, "mlp_dim": 20, "shared_mlp_dim": 10, "shared_gate": True},
            "pattern": (BlockSpec(mlp="moe"), BlockSpec()),
        },
        "no gate": {"mlp_gated": False},
        "gated attention": {"attention_gate": True},
    }
    config = ModelConfig(**SIZES | changes.get(kind, {}))
    count = 0.0
    for parameter in ModelDefinition(config).parameters.values():
        if parameter.path.endswith("/kernel") and "conv" not in parameter.path:
            used = config.moe.experts_per_token / config.moe.num_experts if "/experts/" in parameter.path else 1
            count += used * math.prod(parameter.shape)
    # The difference of the two ways to train is 2 per weight, whatever attention costs.
    both = (model_flops_per_token(config, 16, frozen_weights=frozen) for frozen in (False, True))
    assert (next(both) - next(both)) / 2 == pytest.approx(count)


def test_the_weights_part_equals_what_xla_counts():
    config = ModelConfig(**SIZES)
    names = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_size")
    d, n, k, h, f, v = (SIZES[name] for name in names)
    shapes = [(d, n * h), (d, k * h), (d, k * h), (n * h, d), (d, f), (d, f), (f, d)] * 3 + [(d, v)]

    def products(weights, inputs):
        return sum(jnp.sum((x @ w) ** 2) for w, x in zip(weights, inputs, strict=True))

    tokens = 64
    weights = [jnp.ones(shape) for shape in shapes]
    inputs = [jnp.ones((tokens, shape[0])) for shape in shapes]
    step = jax.jit(jax.grad(products, argnums=(0, 1))).lower(weights, inputs).compile()
    counted = step.cost_analysis()["flops"] / tokens
    attention = 12 * 3 * n * h * (16 + 1) / 2
    assert counted == pytest.approx(model_flops_per_token(config, 16) - attention, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    (("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v6 lite", 918), ("TPU7x", 1153.5), ("NVIDIA H200", 989)),
)
def test_the_peak_is_per_jax_device(kind, teraflops):
    assert peak_flops_per_device(device(kind)) == pytest.approx(teraflops * 1e12)


def test_an_unknown_chip_has_no_mfu():
    assert "cpu" not in PEAK_RATES
    assert peak_flops_per_device(device("NVIDIA H100 PCIe")) is None
    assert throughput(1000, 2.0, 1e9) == {"perf/step_s": 2.0, "perf/tokens_per_s": 500.0}


def test_mfu_is_the_fraction_of_all_devices():
    rates = throughput(1_000_000, 2.0, 1e9, [device("TPU v5 lite")] * 4)
    assert rates["perf/tokens_per_s"] == 500_000
    assert rates["perf/mfu"] == pytest.approx(500_000 * 1e9 / (4 * 197e12))
    assert "perf/mfu" not in throughput(1_000_000, 2.0, None, [device("TPU v5 lite")])


def test_peak_memory_is_the_process_on_a_cpu_and_the_fullest_device_elsewhere(monkeypatch):
    block = np.ones(30_000_000, np.uint8)
    here = peak_memory()
    assert here.of == "process" and here.bytes > block.nbytes
    accelerators = [
        types.SimpleNamespace(platform="tpu", memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak})
        for peak in (5, 7)
    ]
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: accelerators)
    assert peak_memory() == (7, "device")
    silent = [types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)]
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: silent)
    assert peak_memory().of == "process"
