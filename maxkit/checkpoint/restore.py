# SPDX-License-Identifier: Apache-2.0
"""Read the state of one step onto any mesh, and verify it.

A state is compared with the manifest before anything is read, so that what does not fit is refused with all
differences at once and never ends in a traceback of Orbax or JAX. Next to read: `mismatch.py`, `store.py`.
"""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from maxkit.checkpoint import arrays as arrays_on_disk
from maxkit.checkpoint import digest, mismatch
from maxkit.checkpoint import manifest as manifests
from maxkit.types import Tree

_READ_AHEAD_BYTES = 1 << 30  # of arrays that are being read before the oldest is put on its devices

# The names that JAX writes into a key's dtype, "key<fry>", and the names its functions take.
_KEY_KINDS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}


def restore_tree(
    step_path: Any,
    target: Tree,
    manifest: manifests.Manifest,
    *,
    verify: bool = True,
    missing: Literal["error", "warn", "init"] = "error",
    unexpected: Literal["error", "warn"] = "error",
    initial: Callable[[], Tree] | None = None,
    notes: list[str] | None = None,
) -> Tree:
    """A tree like `target` with the arrays of a step, on the shardings of `target`.

    `target` is a tree of arrays or `jax.ShapeDtypeStruct`; a leaf without sharding goes to the first device.
    The step may have been saved on another mesh. `verify` compares every leaf with its digest.

    missing: what happens to leaves that the step lacks: refused; zeros; or those of `initial()`, a tree like `target`.
    State of random numbers (a PRNG key, or what lies under `rngs` or `dropout`) that is absent is made from seed 0
    under every policy. unexpected: whether leaves that `target` lacks are refused. `notes` gets a line for each leaf
    that was made up or left out.

    Raises:
        UserError: structure, shapes or dtypes differ; lists every difference.
        DamagedCheckpoint: the arrays cannot be read, or their bytes are not those that were saved.
    """
    assert initial is not None or missing != "init", "missing='init' needs initial="
    leaves = digest.named_leaves(target)
    notes = [] if notes is None else notes
    expected = {path: (tuple(np.shape(leaf)), dtype_name(leaf)) for path, leaf in leaves.items()}
    found = {path: (leaf.shape, leaf.dtype) for path, leaf in manifest.leaves.items()}
    found = {path: form for path, form in found.items() if not path.startswith("foreign/")}
    random = {path for path in expected.keys() - found.keys() if _is_random(path, leaves[path])}
    absent = {path for path in expected.keys() - found.keys() - random} if missing != "error" else set()
    extra = found.keys() - expected.keys() if unexpected == "warn" else set()
    made_up = random | absent
    mismatch.check(step_path, expected, found, made_up | extra)
    fill = "its initial value" if missing == "init" else "zeros"
    notes += [f"missing, filled with seed 0: {path}" for path in leaves if path in random]
    notes += [f"missing, filled with {fill}: {path}" for path in leaves if path in absent]
    notes += [f"not used: {path}" for path in sorted(extra)]
    present = {path: leaf for path, leaf in leaves.items() if path not in made_up}
    arrays = read_leaves(step_path, present, manifest, verify=verify)
    first = digest.named_leaves(initial()) if absent and missing == "init" else {}
    values = [
        arrays[path] if path in arrays else _made_up(leaf, first.get(path), random=path in random)
        for path, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(target), values)


def _is_random(path: str, leaf: Any) -> bool:
    return is_key(leaf) or not {"rng", "rngs", "dropout"}.isdisjoint(path.split("/"))


