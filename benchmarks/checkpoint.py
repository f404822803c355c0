# SPDX-License-Identifier: Apache-2.0
"""Exercise the checkpoint store with a state whose every number is known: how long, how many bytes, and are they right?

    python benchmarks/checkpoint.py [--layers 12] [--embed 1024] [--optimizer adamw] [--mesh ""] [--repeats 3]
    python benchmarks/checkpoint.py --reshard [--layers 4] [--embed 256]

Prints one JSON line. The state is not trained: weights, moments and counters are a formula of their path and index
(`known`), and what is restored is compared with the formula, never with what was saved. Exit code 1 if a number is
wrong. `--reshard` saves on 8 simulated devices and restores in processes with 1, 2 and 4, on other meshes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxkit import mesh as meshes
from maxkit.checkpoint import digest
from maxkit.checkpoint.manifest import RunRecord
from maxkit.checkpoint.store import CheckpointStore
from maxkit.models.config import Execution, ModelConfig
from maxkit.models.definition import ModelDefinition
from maxkit.optim import OptimizerConfig, make_optimizer
from maxkit.types import TrainState

STEP = 7
SAVED_ON = "fsdp:4,tensor:2"
RESTORED_ON = {1: [""], 2: ["fsdp:2", "tensor:2"], 4: ["fsdp:4", "fsdp:2,tensor:2", "data:2,tensor:2"]}


def known(path: str, shape: tuple[int, ...], dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of the leaf at `path`.

    Integers are STEP. Element number i in C order is (2654435761 i + crc32(path)) mod 2^32, its upper 24 bits as a
    fraction (exact in float32), rounded to `dtype`.
    """
    part = tuple(range(*cut.indices(size)) for cut, size in zip(index, shape, strict=True))
    if not jnp.issubdtype(dtype, jnp.floating):
        return np.full([len(places) for places in part], STEP, dtype)
    word = np.uint32(zlib.crc32(path.encode()))
    stride = 2654435761
    for places in reversed(range(len(shape))):
        axis = np.asarray(part[places], np.uint64) * np.uint64(stride) & np.uint64(0xFFFFFFFF)
        word = axis.astype(np.uint32).reshape(-1, *[1] * (len(shape) - 1 - places)) + word
        stride = stride * shape[places] & 0xFFFFFFFF
    return ((word >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)).astype(dtype)


def random_key(mesh: Any) -> jax.Array:
    """The state's random key, whose words are 0 and STEP."""
    return jax.device_put(jax.random.key(STEP), meshes.replicated(mesh))


def definition_of(layers: int, embed: int, scan_layers: bool = True) -> ModelDefinition:
    """A dense model of about `layers * 12.25 * embed^2` weights, and `8 * embed^2` of its table."""
    config = ModelConfig(
        vocab_size=8 * embed, num_layers=layers, embed_dim=embed, mlp_dim=11 * embed // 4, num_heads=8, num_kv_heads=8,
        head_dim=embed // 8, max_seq_len=1024, tie_embeddings=True,
    )  # fmt: skip
    return ModelDefinition(config, Execution(scan_layers=scan_layers))


def abstract_state(definition: ModelDefinition, optimizer: str, mesh: Any) -> TrainState:
    """Shapes, dtypes and shardings of the training state."""
    shardings = definition.shardings(mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), definition.shapes, shardings)
    rule = make_optimizer(OptimizerConfig(optimizer=optimizer), 100, definition.letters)

    def make(values: Any) -> TrainState:
        return TrainState(jnp.int32(0), values, {}, rule.init(values), jax.random.key(0))

    shapes = jax.eval_shape(make, params)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.on_devices(x.sharding, mesh))  # noqa: E731
    return jax.tree.map(place, shapes)


def known_state(target: TrainState, mesh: Any) -> TrainState:
    """The state, made part by part where it belongs."""
    leaves = digest.named_leaves(target)

    def make(path: str, leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return random_key(mesh)
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: known(path, leaf.shape, leaf.dtype, index)
        )

    return jax.tree.unflatten(jax.tree.structure(target), [make(path, leaf) for path, leaf in leaves.items()])


def wrong_leaves(state: TrainState) -> list[str]:
    """The paths of leaves that are not what the formula says, bit by bit."""
    wrong = []
    for path, leaf in digest.named_leaves(state).items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            right = jax.random.key_data(leaf).tolist() == [0, STEP]
        else:
            right = all(
                np.asarray(shard.data).tobytes() == known(path, leaf.shape, leaf.dtype, shard.index).tobytes()
                for shard in leaf.addressable_shards
            )
        wrong += [] if right else [path]
    return wrong


