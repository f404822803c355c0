# SPDX-License-Identifier: Apache-2.0
"""The parameters of a model out of a checkpoint's contents, and what happens to what is missing, extra or misshapen.

Three policies: missing (`error`: refuse; `warn`: zeros and a line in the report; `init`: initial values and a line),
unexpected (`error` | `warn`), and shapes, which always are an error. All problems are in one message.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from maxkit import mesh as meshes
from maxkit.checkpoint import mismatch, restore
from maxkit.checkpoint.contents import STATE_PARTS, StoreContents
from maxkit.checkpoint.layout import Address
from maxkit.errors import UserError
from maxkit.formats.contents import Contents
from maxkit.models.definition import ModelDefinition, Parameter
from maxkit.types import Tree

Policy = Literal["error", "warn", "init"]
_SHOWN = 20  # of a list in a message


def read_params(
    source: Contents,
    definition: ModelDefinition,
    mesh: Mesh | None,
    *,
    missing: Policy = "error",
    unexpected: Literal["error", "warn"] = "error",
    report: list[str],
    seed: int = 0,
    cast: bool = True,
) -> Tree:
    """The parameters of `definition` out of `source`, one leaf at a time, each put on its devices at once.

    Adapters that the source does not have get their initial values: they were asked for on top of it.

    Raises:
        UserError: missing or unexpected tensors under an error policy, tensors of another shape, types that would have
            to be cast; names all of them.
    """
    present = set(source.addresses())
    parameters = definition.parameters.values()
    absent = [p for p in parameters if any(key not in present for key in addresses_of(p))]
    found = [p for p in parameters if p not in absent]
    lacking = [p for p in absent if not p.trainable_adapter]
    known = {key for p in parameters for key in addresses_of(p)}
    unused = [*_by_path(present - known), *source.unused_keys()]
    problems = _misshapen(source, definition, present)
    problems += _uncast(source, found) if not cast else []
    problems += [_missing_text(source, lacking, found)] if lacking and missing == "error" else []
    problems += [_unexpected_text(unused)] if unused and unexpected == "error" else []
    if problems:
        raise UserError(". ".join(problems))
    fill = "its initial value" if missing == "init" else "zeros"
    report += [f"missing, filled with {fill}: {p.path} {list(p.shape)} {p.dtype}" for p in lacking]
    report += [f"not used: {key}" for key in unused]
    if not isinstance(source, StoreContents):
        report += _ignored_lines(source.ignored_keys())
    leaves = _read(source, definition, found, mesh, report)
    if absent:
        initial = definition.flat(definition.init(seed, mesh))
        for parameter in absent:
            keep = parameter.trainable_adapter or missing == "init"
            value = initial[parameter.path] if keep else jnp.zeros_like(initial[parameter.path])
            leaves[parameter.path] = _fill(source, parameter, value, present, mesh)
    return definition.unflat(leaves)


def addresses_of(parameter: Parameter) -> list[Address]:
    """The tensors that a parameter holds, in the order of its rows."""
    if parameter.layers is None:
        return [(parameter.address, None)]
    return [(parameter.address, layer) for layer in parameter.layers]


# ------------------------------------------------------------ what does not fit


def _misshapen(source: Contents, definition: ModelDefinition, present: set[Address]) -> list[str]:
    lines = []
    for parameter in definition.parameters.values():
        for path, layer in addresses_of(parameter):
            if (path, layer) not in present:
                continue
            shape = tuple(source.shape(path, layer))
            if shape != parameter.layer_shape:
                letters = parameter.letters[1:] if parameter.stacked else parameter.letters
                where = parameter.path if layer is None else f"{parameter.path} (layer {layer})"
                hint = mismatch.hint_of_shape(letters, parameter.layer_shape, shape)
                lines.append(f"{where}: expected {list(parameter.layer_shape)}, found {list(shape)}{hint}")
    if not lines:
        return []
    return [f"{_count(lines, 'tensor')} of the checkpoint {_have(lines)} another shape: {_listed(lines)}"]


def _uncast(source: Contents, found: list[Parameter]) -> list[str]:
    """Widening loses nothing and is only noted; anything else must be asked for."""
    lines = []
    for parameter in found:
        stored = source.dtype(*addresses_of(parameter)[0])
        if np.promote_types(stored, parameter.dtype) != parameter.dtype:
            lines.append(f"{parameter.path} is stored as {stored}, which {parameter.dtype} does not hold")
    return [f"{_listed(lines)}: say which with dtype="] if lines else []


def _missing_text(source: Contents, lacking: list[Parameter], found: list[Parameter]) -> str:
    there, absent = ({p.path: (p.shape, np.dtype(p.dtype).name) for p in some} for some in (found, lacking))
    lines, keys = mismatch.mismatches(there | absent, there), source.missing_keys()
    stored = f" (stored they would be {_listed(keys, ', ')})" if keys else ""
    return (
        f"{_count(lines, 'parameter')} of the model {'is' if len(lines) == 1 else 'are'} not in the checkpoint: "
        f"{_listed(lines)}{stored}. Check num_layers and the family, "
        "or set checkpoint_missing_param_policy to warn (zeros) or init (initial values)"
    )


def _unexpected_text(unused: list[str]) -> str:
    verb = "is" if len(unused) == 1 else "are"
    return (
        f"{_count(unused, 'tensor')} of the checkpoint {verb} not part of the model: {_listed(unused, ', ')}; "
        "unexpected='warn' leaves them out"
    )


def _ignored_lines(keys: dict[str, str]) -> list[str]:
    """One line for each reason why stored tensors are not read."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in keys.items():
        by_reason.setdefault(reason, []).append(key)
    return [
        f"not read, {reason}: {', '.join(found[:3])}{f' and {len(found) - 3} more' if found[3:] else ''}"
        for reason, found in by_reason.items()
    ]


