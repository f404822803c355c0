# SPDX-License-Identifier: Apache-2.0
"""The parameters of a model out of a checkpoint's contents, and what happens to what is missing, extra or misshapen.

Three policies: missing (`error`: refuse; `warn`: zeros and a line in the report; `init`: initial values and a line),
unexpected (`error` | `warn`), and shapes, which always are an error. All problems are in one message.
"""

from collections.abc import Mapping, Sized
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
from maxkit.checkpoint.quantize import stored_as
from maxkit.errors import UserError
from maxkit.formats.contents import Contents
from maxkit.models.definition import ModelDefinition, Parameter
from maxkit.types import Tree

Policy = Literal["error", "warn", "init"]


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
    source = stored_as(source, *definition.storage)
    present = set(source.addresses())
    parameters = definition.parameters.values()
    absent = [p for p in parameters if any(key not in present for key in addresses_of(p))]
    found = [p for p in parameters if p not in absent]
    lacking = [p for p in absent if not p.trainable_adapter]
    known = {key for p in parameters for key in addresses_of(p)}
    unplaced, unused = sorted(present - known, key=_order), source.unused_keys()
    problems = _misshapen(source, definition, present)
    problems += _uncast(source, definition, present) if not cast else []
    problems += _missing(source, lacking, present) if missing == "error" else []
    problems += _unexpected(source, unplaced, unused, known) if unexpected == "error" else []
    if problems:
        raise UserError(". ".join(problems))
    fill = "its initial value" if missing == "init" else "zeros"
    report += [f"missing, filled with {fill}: {p.path} {list(p.shape)} {p.dtype}" for p in lacking]
    report += [f"not used: {name}" for name in (*_grouped({key: "" for key in unplaced}), *mismatch.collapsed(unused))]
    if not isinstance(source, StoreContents):
        report += _ignored_lines(source.ignored_keys())
    leaves = _read(source, definition, found, mesh, report)
    drawn = [p for p in absent if p.trainable_adapter or missing == "init"]
    initial = definition.flat(definition.init(seed, mesh, [p.path for p in drawn])) if drawn else {}
    for parameter in absent:
        value = initial[parameter.path] if parameter in drawn else _zeros(parameter, mesh)
        leaves[parameter.path] = _fill(source, parameter, value, present, mesh)
    return definition.unflat(leaves)


def addresses_of(parameter: Parameter) -> list[Address]:
    """The tensors that a parameter holds, in the order of its rows."""
    if parameter.layers is None:
        return [(parameter.address, None)]
    return [(parameter.address, layer) for layer in parameter.layers]


# ------------------------------------------------------------ what does not fit


def _misshapen(source: Contents, definition: ModelDefinition, present: set[Address]) -> list[str]:
    lines = {}
    for parameter in definition.parameters.values():
        letters = parameter.letters[1:] if parameter.stacked else parameter.letters
        for key in addresses_of(parameter):
            if key in present and (shape := tuple(source.shape(*key))) != parameter.layer_shape:
                hint = mismatch.hint_of_shape(letters, parameter.layer_shape, shape)
                lines[key] = f": expected {list(parameter.layer_shape)}, found {list(shape)}{hint}"
    if not lines:
        return []
    return [f"{_count(lines, 'tensor')} of the checkpoint {_have(lines)} another shape: {'; '.join(_grouped(lines))}"]


def _uncast(source: Contents, definition: ModelDefinition, present: set[Address]) -> list[str]:
    """Widening loses nothing and is only noted; anything else must be asked for."""
    lines = {}
    for parameter in definition.parameters.values():
        for key in addresses_of(parameter):
            if key in present:
                stored = source.dtype(*key)
                if np.promote_types(stored, parameter.dtype) != parameter.dtype:
                    lines[key] = f" is stored as {stored}, which {parameter.dtype} does not hold"
    return [f"{'; '.join(_grouped(lines))}: say which with dtype="] if lines else []


def _missing(source: Contents, lacking: list[Parameter], present: set[Address]) -> list[str]:
    layers, lines = {layer for _, layer in present}, {}
    for parameter in lacking:
        form = f"{np.dtype(parameter.dtype).name}{list(parameter.layer_shape)}"
        for key in addresses_of(parameter):
            if key not in present:
                lines[key] = f": expected {form}, found nothing{mismatch.hint_of_address(*key, layers)}"
    if not lines:
        return []
    keys = mismatch.collapsed(source.missing_keys())
    stored = f" (stored they would be {', '.join(keys)})" if keys else ""
    return [
        f"{_count(lines, 'tensor')} of the model {'is' if len(lines) == 1 else 'are'} not in the checkpoint: "
        f"{'; '.join(_grouped(lines))}{stored}. Check num_layers and the family, "
        "or set checkpoint_missing_param_policy to warn (zeros) or init (initial values)"
    ]


def _unexpected(source: Contents, unplaced: list[Address], unused: list[str], known: set[Address]) -> list[str]:
    layers = {layer for _, layer in known}
    lines = {
        key: f": expected nothing, found {source.dtype(*key)}{list(source.shape(*key))}"
        f"{mismatch.hint_of_address(*key, layers)}"
        for key in unplaced
    }
    names = [*_grouped(lines), *mismatch.collapsed(unused)]
    if not names:
        return []
    number = len(unplaced) + len(unused)
    return [
        f"{number} tensor{'s' if number > 1 else ''} of the checkpoint {'is' if number == 1 else 'are'} "
        f"not part of the model: {'; '.join(names)}; unexpected='warn' leaves them out"
    ]


def _ignored_lines(keys: dict[str, str]) -> list[str]:
    """One line for each reason why stored tensors are not read."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in keys.items():
        by_reason.setdefault(reason, []).append(key)
    return [
        f"not read, {reason}: {', '.join(found[:3])}{f' and {len(found) - 3} more' if found[3:] else ''}"
        for reason, found in by_reason.items()
    ]


def _order(key: Address) -> tuple[str, int]:
    path, layer = key
    return path, -1 if layer is None else layer


def _grouped(lines: Mapping[Address, str]) -> list[str]:
    """One line for the layers of which the same is to be said: every tensor is named, however many there are."""
    layers: dict[tuple[str, str], list[int | None]] = {}
    for (path, layer), text in lines.items():
        layers.setdefault((path, text), []).append(layer)
    return [
        path
        + (f" (layer{'s' if len(found) > 1 else ''} {mismatch.ranges(found)})" if found[0] is not None else "")
        + text
        for (path, text), found in layers.items()
    ]


def _count(lines: Sized, noun: str) -> str:
    return f"{len(lines)} {noun}{'s' if len(lines) != 1 else ''}"


def _have(lines: Sized) -> str:
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
        _note_cast(tensor.dtype, parameter, report)
        (value[row : row + 1] if parameter.stacked else value)[...] = tensor
    return value


def _zeros(parameter: Parameter, mesh: Mesh | None) -> jax.Array:
    sharding = meshes.weight_sharding(parameter.letters, parameter.shape, mesh) if mesh else None
    return jnp.zeros(parameter.shape, parameter.dtype, device=sharding)


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
