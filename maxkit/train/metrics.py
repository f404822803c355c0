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
from maxkit.models.config import BlockSpec, ModelConfig

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
    lookup and counts nothing; of routed experts only those that a token chooses count. Attention: per layer 4 N H c
    forward and twice that backward, c being the mean number of keys that a query sees in a causal sequence of
    `seq_len` tokens, (seq_len + 1) / 2 without a window or chunks (MLA: 2 N (H + v_head_dim) c, as if keys and values
    were expanded). The gated delta rule: 6 N H_key H_value, three products with the state. Not counted: norms,
    activations, the softmax, the short convolutions, and what rematerialisation computes again. Packed documents are
    counted as one sequence.

    frozen_weights: the backward pass computes no gradients of the weights (LoRA, whose own small matrices are
        not counted): 2 backward per weight instead of 4.
    """
    weights = sum(_mixer_weights(config, block) + _mlp_weights(config, block) for block in config.blocks)
    weights += config.embed_dim * config.vocab_size
    mixing = sum(_mixing_flops(config, block, seq_len) for block in config.blocks)
    return (4 if frozen_weights else 6) * weights + 3 * mixing


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


def _mixer_weights(config: ModelConfig, block: BlockSpec) -> int:
    """Weights of matrix products in a block's mixer."""
    dim, heads, head = config.embed_dim, config.num_heads, config.head_dim
    if block.mixer == "gated_delta":
        delta = config.gated_delta
        keys, values = delta.num_key_heads * delta.key_head_dim, delta.num_value_heads * delta.value_head_dim
        return dim * (2 * keys + 3 * values + 2 * delta.num_value_heads)  # query, key; value, gate, out; beta, decay
    if config.mla is not None:
        mla = config.mla
        query = dim * heads * head if mla.q_rank is None else mla.q_rank * (dim + heads * head)
        latent = dim * (mla.kv_rank + mla.rope_head_dim) + mla.kv_rank * heads * (mla.nope_head_dim + mla.v_head_dim)
        return query + latent + heads * mla.v_head_dim * dim
    return dim * head * ((3 if config.attention_gate else 2) * heads + 2 * config.num_kv_heads)


def _mlp_weights(config: ModelConfig, block: BlockSpec) -> int:
    """Weights of matrix products that one token meets in a block's MLP."""
    matrices = config.embed_dim * (3 if config.mlp_gated else 2)
    if block.mlp == "dense":
        return matrices * config.mlp_dim
    moe = config.moe
    routing = config.embed_dim * (moe.num_experts + moe.shared_gate)
    return routing + matrices * (moe.experts_per_token * moe.mlp_dim + moe.shared_mlp_dim)


def _mixing_flops(config: ModelConfig, block: BlockSpec, seq_len: int) -> float:
    """Forward operations of one token's products with keys and values, or with the gated delta rule's state."""
    if block.mixer == "gated_delta":
        delta = config.gated_delta
        return 6 * delta.num_value_heads * delta.key_head_dim * delta.value_head_dim
    value_dim = config.mla.v_head_dim if config.mla else config.head_dim
    keys = _mean_keys(seq_len, block.sliding_window, block.chunk_size)
    return 2 * config.num_heads * (config.head_dim + value_dim) * keys


def _mean_keys(seq_len: int, window: int | None, chunk: int | None = None) -> float:
    """Keys that a query of a causal sequence sees on average: query t sees t of its chunk's, at most `window`."""

    def total(length: int) -> float:
        seen = min(window or length, length)
        return seen * (seen + 1) / 2 + (length - seen) * seen

    chunks, rest = divmod(seq_len, min(chunk or seq_len, seq_len))
    return (chunks * total(min(chunk or seq_len, seq_len)) + total(rest)) / seq_len


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
