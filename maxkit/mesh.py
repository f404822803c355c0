# SPDX-License-Identifier: Apache-2.0
"""Devices, mesh axes, and the one table from dimension letter to mesh axes.

Nothing outside this file names a mesh axis. Every PartitionSpec is derived from the letters an einsum or a parameter is
written with, so a spec cannot disagree with the layout of its array.

Axes are Explicit: the layout is part of an array's type and an ambiguous one fails while tracing
(docs/design/002-sharding.md). The same model also runs without a mesh and under Auto axes (inside Tunix): `sharding_of`
is the one place that decides whether an output sharding is passed. Next to read: `ops/`, `models/layers.py`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxkit.errors import UserError
from maxkit.mesh_axes import AXES, parse_mesh

# letter -> mesh axes, for weights and for activations. A letter that is absent is never sharded.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "D": ("fsdp",),
    "F": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "V": ("tensor",),
    "E": ("expert",),
    "Q": ("fsdp",),
    "Z": ("fsdp",),
}
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp", "expert"),
    "F": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "V": ("tensor",),
    "E": ("expert",),
}


def make_mesh(description: str = "", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all `devices` with every axis of `AXES`, those not named of size 1.

    `description` is `"fsdp:4,tensor:2"`; `""` puts all devices on fsdp; one size may be -1 for what remains.

    Raises:
        UserError: unknown axis, bad syntax, or sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = parse_mesh(description, len(devices))
    if devices[0].platform == "tpu":
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)
    grid = np.asarray(devices, dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def axis_sizes(mesh: Mesh) -> dict[str, int]:
    """{axis: size} of the axes that are larger than 1."""
    return {name: size for name, size in mesh.shape.items() if size > 1}


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the batch is cut; a micro-batch must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in ACTIVATIONS["B"])


def _spec(letters: str, shape: Sequence[int], mesh: Mesh | jax.sharding.AbstractMesh, table: dict) -> P:
    """One entry per letter; an axis that does not divide the dimension is left out (listed by `unsharded`)."""
    if len(letters) != len(shape):
        raise AssertionError(f"{letters!r} does not describe an array of shape {tuple(shape)}")
    sizes, used, entries = dict(mesh.shape), set(), []
    for letter, dim in zip(letters, shape, strict=True):
        axes = tuple(a for a in table.get(letter, ()) if sizes.get(a, 1) > 1)
        ways = math.prod(sizes[a] for a in axes)
        if not axes or dim % ways or used.intersection(axes):
            entries.append(None)
            continue
        used.update(axes)
        entries.append(axes if len(axes) > 1 else axes[0])
    return P(*entries)


def weight_spec(letters: str, shape: Sequence[int], mesh: Mesh) -> P:
    """The PartitionSpec of a parameter written with `letters` (vectors are replicated: they multiply activations)."""
    if len(letters.replace("L", "")) < 2:
        return P(*([None] * len(letters)))
    return _spec(letters, shape, mesh, WEIGHTS)


def weight_sharding(letters: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`weight_spec` on `mesh`."""
    return NamedSharding(mesh, weight_spec(letters, shape, mesh))


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Rows over every batch axis, the other dimensions whole; the number of rows must be a multiple of `batch_ways`."""
    return NamedSharding(mesh, _spec("B" + "T" * (ndim - 1), [batch_ways(mesh)] * ndim, mesh, ACTIVATIONS))


def process_rows(mesh: Mesh) -> tuple[int, int]:
    """(index, count): of every batch's rows this process holds the index-th of `count` equal parts.

    Processes that an axis without rows (tensor) runs across hold the same rows.
    """
    parts: dict[int, set[int]] = {}
    ways = batch_ways(mesh)
    for device, (rows, *_) in batch_sharding(mesh, 1).devices_indices_map((ways,)).items():
        own = parts.setdefault(int(getattr(device, "process_index")), set())  # noqa: B009 - its stub lacks it
        own.update(range(*rows.indices(ways)))
    distinct = sorted({tuple(sorted(part)) for part in parts.values()})
    assert sum(map(len, distinct)) == ways, "processes must hold the same rows or none in common"
    return distinct.index(tuple(sorted(parts[jax.process_index()]))), len(distinct)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def on_devices(sharding: jax.sharding.Sharding | None, mesh: Mesh) -> NamedSharding:
    """The same layout on the devices of `mesh`; replicated where nothing is known."""
    return NamedSharding(mesh, sharding.spec if isinstance(sharding, NamedSharding) else P())


def unsharded(letters_and_shapes: dict[str, tuple[str, Sequence[int]]], mesh: Mesh) -> list[str]:
    """What the table would shard but the sizes do not allow, one line each: for the plan and the hardware card."""
    lines = set()
    for letters, shape in letters_and_shapes.values():
        for letter, dim in zip(letters, shape, strict=True):
            for axis in WEIGHTS.get(letter, ()):
                if mesh.shape[axis] > 1 and dim % mesh.shape[axis]:
                    lines.add(f"{letter}={dim} is left unsharded: {axis}={mesh.shape[axis]} does not divide it")
    return sorted(lines)


def check_shards_something(letters_and_shapes: dict[str, tuple[str, Sequence[int]]], mesh: Mesh) -> None:
    """Refuse a mesh that divides no parameter, unless it only asks for copies of the model (all on `data`).

    Raises:
        UserError: more than one device outside `data`, and not one parameter is divided.
    """
    if mesh.shape["data"] == mesh.size:
        return
    specs = (weight_spec(letters, shape, mesh) for letters, shape in letters_and_shapes.values())
    if not any(any(spec) for spec in specs):
        reasons = "; ".join(unsharded(letters_and_shapes, mesh)) or "no parameter has such a dimension"
        advice = "mesh='data:-1' (whole weights on every device)" if mesh.shape["fsdp"] > 1 else "mesh='' (all on fsdp)"
        raise UserError(f"mesh {describe(mesh)} shards nothing of this model: {reasons}; use {advice}")


def describe(mesh: Mesh) -> str:
    """`"fsdp:4,tensor:2"`, `"1 device"`."""
    sizes = axis_sizes(mesh)
    return ",".join(f"{name}:{size}" for name, size in sizes.items()) or "1 device"


# ---------------------------------------------------------------- while tracing


def explicit_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh in force if all its axes are Explicit, else None (no mesh, Auto axes, inside shard_map)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Explicit for kind in mesh.axis_types):
        return None
    return mesh


def sharding_of(letters: str, shape: Sequence[int]) -> P | None:
    """The output sharding to pass for an activation written with `letters`: a spec under Explicit axes, else None."""
    mesh = explicit_mesh()
    return None if mesh is None else _spec(letters, shape, mesh, ACTIVATIONS)


def einsum(
    subscripts: str, *operands: jax.Array, preferred_element_type: jnp.dtype | None = None, like: P | None = None
) -> jax.Array:
    """`jnp.einsum` whose output sharding follows from its letters, or is `like` (from `layout`)."""
    inputs, output = subscripts.split("->")
    sizes = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        sizes.update(zip(letters, operand.shape, strict=True))
    return jnp.einsum(
        subscripts,
        *operands,
        preferred_element_type=preferred_element_type,
        out_sharding=like or sharding_of(output, [sizes[letter] for letter in output]),
    )


def gather_rows(table: jax.Array, ids: jax.Array, letters: str, table_letters: str = "VD") -> jax.Array:
    """`table[ids]` for a table that may be sharded; `letters` are those of the result."""
    spec = sharding_of(letters, ids.shape + table.shape[1:])
    if spec is None:
        return table[ids]
    # Gather the table over fsdp first: asking for both moves at once makes the compiler replicate the activations.
    return constrain(table, table_letters).at[ids].get(out_sharding=spec)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Put `x` into the layout of its letters: a reshard under Explicit axes, nothing otherwise."""
    spec = sharding_of(letters, x.shape)
    return x if spec is None else jax.sharding.reshard(x, spec)


