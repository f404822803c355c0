# SPDX-License-Identifier: Apache-2.0
"""Memory and time of `maxkit convert` on a synthetic checkpoint with AdamW's moments, beside a plain copy of its bytes.

    python benchmarks/convert.py [--layers 12] [--embed 1024] [--folder /tmp/convert]

Makes a scanned checkpoint of about `layers * embed^2 * 147` bytes as training saves it (each stack in one piece),
converts it to unrolled and back and to a Hugging Face folder, each in a process of its own, and prints one JSON object.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from maxkit.checkpoint.manifest import RunRecord
from maxkit.checkpoint.store import CheckpointStore
from maxkit.models.config import ModelConfig
from maxkit.models.definition import ModelDefinition
from maxkit.types import TrainState

# Runs the command line in this process and reports its largest resident memory, in bytes, and its seconds.
PROGRAM = """
import json, sys, time
import maxkit.checkpoint.convert
from maxkit.cli import main
def high_water():  # not ru_maxrss, which a process inherits
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = high_water()
start = time.perf_counter()
code = main(sys.argv[1:])
peak = high_water()
print(json.dumps({"code": code, "before": before, "peak": peak, "seconds": time.perf_counter() - start}))
"""


BUFFERS = 64 << 20  # at most what a conversion needs beside twice its largest tensor


def make(folder: Path, layers: int, embed: int, optimizer: str = "adamw") -> tuple[int, int]:
    """Write the checkpoint; bytes of its largest array (a stack) and of its largest tensor (a layer's or the table)."""
    config = ModelConfig(
        vocab_size=8 * embed, num_layers=layers, embed_dim=embed, mlp_dim=11 * embed // 4, num_heads=embed // 64,
        num_kv_heads=embed // 64, head_dim=64, max_seq_len=1024, tie_embeddings=True,
    )  # fmt: skip
    definition, draw = ModelDefinition(config), np.random.default_rng(0)

    def values() -> dict:
        return definition.tree(lambda p: jnp.asarray(draw.standard_normal(p.shape, np.float32)))

    count = jnp.int32(1)
    moments: dict = {"1": {"count": count}}
    if optimizer == "adamw":
        moments = {"0": {"count": count, "mu": values(), "nu": values()}, "2": {"count": count}}
    state = TrainState(count, values(), {}, moments, jax.random.key(0))
    record = RunRecord(scan_layers=True, model=config.model_dump(mode="json"), optimizer=optimizer)
    with CheckpointStore(folder / "checkpoints") as store:
        store.save(1, state, record)
    leaves = [(leaf.nbytes, leaf.nbytes // layers if layers in leaf.shape[:1] else leaf.nbytes)
              for leaf in jax.tree.leaves(state.params)]  # fmt: skip
    return max(array for array, _ in leaves), max(tensor for _, tensor in leaves)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(*arguments: object) -> dict:
    """One command in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, "convert", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Make, convert, copy, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--embed", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/convert"))
    arguments = parser.parse_args()
    folder = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    largest, tensor = make(folder / "source", arguments.layers, arguments.embed)
    found: dict = {"bytes": size_of(folder / "source"), "largest_array": largest, "largest_tensor": tensor}
    found |= {"cpus": os.cpu_count()}
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder / "source"), str(folder / "copy")], check=True)
    subprocess.run(["sync"], check=True)
    found["copy_seconds"] = time.perf_counter() - start
    shutil.rmtree(folder / "copy")
    found["to_unrolled"] = run(folder / "source", folder / "unrolled", "--to", "maxkit", "--scan-layers", "false")
    found["to_scanned"] = run(folder / "unrolled", folder / "scanned", "--to", "maxkit", "--scan-layers", "true")
    found["to_hf"] = run(folder / "source", folder / "hf", "--to", "hf")
    found["to_maxtext"] = run(folder / "source", folder / "maxtext", "--to", "maxtext-linen")
    for name in ("to_unrolled", "to_scanned", "to_hf", "to_maxtext"):
        grown = found[name]["peak"] - found[name]["before"]
        found[name]["grown_in_largest_tensors"] = round(grown / tensor, 2)
        found[name]["grown_beyond_two_largest_tensors"] = grown - 2 * tensor
    shutil.rmtree(folder)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
