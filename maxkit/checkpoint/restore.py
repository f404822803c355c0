# SPDX-License-Identifier: Apache-2.0
"""Read the state of one step onto any mesh, and verify it.

A state is compared with the manifest before anything is read, so that what does not fit is refused with all
differences at once and never ends in a traceback of Orbax or JAX. Next to read: `mismatch.py`, `store.py`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from maxkit.checkpoint import digest, mismatch
from maxkit.checkpoint import manifest as manifests
from maxkit.types import Tree

# The names that JAX writes into a key's dtype, "key<fry>", and the names its functions take.
_KEY_KINDS = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}


def restore_tree(step_path: Any, target: Tree, manifest: manifests.Manifest, *, verify: bool = True) -> Tree:
    """A tree like `target` with the arrays of a step, on the shardings of `target`.

    `target` is a tree of arrays or `jax.ShapeDtypeStruct`; a leaf without sharding goes to the first device.
    The step may have been saved on another mesh. `verify` compares every leaf with its digest.

    Raises:
        UserError: structure, shapes or dtypes differ; lists every difference.
        DamagedCheckpoint: the arrays cannot be read, or their bytes are not those that were saved.
    """
    leaves = digest.named_leaves(target)
    expected = {path: (tuple(np.shape(leaf)), dtype_name(leaf)) for path, leaf in leaves.items()}
    found = {path: (leaf.shape, leaf.dtype) for path, leaf in manifest.leaves.items()}
    mismatch.check(step_path, expected, found)
    return jax.tree.unflatten(
        jax.tree.structure(target), read_leaves(step_path, leaves, manifest, verify=verify).values()
    )


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
    arguments = {
        path: ocp.ArrayRestoreArgs(
            restore_type=jax.Array, dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape
        )
        for path, leaf in stored.items()
    }
    request = ocp.args.PyTreeRestore(nested(stored), restore_args=nested(arguments), partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = digest.named_leaves(reader.restore(item_path, args=request))
    except (
        Exception
    ) as error:  # Orbax and TensorStore raise a dozen kinds for what is always a damaged file here
        raise manifests.DamagedCheckpoint(f"{item_path} cannot be read{_culprit(error)}") from error
    wrong = [p for p, leaf in stored.items() if p not in arrays or arrays[p].shape != leaf.shape]
    if wrong:
        raise manifests.DamagedCheckpoint(
            f"{item_path} lacks {', '.join(sorted(wrong))}: the step is incomplete"
        )
    return arrays


def _stored_form(leaf: Any) -> jax.ShapeDtypeStruct:
    """What is on disk for a leaf: itself, or the key data of a key; with the sharding to read it with."""
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    if not is_key(leaf):
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(
        data.shape, data.dtype, sharding=_key_data_sharding(sharding, len(leaf.shape))
    )


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


def _culprit(error: BaseException) -> str:
    """The part of an error of Orbax or TensorStore that names a file or an array, on one line."""
    text = " ".join(str(error).split())
    return f": {text[:300]}" if text else f": {type(error).__name__}"
