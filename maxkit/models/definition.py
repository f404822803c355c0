# SPDX-License-Identifier: Apache-2.0
"""A model without its values: structure, shapes, letters, addresses; and how values are made, placed and merged in.

Everything that handles weights (training, checkpoints, conversion, planning) works on the pure nested dict of arrays
and on this description of it. The NNX module exists only inside a traced function or when a user asks for it.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from maxkit import mesh as meshes
from maxkit.models.config import Execution, ModelConfig
from maxkit.models.decoder import Decoder
from maxkit.models.layers import Make
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
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer's tensor."""
        return self.shape[1:] if self.stacked else self.shape


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

    def _construct(self, seed: int | jax.Array) -> Decoder:
        # Threefry by name: values of one seed must not depend on a process-wide generator setting.
        key = jax.random.key(seed, impl="threefry2x32")
        return Decoder(self.config, self.execution, Make(key, self.weight_dtype, self.lora))

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
        """Number of scalars, adapters included."""
        return sum(functools.reduce(lambda a, b: a * b, p.shape, 1) for p in self.parameters.values())

    def init(self, seed: int, mesh: Mesh | None = None) -> Tree:
        """Initial values of a seed, made on the mesh in their final layout."""
        make = lambda: nnx.to_pure_dict(nnx.state(self._construct(seed)))  # noqa: E731
        if mesh is None:
            return jax.jit(make)()
        # Sharding-in-types would be decided while drawing; values are drawn whole-program and laid out at the end.
        return jax.jit(make, out_shardings=self.shardings(mesh))()

    def merge(self, params: Tree) -> Decoder:
        """The model holding `params`; cheap while tracing."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graphdef, state)

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
