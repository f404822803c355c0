# SPDX-License-Identifier: Apache-2.0
"""What a run measures of itself: the metrics files, throughput, model FLOPs, MFU and peak memory.

Names of metrics are `group/name`; those of this file are in the group `perf`.
"""

import json
import math
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from maxkit.errors import UserError
from maxkit.models.config import ModelConfig

METRICS_FILE = "metrics.jsonl"


class PeakRate(NamedTuple):
    """Dense bfloat16 FLOP/s of a chip as its maker publishes it, and how many JAX devices the chip shows."""

    flops_per_chip: float
    devices_per_chip: int
    source: str


_TPU_DOCS = "Cloud TPU documentation, system architecture, peak compute per chip (bf16)"
_NVIDIA_SHEET = "NVIDIA datasheet, BF16 Tensor Core without sparsity"
# By `device_kind`. A kind that is not here has no MFU: a guessed peak would make a made-up number.
PEAK_RATES = {
    "TPU v4": PeakRate(275e12, 1, _TPU_DOCS),
    "TPU v5 lite": PeakRate(197e12, 1, _TPU_DOCS),
    "TPU v5e": PeakRate(197e12, 1, _TPU_DOCS),
    "TPU v5": PeakRate(459e12, 1, _TPU_DOCS),
    "TPU v5p": PeakRate(459e12, 1, _TPU_DOCS),
    "TPU v6 lite": PeakRate(918e12, 1, _TPU_DOCS),
    "TPU v6e": PeakRate(918e12, 1, _TPU_DOCS),
    "TPU7x": PeakRate(2307e12, 2, _TPU_DOCS),
    "NVIDIA H100 80GB HBM3": PeakRate(989e12, 1, _NVIDIA_SHEET),
    "NVIDIA H200": PeakRate(989e12, 1, _NVIDIA_SHEET),
    "NVIDIA A100-SXM4-40GB": PeakRate(312e12, 1, _NVIDIA_SHEET),
    "NVIDIA A100-SXM4-80GB": PeakRate(312e12, 1, _NVIDIA_SHEET),
    "NVIDIA A100-PCIE-40GB": PeakRate(312e12, 1, _NVIDIA_SHEET),
    "NVIDIA A100 80GB PCIe": PeakRate(312e12, 1, _NVIDIA_SHEET),
}


class PeakMemory(NamedTuple):
    """The most memory in use so far, on the fullest local device or (`of` says which) in the process."""

    bytes: int
    of: str


def model_flops_per_token(config: ModelConfig, seq_len: int, *, frozen_weights: bool = False) -> float:
    """Floating-point operations that training one token needs, forward and backward, two per multiply-add.

    Matrix products: 2 forward and 4 backward per weight of the layers and of the head; the embedding is a
    lookup and counts nothing. Attention: per layer 4 N H c forward and twice that backward, c being the mean
    number of keys that a query sees in a causal sequence of `seq_len` tokens, (seq_len + 1) / 2 without a
    window. Not counted: norms, activations, the softmax, and what rematerialisation computes again. Packed
    documents are counted as one sequence.

    frozen_weights: the backward pass computes no gradients of the weights (LoRA, whose own small matrices are
        not counted): 2 backward per weight instead of 4.
    """
    projections = 2 * config.head_dim * (config.num_heads + config.num_kv_heads)  # query, out, key, value
    layer = config.embed_dim * (projections + 3 * config.mlp_dim)
    weights = config.num_layers * layer + config.embed_dim * config.vocab_size
    keys = sum(
        group.repeats * _mean_keys(seq_len, block.sliding_window)
        for group in config.layer_groups()
        for block in group.pattern
    )
    return (4 if frozen_weights else 6) * weights + 12 * config.num_heads * config.head_dim * keys


def peak_flops_per_device(device: jax.Device | None = None) -> float | None:
    """Published dense bfloat16 FLOP/s of one JAX device; None for a CPU or a chip that is not listed."""
    rate = PEAK_RATES.get((device or jax.devices()[0]).device_kind)
    return rate.flops_per_chip / rate.devices_per_chip if rate else None