def save(folder: Path, state: TrainState, optimizer: str, scan_layers: bool) -> tuple[float, float]:
    """Save as training does: (seconds that the caller waits, seconds until everything is on disk)."""
    with CheckpointStore(folder) as store:
        start = time.perf_counter()
        store.save(STEP, state, RunRecord(scan_layers=scan_layers, optimizer=optimizer))
        store.wait()
        return store.blocking_seconds, time.perf_counter() - start


def restore(folder: Path, target: TrainState, verify: bool = True) -> tuple[float, TrainState]:
    """(seconds, state) of the step in `folder`."""
    start = time.perf_counter()
    found = CheckpointStore(folder, read_only=True).restore(STEP, target, verify=verify).state
    jax.block_until_ready(found)
    return time.perf_counter() - start, found


def digest_seconds(state: TrainState) -> float:
    """Of all leaves, compiled before."""
    digest.digest_tree(state)
    start = time.perf_counter()
    digest.digest_tree(state)
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Save and restore `repeats` times; medians. Files are read from where the system keeps them, memory if it can."""
    mesh, scan = meshes.make_mesh(arguments.mesh), arguments.scan_layers == "true"
    definition = definition_of(arguments.layers, arguments.embed, scan)
    rows, wrong = [], []
    with jax.set_mesh(mesh):
        target = abstract_state(definition, arguments.optimizer, mesh)
        state = known_state(target, mesh)
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        digests = digest_seconds(state)
        for _ in range(arguments.repeats):
            shutil.rmtree(folder, ignore_errors=True)
            blocking, total = save(folder, state, arguments.optimizer, scan)
            verified, found = restore(folder, target)
            wrong += wrong_leaves(found)
            del found
            rows.append((blocking, total, verified, restore(folder, target, verify=False)[0]))
    blocking, total, verified, plain = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "parameters": definition.num_params,
        "optimizer": arguments.optimizer,
        "scan_layers": scan,
        "devices": mesh.size,
        "bytes": num_bytes,
        "save_blocking_seconds": round(blocking, 3),
        "save_seconds": round(total, 3),
        "save_bytes_per_second": round(num_bytes / total),
        "restore_seconds": round(verified, 3),
        "restore_bytes_per_second": round(num_bytes / verified),
        "restore_seconds_without_digests": round(plain, 3),
        "digest_seconds_per_gb": round(digests / num_bytes * 1e9, 3),
        "wrong": sorted(set(wrong)),
    }


def part_of_reshard(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """In a process with some number of simulated devices: save, or restore on each of its meshes."""
    definition, found = definition_of(arguments.layers, arguments.embed), {}
    for name in [SAVED_ON] if arguments.part == "save" else RESTORED_ON[jax.device_count()]:
        mesh = meshes.make_mesh(name)
        with jax.set_mesh(mesh):
            target = abstract_state(definition, arguments.optimizer, mesh)
            if arguments.part == "save":
                seconds, wrong = save(folder, known_state(target, mesh), arguments.optimizer, True)[1], []
            else:
                seconds, state = restore(folder, target)
                wrong = wrong_leaves(state)
        divided = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(target))
        found[name or "one device"] = {"seconds": round(seconds, 3), "divided": divided, "wrong": wrong}
    return found


def reshard(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Save on 8 simulated devices, restore on fewer, each number of devices in a process of its own."""

    def process(part: str, devices: int) -> dict[str, Any]:
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        sizes = [f"--layers={arguments.layers}", f"--embed={arguments.embed}", f"--optimizer={arguments.optimizer}"]
        command = [sys.executable, __file__, f"--folder={folder}", f"--part={part}", *sizes]
        done = subprocess.run(command, env=os.environ | flags, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    saved = process("save", 8)
    restored: dict[str, Any] = {}
    for devices in RESTORED_ON:
        restored |= process("restore", devices)
    wrong = sorted({path for result in restored.values() for path in result["wrong"]})
    return {"saved": saved, "restored": restored, "wrong": wrong}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--embed", type=int, default=1024)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--scan-layers", choices=("true", "false"), default="true")
    parser.add_argument("--mesh", default="", help="of all devices, such as fsdp:2,tensor:2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reshard", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    parser.add_argument("--part", choices=("save", "restore"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> int:
    """Measure and print."""
    arguments = parse()
    if arguments.part:
        print(json.dumps(part_of_reshard(arguments, arguments.folder)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = (reshard if arguments.reshard else measure)(arguments, Path(folder) / "checkpoints")
    print(json.dumps(found))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
