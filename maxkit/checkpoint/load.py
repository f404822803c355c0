# SPDX-License-Identifier: Apache-2.0
"""`maxkit.load`: any readable checkpoint as a model on the devices, with what it says about itself.

Every tensor of the source is used or named in the report, every parameter of the model is read or refused: nothing is
guessed, filled, tiled or cast in silence. Next to read: `sources.py` (names), `formats/` (foreign files).
"""

import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from jax.sharding import Mesh

from maxkit import mesh as meshes
from maxkit.checkpoint import inspect, manifest, restore, sources
from maxkit.data.tokenizer import Tokenizer
from maxkit.errors import UserError, nearest
from maxkit.formats import presets
from maxkit.formats.gguf import GGUFReader
from maxkit.formats.huggingface import HuggingFaceReader, read_config
from maxkit.models.config import Execution, ModelConfig
from maxkit.models.decoder import Decoder
from maxkit.models.definition import ModelDefinition, Parameter
from maxkit.models.lora import LoraConfig
from maxkit.types import Tree

Policy = Literal["error", "warn", "init"]
WEIGHT_TYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that has its weights.

    params is the pure tree, `definition` its structure; `model` merges the two. `tokenizer` is None where the
    source has none. `report` says, line by line, what was decided and why.
    """

    definition: ModelDefinition
    params: Tree
    tokenizer: Tokenizer | None
    report: tuple[str, ...]
    source: str
    mesh: Mesh | None = None

    @property
    def model(self) -> Decoder:
        """The NNX module holding `params`."""
        return self.definition.merge(self.params)

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.definition.config


def load(
    path_or_model_name: str | Path,
    *,
    config: ModelConfig | str | Path | None = None,
    scan_layers: bool | None = None,
    dtype: str | None = None,
    mesh: Mesh | str | None = None,
    missing: Policy = "error",
    unexpected: Literal["error", "warn"] = "error",
) -> Loaded:
    """Load a model from a path, a known name, or `hf:owner/name`.

    Args:
        config: how the source was made, where it does not say; must agree with what it does say.
        scan_layers: stacked layers or one by one; None loads it from the checkpoint (without a layout: stacked).
        dtype: cast the weights, one of `WEIGHT_TYPES`; None keeps the stored type.
        mesh: where to put the weights: a mesh, its description, or None for the first device.
        missing: parameters that the source lacks: an error, zeros and a line in the report, or initial values.
        unexpected: tensors that the model does not use: an error, or a line in the report.

    Raises:
        UserError: no such model, a damaged or unsupported file, an explicit `scan_layers` that is not the stored one,
            missing, unexpected or misshapen tensors (all of them in one message).
    """
    if dtype is not None and dtype not in WEIGHT_TYPES:
        raise UserError(f"dtype={dtype!r}: {nearest(dtype, WEIGHT_TYPES)}")
    source = open_source(path_or_model_name)
    stored = getattr(source, "scan_layers", None)
    resolved, line = resolve_scan_layers(stored, scan_layers, "keyword", path_or_model_name)
    check_config(source, config, path_or_model_name)
    weights = dtype or source_dtype(source)
    execution = Execution(scan_layers=resolved, dtype="bfloat16" if weights == "bfloat16" else "float32")
    definition = ModelDefinition(source.config, execution, getattr(source, "lora", None), weights)
    mesh = meshes.make_mesh(mesh) if isinstance(mesh, str) else mesh
    report = [f"{path_or_model_name}: format {source.format}", line]
    params = read_params(
        source, definition, mesh, missing=missing, unexpected=unexpected, report=report, cast=dtype is not None
    )
    return Loaded(definition, params, source.tokenizer(), tuple(report), str(path_or_model_name), mesh)


def open_source(path_or_model_name: str | Path, config: Description = None) -> Contents:
    """Open what a name or path points to, by its own look, without reading tensors: `open.open_contents`."""
    return open_contents(path_or_model_name, config)


def source_dtype(source: "Source | MaxkitSource") -> str:
    """The type most weights are stored in, as a weight type."""
    counts = dict(getattr(source, "dtypes", {}))
    name = max(counts, key=counts.__getitem__, default="float32")
    return name if name in WEIGHT_TYPES and source.format != "gguf" else "float32"


def read_params(
    source: "Source | MaxkitSource",
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
        UserError: missing or unexpected tensors under an error policy, a type that would have to be cast.
    """
    present = set(source.paths) if isinstance(source, MaxkitSource) else set(source.addresses())
    found, absent = [], []
    for parameter in definition.parameters.values():
        keys = [parameter.path] if isinstance(source, MaxkitSource) else _addresses(parameter)
        (found if all(key in present for key in keys) else absent).append(parameter)
    keys = source.missing_keys() if not isinstance(source, MaxkitSource) else []
    _check_missing([p for p in absent if not p.trainable_adapter], keys, missing, report)
    if isinstance(source, MaxkitSource):
        unused = sorted(set(source.paths) - set(definition.parameters))
    else:
        unused = source.unused_keys()
        report += _ignored_lines(source.ignored_keys())
    _check_unexpected(unused, unexpected, report)
    leaves: dict[str, jax.Array] = {}
    if isinstance(source, MaxkitSource):
        leaves = source.leaves(found, mesh)
        leaves = {path: _typed(x, definition.parameters[path], cast, report) for path, x in leaves.items()}
    else:
        for parameter in found:
            leaves[parameter.path] = _put(_stack(source, parameter, cast, report), parameter, mesh)
    if absent:
        initial = definition.flat(definition.init(seed, mesh))
        for parameter in absent:
            keep = parameter.trainable_adapter or missing == "init"
            value = initial[parameter.path] if keep else jnp.zeros_like(initial[parameter.path])
            leaves[parameter.path] = _fill(source, parameter, value, present, mesh)
    return definition.unflat(leaves)


