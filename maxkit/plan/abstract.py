# SPDX-License-Identifier: Apache-2.0
"""The arguments of a training step as shapes with shardings: no weights are read, no array is made."""

import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from maxkit import build
from maxkit import mesh as meshes
from maxkit.config import Distill, RecipeConfig
from maxkit.formats import presets
from maxkit.formats.huggingface import read_config
from maxkit.models.config import ModelConfig
from maxkit.models.definition import ModelDefinition
from maxkit.types import TrainState, Tree


def blueprint(cfg: RecipeConfig) -> build.Blueprint:
    """What `run` builds of this config; models may here be presets or folders with a config.json and no weights.

    Raises:
        UserError: as `build.blueprint`.
    """
    teacher = _described(cfg.teacher) if isinstance(cfg, Distill) else None
    return build.blueprint(cfg, config=_described(cfg.model), teacher_config=teacher)


def _described(model: str) -> ModelConfig | None:
    """The architecture of a model that has no weights here; None where its source says what it is."""
    if presets.is_preset(model):
        return presets.preset_config(model)
    folder = Path(model).expanduser()
    described = folder / "config.json"
    if model and described.is_file() and not any(folder.glob("*.safetensors*")):
        return read_config(described)
    return None


def abstract_state(made: build.Blueprint, mesh: Mesh) -> TrainState:
    """The training state as shapes with shardings; to be called under `jax.set_mesh(mesh)`."""
    trained, base = made.definition.split_trainable(_abstract_params(made.definition, mesh))
    whole = meshes.replicated(mesh)

    def placed(leaf: Any) -> Any:
        # Explicit axes give the moments their weights' sharding; scalars have none.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_on(leaf.sharding, mesh) or whole)

    opt_state = jax.tree.map(placed, jax.eval_shape(made.optimizer.init, trained))
    step, rng = placed(jax.ShapeDtypeStruct((), "int32")), placed(jax.eval_shape(lambda: jax.random.key(0)))
    return TrainState(step, trained, base, opt_state, rng)


def abstract_teacher(made: build.Blueprint, mesh: Mesh) -> Tree | None:
    """The parameters of a teacher that runs in every update, as shapes with shardings: the step's `frozen`."""
    teacher = getattr(made.objective, "teacher", None)
    return None if teacher is None else _abstract_params(teacher, mesh)


def _abstract_params(definition: ModelDefinition, mesh: Mesh) -> Tree:
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        definition.shapes,
        definition.shardings(mesh),
    )


def device_bytes(tree: Tree) -> int:
    """What one device holds of a tree of placed shapes."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    return total


def _on(sharding: jax.sharding.Sharding | None, mesh: Mesh) -> jax.sharding.NamedSharding | None:
    """A sharding on an abstract mesh as one on the devices."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return jax.sharding.NamedSharding(mesh, sharding.spec)