def _made_up(leaf: Any, value: jax.Array | None, *, random: bool) -> jax.Array:
    """A leaf that no checkpoint has, under the sharding of the target."""
    sharding = getattr(leaf, "sharding", None)
    if value is not None:
        return value if sharding is None else jax.device_put(value, sharding)
    if not is_key(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
    assert random
    name = str(leaf.dtype).removeprefix("key<").removesuffix(">")

    def make() -> jax.Array:
        key = jax.random.key(0, impl=_KEY_KINDS.get(name, name))
        return jax.random.split(key, math.prod(leaf.shape)).reshape(leaf.shape) if leaf.shape else key

    return jax.jit(make, out_shardings=sharding)() if sharding is not None else make()


def read_leaves(
    step_path: Any, leaves: Mapping[str, Any], manifest: manifests.Manifest, *, verify: bool = True
) -> dict[str, jax.Array]:
    """Some of a step's arrays by path, in the order of `leaves`.

    The values of `leaves` are arrays or `jax.ShapeDtypeStruct` with the stored shape and dtype; only their
    shardings are used. Reads nothing else of the step.

    Raises:
        DamagedCheckpoint: an array cannot be read, or its bytes are not those that were saved.
    """
    stored = {path: _stored_form(leaf) for path, leaf in leaves.items() if np.prod(np.shape(leaf)) > 0}
    arrays = _read(step_path / manifests.STATE, stored) if stored else {}
    result = {path: _program_form(arrays.get(path), leaf) for path, leaf in leaves.items()}
    if verify:
        wrong = [p for p, found in digest.digest_tree(result).items() if found != manifest.leaves[p].digest]
        if wrong:
            raise manifests.DamagedCheckpoint(
                f"{step_path}/{manifests.STATE}: digest differs from the manifest for "
                f"{', '.join(sorted(wrong))}: these bytes are not those that were saved"
            )
    return result


def dtype_name(leaf: Any) -> str:
    """The dtype as the manifest writes it: "float32", "bfloat16", "key<fry>"."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return str(dtype) if is_key(leaf) else np.dtype(dtype).name


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}: the form in which a state is stored, readable without the optimizer's
    types.
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    return tree


def _read(item_path: Any, stored: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read arrays with TensorStore, each process and device only its shards.

    Orbax's own reader gives the same bits, but on a damaged file it leaves a page of tracebacks from
    abandoned event loops on stderr, whatever is caught here.
    """
    context = arrays_on_disk.context()
    opened = {path: ts.open(arrays_on_disk.array_spec(item_path, path), context=context, read=True) for path in stored}
    arrays: dict[str, jax.Array] = {}
    started: collections.deque[tuple[str, dict[Any, ts.Future]]] = collections.deque()
    waiting_bytes = 0

    def finish_oldest() -> int:
        path, reads = started.popleft()
        with arrays_on_disk.damage_named(item_path, path):
            shards = {index: read.result() for index, read in reads.items()}
        arrays[path] = _assemble(shards, stored[path])
        return sum(shard.nbytes for shard in shards.values())

    for path, leaf in stored.items():
        with arrays_on_disk.damage_named(item_path, path):
            array = opened[path].result()
            if array.shape != leaf.shape or array.dtype.numpy_dtype != leaf.dtype:
                raise ValueError(f"{array.dtype.name}{list(array.shape)} is not what the manifest says")
        reads = {_key(index): array[index].read() for index in _indices(leaf)}
        started.append((path, reads))
        waiting_bytes += sum(_shard_bytes(leaf) for _ in reads)
        while started and waiting_bytes > _READ_AHEAD_BYTES:
            waiting_bytes -= finish_oldest()
    while started:
        finish_oldest()
    return arrays


def _indices(leaf: jax.ShapeDtypeStruct) -> list[tuple[slice, ...]]:
    """What this process needs of an array, each part once."""
    parts = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    return list({_key(index): index for index in parts}.values())


def _key(index: tuple[slice, ...]) -> tuple:
    return tuple((part.start, part.stop) for part in index)


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _assemble(shards: dict[Any, np.ndarray], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
    pieces = [jax.device_put(shards[_key(index)], device) for device, index in places]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)


def _stored_form(leaf: Any) -> jax.ShapeDtypeStruct:
    """What is on disk for a leaf: itself, or the key data of a key; with the sharding to read it with."""
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    if not is_key(leaf):
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=_key_data_sharding(sharding, len(leaf.shape)))


def _key_data_sharding(sharding: Sharding, rank: int) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = tuple(sharding.spec) + (None,) * (rank - len(sharding.spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec, None))


def _program_form(array: jax.Array | None, leaf: Any) -> jax.Array:
    if array is None:  # an empty array: nothing of it is stored
        return jnp.zeros(leaf.shape, leaf.dtype, device=getattr(leaf, "sharding", None))
    if not is_key(leaf):
        return array
    kind = str(leaf.dtype).removeprefix("key<").removesuffix(">")
    return jax.random.wrap_key_data(array, impl=_KEY_KINDS.get(kind, kind))
