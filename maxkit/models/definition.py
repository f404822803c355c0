# SPDX-License-Identifier: Apache-2.0
"""A model without its values: structure, shapes, letters, addresses; and how values are made, placed and merged in.

Everything that handles weights (training, checkpoints, conversion, planning) works on the pure nested dict of arrays
and on this description of it. The NNX module exists only inside a traced function or when a user asks for it.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from maxkit import mesh as meshes
from maxkit.models import quantized
from maxkit.models.config import Execution, ModelConfig
from maxkit.models.decoder import Decoder
from maxkit.models.layers import Make, Matrix, RowKeys
from maxkit.models.lora import LoraConfig
from maxkit.types import Tree


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf: its path in the tree, where it belongs in the model, and what it looks like.

    address: the path, or `layers/` and the path below the block. layers: None outside layers, else the layer numbers
    it holds, in the order of axis 0 when `stacked`. letters: one per dimension, "L" first when stacked.
    """

    path: str
    address: str
    layers: tuple[int, ...] | None
    stacked: bool
    letters: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    trainable_adapter: bool

    @property
    def num_weights(self) -> int:
        """How many weights it holds: of a quantised kernel those it stands for, of its scales none."""
        name = self.path.rpartition("/")[2]
        packed = 2 if name == quantized.VALUES and self.dtype == jnp.uint8 else 1
        return 0 if name == quantized.SCALES else packed * math.prod(self.shape)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer's tensor."""
        return self.shape[1:] if self.stacked else self.shape


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Where the random numbers of one update come from: its key, and the numbers [B] that rows have in its batch.

    A mask is drawn from key, address, layer and row alone: it depends neither on `scan_layers` nor on how the rows are
    split into micro-batches or over devices.
    """

    key: jax.Array
    rows: jax.Array

    def row_keys(self, parameter: Parameter) -> jax.Array:
        """Keys for the rows, [B], or [L, B] for a stack."""
        key = jax.random.fold_in(self.key, zlib.crc32(parameter.address.encode()))
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        layers = fold(key, jnp.asarray(parameter.layers, jnp.uint32))
        keys = jax.vmap(fold, in_axes=(0, None))(layers, self.rows)
        return keys if parameter.stacked else keys[0]


class ModelDefinition:
    """The structure of one model under one execution; equal arguments give equal definitions."""

    def __init__(
        self,
        config: ModelConfig,
        execution: Execution | None = None,
        lora: LoraConfig | None = None,
        weight_dtype: str = "float32",
    ):
        self.config, self.execution, self.lora = config, execution or Execution(), lora
        self.weight_dtype = jnp.dtype(weight_dtype)
        abstract = nnx.eval_shape(lambda: self._construct(0))
        self.graphdef, self._state = nnx.split(abstract)
        self.parameters: dict[str, Parameter] = {
            path: self._parameter(path, variable) for path, variable in self._variables(self._state)
        }
        if self.lora is not None:
            self.lora.check(self.matrices.values())

    def _construct(self, seed: int | jax.Array) -> Decoder:
        # Threefry by name: values of one seed must not depend on a process-wide generator setting.
        key = jax.random.key(seed, impl="threefry2x32")
        return Decoder(self.config, self.execution, Make(key, self.weight_dtype, self.lora))

    @functools.cached_property
    def matrices(self) -> dict[str, str]:
        """{path of a matrix in the tree: its address}, `layers/attention/query`: what can have an adapter."""
        found = {}
        for path, node in nnx.iter_graph(nnx.merge(self.graphdef, self._state)):
            if isinstance(node, Matrix):
                found["/".join(map(str, path))] = node.path
        return found

    @property
    def storage(self) -> tuple[str, dict[str, int]]:
        """How matrices are stored ("": as they are), and {address of a matrix: axis of its tiles}."""
        kind = self.lora.base_weight_dtype if self.lora is not None else ""
        if not kind:
            return "", {}
        letters = {p.address: p.letters for p in self.parameters.values()}
        return kind, {m: quantized.tiled_axis(letters[f"{m}/{quantized.VALUES}"]) for m in self.matrices.values()}

    @staticmethod
    def _variables(state: nnx.State) -> Iterator[tuple[str, nnx.Variable]]:
        for path, variable in nnx.to_flat_state(state):
            yield "/".join(str(part) for part in path), variable

    def _parameter(self, path: str, variable: nnx.Variable) -> Parameter:
        numbers = {group.name: group for group in self.config.layer_groups(self.execution.scan_layers)}
        parts, layers, stacked = path.split("/"), None, False
        if parts[0] in numbers:
            kind, number = re.fullmatch(r"(block|layer)_(\d+)", parts[1]).groups()
            stacked = kind == "block"
            layers = numbers[parts[0]].layer_numbers(int(number)) if stacked else (int(number),)
            parts = ["layers", *parts[2:]]
        return Parameter(
            path=path,
            address="/".join(parts),
            layers=layers,
            stacked=stacked,
            letters=variable.get_metadata()["letters"],
            shape=tuple(variable.shape),
            dtype=variable.dtype,
            trainable_adapter=isinstance(variable, nnx.LoRAParam),
        )

    # ------------------------------------------------------------ trees

    def tree(self, value) -> Tree:
        """A pure tree with `value(parameter)` at every leaf."""
        return unflatten_dict({p.path: value(p) for p in self.parameters.values()}, sep="/")

    @staticmethod
    def flat(tree: Tree) -> dict[str, Any]:
        """{"a/b": leaf} of a pure tree."""
        return flatten_dict(tree, sep="/")

    @staticmethod
    def unflat(leaves: dict[str, Any]) -> Tree:
        """The inverse of `flat`."""
        return unflatten_dict(leaves, sep="/")

    @property
    def shapes(self) -> Tree:
        """Tree of `jax.ShapeDtypeStruct`."""
        return self.tree(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype))

    @property
    def letters(self) -> Tree:
        """Tree of letter strings."""
        return self.tree(lambda p: p.letters)

    def shardings(self, mesh: Mesh) -> Tree:
        """Tree of NamedSharding on `mesh`."""
        return self.tree(lambda p: meshes.weight_sharding(p.letters, p.shape, mesh))

    @property
    def num_params(self) -> int:
        """Number of weights, adapters included."""
        return sum(p.num_weights for p in self.parameters.values())

    def init(self, seed: int, mesh: Mesh | None = None, only: Collection[str] | None = None) -> Tree:
        """Initial values of a seed, made on the mesh in their final layout; of the parameters `only`, if given."""

        def chosen(tree: Tree) -> Tree:
            return tree if only is None else self.unflat({path: self.flat(tree)[path] for path in only})

        make = lambda: chosen(nnx.to_pure_dict(nnx.state(self._construct(seed))))  # noqa: E731
        if mesh is None:
            return jax.jit(make)()
        # Sharding-in-types would be decided while drawing; values are drawn whole-program and laid out at the end.
        return jax.jit(make, out_shardings=chosen(self.shardings(mesh)))()

    def merge(self, params: Tree, dropout: Dropout | None = None) -> Decoder:
        """The model holding `params`; cheap while tracing. Without `dropout` adapters see all of their inputs."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        model = nnx.merge(self.graphdef, state)
        if dropout is not None and self.drops:
            for path in self.matrices:
                adapter = self.parameters.get(f"{path}/lora_a")
                if adapter is not None:
                    node: Any = functools.reduce(getattr, path.split("/"), model)
                    node.row_keys = nnx.data(RowKeys(dropout.row_keys(adapter)))
        return model

    @property
    def drops(self) -> bool:
        """Whether training this model draws random numbers."""
        return self.lora is not None and self.lora.dropout > 0

    @staticmethod
    def values(model: Decoder) -> Tree:
        """The pure tree of a model's parameters."""
        return nnx.to_pure_dict(nnx.state(model))

    def split_trainable(self, params: Tree) -> tuple[Tree, Tree]:
        """(trained, base): the adapters and the rest when there are adapters, else everything and an empty tree."""
        if self.lora is None:
            return params, {}
        flat = flatten_dict(params, sep="/")
        adapters = {k: v for k, v in flat.items() if self.parameters[k].trainable_adapter}
        base = {k: v for k, v in flat.items() if not self.parameters[k].trainable_adapter}
        return unflatten_dict(adapters, sep="/"), unflatten_dict(base, sep="/")

    @staticmethod
    def join(trained: Tree, base: Tree) -> Tree:
        """The inverse of `split_trainable`."""
        if not base:
            return trained
        return unflatten_dict(flatten_dict(base, sep="/") | flatten_dict(trained, sep="/"), sep="/")