def _by_path(addresses: set[Address]) -> list[str]:
    layers: dict[str, list[int]] = {}
    for path, layer in addresses:
        layers.setdefault(path, []).extend([] if layer is None else [layer])
    return [f"{path} (layers {', '.join(map(str, sorted(n)))})" if n else path for path, n in sorted(layers.items())]


def _listed(lines: list[str], separator: str = "; ") -> str:
    rest = len(lines) - _SHOWN
    return separator.join(lines[:_SHOWN]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _count(lines: list[str], noun: str) -> str:
    return f"{len(lines)} {noun}{'s' if len(lines) != 1 else ''}"


def _have(lines: list[str]) -> str:
    return "has" if len(lines) == 1 else "have"


# ------------------------------------------------------------ reading


def _read(
    source: Contents, definition: ModelDefinition, found: list[Parameter], mesh: Mesh | None, report: list[str]
) -> dict[str, jax.Array]:
    if isinstance(source, StoreContents) and source.scan_layers == definition.execution.scan_layers:
        return _read_store(source, found, mesh, report)
    return {p.path: _put(_stack(source, p, report), p, mesh) for p in found}


def _read_store(
    source: StoreContents, parameters: list[Parameter], mesh: Mesh | None, report: list[str]
) -> dict[str, jax.Array]:
    """Leaves of our own checkpoint, each process and device only its shards, verified."""
    leaves = source.manifest.leaves
    paths = {
        p.path: next(f"{part}/{p.path}" for part in STATE_PARTS if f"{part}/{p.path}" in leaves) for p in parameters
    }
    wanted = {}
    for parameter in parameters:
        sharding = meshes.weight_sharding(parameter.letters, parameter.shape, mesh) if mesh else None
        dtype = jnp.dtype(leaves[paths[parameter.path]].dtype)
        wanted[paths[parameter.path]] = jax.ShapeDtypeStruct(parameter.shape, dtype, sharding=sharding)
    arrays = restore.read_leaves(source.step_path, wanted, source.manifest)
    for parameter in parameters:
        _note_cast(arrays[paths[parameter.path]].dtype, parameter, report)
    return {p.path: arrays[paths[p.path]].astype(p.dtype) for p in parameters}


def _stack(source: Contents, parameter: Parameter, report: list[str]) -> np.ndarray:
    """The parameter's value on the host; a stack is filled layer by layer, so peak memory is one leaf and one layer."""
    target = np.dtype(ml_dtypes.bfloat16) if parameter.dtype == jnp.bfloat16 else np.dtype(parameter.dtype)
    value = np.empty(parameter.shape, target)
    for row, (address, layer) in enumerate(addresses_of(parameter)):
        tensor = source.read(address, layer)
        assert tensor.shape == parameter.layer_shape, (address, layer, tensor.shape)
        if row == 0:
            _note_cast(tensor.dtype, parameter, report)
        (value[row : row + 1] if parameter.stacked else value)[...] = tensor
    return value


def _fill(source: Contents, parameter: Parameter, value: jax.Array, present: set, mesh: Mesh | None) -> jax.Array:
    """`value` with the layers of a stack that the source does have: only what is missing is made up."""
    there = [row for row, key in enumerate(addresses_of(parameter)) if key in present]
    if not parameter.stacked or not there:
        return value
    whole = np.array(value)
    for row in there:
        whole[row] = source.read(*addresses_of(parameter)[row])
    return _put(whole, parameter, mesh)


def _note_cast(stored, parameter: Parameter, report: list[str]) -> None:
    line = f"cast from {stored} to {parameter.dtype}"
    if stored != parameter.dtype and line not in report:
        report.append(line)


def _put(value: np.ndarray, parameter: Parameter, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(value)
    sharding = meshes.weight_sharding(parameter.letters, parameter.shape, mesh)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