def replicate(x: jax.Array) -> jax.Array:
    """All of `x` on every device (under Explicit axes)."""
    return x if explicit_mesh() is None else jax.sharding.reshard(x, P(*([None] * x.ndim)))


def layout(x: jax.Array) -> P | None:
    """The PartitionSpec in the type of `x` under Explicit axes, else None."""
    return None if explicit_mesh() is None else jax.typeof(x).sharding.spec


def zeros(shape: Sequence[int], dtype: jnp.dtype, letters: str, *, like: P | None = None) -> jax.Array:
    """Zeros in the layout of their letters (or `like`, from `layout`), fit to start a scan carry with."""
    spec = like or sharding_of(letters, shape)
    return jnp.zeros(shape, dtype) if spec is None else jnp.zeros(shape, dtype, out_sharding=spec)


def is_sharded(letter: str, size: int) -> bool:
    """Whether an activation dimension of this letter and size is divided by the mesh in force."""
    spec = sharding_of(letter, (size,))
    return spec is not None and spec[0] is not None


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a traced function is compiled for.

    platform: "cpu", "gpu", "tpu". divisible: whether `shard_map` can hand each device its part; without it the compiler
    would have to divide a kernel, which it cannot. compute_capability: of NVIDIA GPUs, where they are at hand.
    """

    platform: str
    divisible: bool = True
    compute_capability: float | None = None


def devices_in_force() -> Devices:
    """The devices of the mesh in force, which need not be here (a topology); else those JAX takes by default."""
    mesh = jax.sharding.get_abstract_mesh()
    divisible = mesh.empty or mesh.size == 1 or AxisType.Auto not in mesh.axis_types
    device = None if mesh.empty else mesh.abstract_device
    if device is not None:
        platform = device.platform
    else:
        default = getattr(jax.config, "jax_default_device", None)
        platform = getattr(default, "platform", default) or jax.default_backend()
    capability = None
    if platform == "gpu" and jax.default_backend() == "gpu":
        numbers = re.fullmatch(r"\d+\.\d+", str(getattr(jax.devices()[0], "compute_capability", "")))
        capability = float(numbers[0]) if numbers else None
    return Devices(platform, divisible, capability)


def shard_map(function: Callable[..., jax.Array], inputs: Sequence[str], output: str) -> Callable[..., jax.Array]:
    """`function` run by every device on its own parts, for kernels that the compiler cannot divide.

    inputs: the letters of its arguments; output: those of its result, each a letter of an argument or never sharded.
    Where axes are not Explicit, or inside another `shard_map`, it is the function itself.
    """

    def call(*arrays: jax.Array) -> jax.Array:
        mesh = explicit_mesh()
        if mesh is None:
            return function(*arrays)
        sizes = {}
        for letters, array in zip(inputs, arrays, strict=True):
            sizes.update(zip(letters, array.shape, strict=True))
        specs = [_spec(letters, [sizes[x] for x in letters], mesh, ACTIVATIONS) for letters in (*inputs, output)]
        parts = [jax.sharding.reshard(array, spec) for array, spec in zip(arrays, specs[:-1], strict=True)]
        # check_vma: Pallas calls do not say over which axes their results vary.
        return jax.shard_map(function, in_specs=tuple(specs[:-1]), out_specs=specs[-1], check_vma=False)(*parts)

    return call


def expert_parallel(
    function: Callable[..., jax.Array],
    tokens: tuple[jax.Array, ...],
    experts: dict[str, jax.Array],
    letters: dict[str, str],
) -> jax.Array:
    """`function(tokens, experts, first)`, every device running its own experts, or its own part of their F.

    `tokens` are [B, ...] arrays; `experts` arrays whose letters begin with E. The function gets rows of tokens, the
    experts from number `first` on, and returns what these add to the result [B, T, D]: the sum over all experts and
    over all parts of F is the result. It runs on whole D and on plain local arrays.

    Under Explicit axes: weights are gathered over fsdp, rows over expert (each device's experts see the tokens of all
    devices on that axis; no token is dropped), results are summed over tensor and summed and scattered over expert.
    Without a mesh, or under Auto axes, it is one call.
    """
    mesh = explicit_mesh()
    if mesh is None:
        return function(tokens, experts, 0)
    weights = {name: _spec(letters[name], value.shape, mesh, WEIGHTS) for name, value in experts.items()}
    rows = tuple(_spec("B" + "T" * (x.ndim - 1), x.shape, mesh, ACTIVATIONS) for x in tokens)
    split_experts, split_f = (any(_has(spec, axis) for spec in weights.values()) for axis in ("expert", "tensor"))
    exchange = split_experts and _has(rows[0], "expert")

    def local(tokens: tuple[jax.Array, ...], experts: dict[str, jax.Array]) -> jax.Array:
        experts = {name: _whole(value, weights[name], letters[name], split_f) for name, value in experts.items()}
        if exchange:
            tokens = jax.tree.map(lambda x: jax.lax.all_gather(x, "expert", axis=0, tiled=True), tokens)
        first = jax.lax.axis_index("expert") * next(iter(experts.values())).shape[0] if split_experts else 0
        y = function(tokens, experts, first)
        y = jax.lax.psum(y, "tensor") if split_f else y
        if exchange:
            return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        return jax.lax.psum(y, "expert") if split_experts else y

    tokens = tuple(jax.sharding.reshard(x, spec) for x, spec in zip(tokens, rows, strict=True))
    experts = {name: jax.sharding.reshard(value, weights[name]) for name, value in experts.items()}
    # check_vma: what was gathered counts as different on every device, so whole results could not be declared whole.
    return jax.shard_map(local, in_specs=(rows, weights), out_specs=rows[0], check_vma=False)(tokens, experts)


def _has(spec: P, axis: str) -> bool:
    return any(axis == entry or (isinstance(entry, tuple) and axis in entry) for entry in spec)


def _whole(weight: jax.Array, spec: P, letters: str, split_f: bool) -> jax.Array:
    """A device's part of an expert weight, whole along D; one without F is added by the first part of F only."""
    for dim, entry in enumerate(spec):
        if entry == "fsdp":
            weight = jax.lax.all_gather(weight, "fsdp", axis=dim, tiled=True)
    if split_f and "F" not in letters:
        weight = jnp.where(jax.lax.axis_index("tensor") == 0, weight, 0)
    return weight