def throughput(
    tokens: int,
    seconds: float,
    flops_per_token: float | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, float]:
    """Rates of an update that took `seconds` for `tokens` over all hosts.

    `perf/step_s`, `perf/tokens_per_s`, and where the peak is known `perf/mfu`: the model FLOPs as a fraction
    of the bfloat16 peak of all `devices` (default: all there are), whatever dtype the run computes in.
    """
    rates = {"perf/step_s": seconds, "perf/tokens_per_s": tokens / seconds}
    devices = jax.devices() if devices is None else devices
    peak = peak_flops_per_device(devices[0])
    if peak and flops_per_token:
        rates["perf/mfu"] = rates["perf/tokens_per_s"] * flops_per_token / (peak * len(devices))
    return rates


def peak_memory() -> PeakMemory:
    """The peak over this process's accelerators, or of the process itself where they do not tell (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices() if device.platform != "cpu"]
    peaks = [int(s["peak_bytes_in_use"]) for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return PeakMemory(max(peaks), "device")
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, kibibytes elsewhere
    return PeakMemory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process")


class MetricsWriter:
    """Appends one JSON line per logged step to `run_dir/metrics.jsonl`, and the same to TensorBoard files.

    Only process 0 writes; on the others every call does nothing. Values that JSON cannot hold are the
    strings "nan", "inf" and "-inf"; `read_metrics` turns them back.

    restored_step: updates done in the checkpoint that the run continues from. Lines beyond it come from
        updates that are about to be done again, and are dropped, as is a last line cut off by a crash.
    """

    def __init__(self, run_dir: str | os.PathLike, *, restored_step: int = 0, tensorboard: bool = True):
        self._lines: Any = None
        self._events: Any = None
        if jax.process_index() != 0:
            return
        self._path = Path(run_dir) / METRICS_FILE
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _keep_until(self._path, restored_step)
            self._lines = self._path.open("a", encoding="utf-8")
            if tensorboard:
                from tensorboardX import SummaryWriter

                logs = str(self._path.parent / "tensorboard")
                self._events = SummaryWriter(logs, purge_step=restored_step + 1 if restored_step else None)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write metrics into {str(run_dir)!r}: {reason}") from error

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log scalars after update number `step`, 1 being the first; arrays wait for the device."""
        if self._lines is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        row = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        try:
            self._lines.write(json.dumps({"step": step, **row}) + "\n")
            self._lines.flush()  # a killed run keeps what it logged
        except OSError as error:
            raise UserError(f"cannot write to {str(self._path)!r}: {error.strerror or error}") from error
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files; more calls do nothing."""
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()
        self._lines = self._events = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, float]]:
    """The rows of `run_dir/metrics.jsonl`, each with an integer `step`; a last line cut off is left out."""
    path = Path(run_dir) / METRICS_FILE
    return [
        {name: value if name == "step" else float(value) for name, value in row.items()}
        for row, _ in (_rows(path) if path.exists() else ())
    ]


def _mean_keys(seq_len: int, window: int | None) -> float:
    """Keys that a query sees on average: query t of a causal sequence sees t of them, at most `window`."""
    window = min(window or seq_len, seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Complete rows with their lines. Only the last line can be incomplete: each is flushed."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return
        try:
            yield json.loads(line), line
        except json.JSONDecodeError as error:
            raise UserError(f"{str(path)!r} line {number} is not JSON: move the file away") from error


def _keep_until(path: Path, step: int) -> None:
    """Drop the rows after `step`. The file is replaced at once: a crash leaves the old or the new one."""
    if not path.exists():
        return
    kept = "".join(line for row, line in _rows(path) if row["step"] <= step)
    replacement = path.with_suffix(".tmp")
    replacement.write_text(kept, encoding="utf-8")
    os.replace(replacement, path)