def _addresses(parameter: Parameter) -> list[tuple[str, int | None]]:
    if parameter.layers is None:
        return [(parameter.address, None)]
    return [(parameter.address, layer) for layer in parameter.layers]


def _check_missing(absent: list[Parameter], keys: list[str], policy: Policy, report: list[str]) -> None:
    lines = [f"{p.path} {list(p.shape)} {p.dtype}" for p in absent]
    if lines and policy == "error":
        raise UserError(
            f"{len(lines)} parameters of the model are not in the checkpoint: {'; '.join(lines)}"
            f"{' (stored they would be ' + ', '.join(keys) + ')' if keys else ''}. Check num_layers and the family, "
            "or set checkpoint_missing_param_policy to warn (zeros) or init (initial values)"
        )
    fill = "its initial value" if policy == "init" else "zeros"
    report += [f"missing, filled with {fill}: {line}" for line in lines]


def _ignored_lines(keys: dict[str, str]) -> list[str]:
    """One line for each reason why stored tensors are not read."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in keys.items():
        by_reason.setdefault(reason, []).append(key)
    return [
        f"not read, {reason}: {', '.join(found[:3])}{f' and {len(found) - 3} more' if found[3:] else ''}"
        for reason, found in by_reason.items()
    ]


def _check_unexpected(unused: list[str], policy: str, report: list[str]) -> None:
    if unused and policy == "error":
        raise UserError(
            f"{len(unused)} tensors of the checkpoint are not part of the model: {', '.join(unused[:20])}"
            f"{', ...' if len(unused) > 20 else ''}; unexpected='warn' leaves them out"
        )
    report += [f"not used: {key}" for key in unused]


def _stack(source: Source, parameter: Parameter, cast: bool, report: list[str]) -> np.ndarray:
    """The parameter's value on the host; a stack is filled layer by layer, so peak memory is one leaf and one layer."""
    target = np.dtype(ml_dtypes.bfloat16) if parameter.dtype == jnp.bfloat16 else np.dtype(parameter.dtype)
    value = np.empty(parameter.shape, target)
    for row, (address, layer) in enumerate(_addresses(parameter)):
        tensor = source.read(address, layer)
        if tensor.shape != parameter.layer_shape:
            raise UserError(
                f"{address} (layer {layer}) has shape {list(tensor.shape)}, "
                f"the config says {list(parameter.layer_shape)}"
            )
        if row == 0:
            _note_cast(tensor.dtype, target, parameter, cast, report)
        (value[row : row + 1] if parameter.stacked else value)[...] = tensor
    return value


def _fill(source, parameter: Parameter, value: jax.Array, present: set, mesh: Mesh | None):
    """`value` with the layers of a stack that the source does have: only what is missing is made up."""
    there = [row for row, key in enumerate(_addresses(parameter)) if key in present]
    if not parameter.stacked or not there:
        return value
    whole = np.array(value)
    for row in there:
        address, layer = _addresses(parameter)[row]
        whole[row] = source.read(address, layer)
    return _put(whole, parameter, mesh)


def _typed(x: jax.Array, parameter: Parameter, cast: bool, report: list[str]) -> jax.Array:
    _note_cast(x.dtype, parameter.dtype, parameter, cast, report)
    return x.astype(parameter.dtype)


def _note_cast(stored, wanted, parameter: Parameter, cast: bool, report: list[str]) -> None:
    if stored == wanted:
        return
    # Widening loses nothing; a source of mixed types is widened to the type of most of its weights.
    if not cast and np.promote_types(stored, wanted) != wanted:
        raise UserError(f"{parameter.path} is stored as {stored}, most weights as {wanted}: say which with dtype=")
    line = f"cast from {stored} to {wanted}"
    if line not in report:
        report.append(line)


def _put(value: np.ndarray, parameter: Parameter, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(value)
    sharding = meshes.weight_sharding(parameter.letters, parameter.shape, mesh)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
