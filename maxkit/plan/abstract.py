# SPDX-License-Identifier: Apache-2.0
"""The state and the batch of a training step as shapes with shardings: no weights are read, no array is made."""

import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from maxkit import build
from maxkit import mesh as meshes
from maxkit.config import RecipeConfig
from maxkit.formats import presets
from maxkit.formats.huggingface import read_config
from maxkit.types import TrainState, Tree


def blueprint(cfg: RecipeConfig) -> build.Blueprint:
    """What `run` builds of this config; a `model` may here be a preset or a folder with a config.json and no weights.

    Raises:
        UserError: as `build.blueprint`.
    """
    if presets.is_preset(cfg.model):
        return build.blueprint(cfg, config=presets.preset_config(cfg.model))
    folder = Path(cfg.model).expanduser()
    described = folder / "config.json"
    if cfg.model and described.is_file() and not any(folder.glob("*.safetensors*")):
        return build.blueprint(cfg, config=read_config(described))
    return build.blueprint(cfg)


def abstract_state(made: build.Blueprint, mesh: Mesh) -> TrainState:
    """The training state as shapes with shardings; to be called under `jax.set_mesh(mesh)`."""
    definition = made.definition
    leaves: Tree = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        definition.shapes,
        definition.shardings(mesh),
    )
    trained, base = definition.split_trainable(leaves)
    whole = meshes.replicated(mesh)

    def placed(leaf: Any) -> Any:
        # Explicit axes give the moments their weights' sharding; scalars have none.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_on(leaf.sharding, mesh) or whole)

    opt_state = jax.tree.map(placed, jax.eval_shape(made.optimizer.init, trained))
    step, rng = placed(jax.ShapeDtypeStruct((), "int32")), placed(jax.eval_shape(lambda: jax.random.key(0)))
    return TrainState(step, trained, base, opt_state, rng)


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
