# SPDX-License-Identifier: Apache-2.0
"""A recipe's config as what its training step is made of: model, objective, optimizer, abstract state.

Only shapes: no weights are read and no device array is made.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from maxkit import mesh as meshes
from maxkit.checkpoint.load import open_source, resolve_scan_layers
from maxkit.config import Pretrain, RecipeConfig, Sft
from maxkit.errors import UserError
from maxkit.formats.huggingface import read_config
from maxkit.models.config import Execution, ModelConfig
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig
from maxkit.objectives import NextToken
from maxkit.optim.optimizers import make_optimizer
from maxkit.train.step import Objective
from maxkit.types import Batch, TrainState, Tree


class Parts(NamedTuple):
    """What `train.step` is called with."""

    definition: ModelDefinition
    objective: Objective
    optimizer: optax.GradientTransformation


def model_config(cfg: RecipeConfig) -> ModelConfig:
    """The architecture that a recipe trains; a folder with only a config.json will do as `model`.

    Raises:
        UserError: no such model, or rows longer than it allows.
    """
    if cfg.model:
        described = Path(cfg.model).expanduser() / "config.json"
        found = read_config(described) if described.is_file() else open_source(cfg.model).config
    else:
        assert isinstance(cfg, Pretrain)
        found = ModelConfig(
            vocab_size=cfg.vocab_size,
            num_layers=cfg.num_layers,
            embed_dim=cfg.embed_dim,
            mlp_dim=cfg.mlp_dim,
            num_heads=cfg.num_heads,
            num_kv_heads=cfg.num_kv_heads,
            head_dim=cfg.embed_dim // cfg.num_heads,
            max_seq_len=cfg.seq_len,
        )
    if cfg.seq_len > found.max_seq_len:
        raise UserError(f"seq_len={cfg.seq_len} is more than the model's max_seq_len={found.max_seq_len}")
    return found


def parts(cfg: RecipeConfig, explicit: dict[str, str]) -> Parts:
    """What the step of this config is made of; `explicit` says where a given `scan_layers` came from.

    Raises:
        UserError: as `model_config`, or an explicit `scan_layers` that is not the stored one.
    """
    stored = None
    weights = cfg.load_parameters_path or cfg.model
    if weights and not (Path(weights).expanduser() / "config.json").is_file():
        stored = getattr(open_source(weights), "scan_layers", None)
    scan, _ = resolve_scan_layers(stored, cfg.scan_layers, explicit.get("scan_layers", "keyword"), weights)
    lora = None
    if isinstance(cfg, Sft) and cfg.lora_rank:
        lora = LoraConfig(rank=cfg.lora_rank, alpha=cfg.lora_alpha)
    execution = Execution(scan_layers=scan, dtype=cfg.dtype, remat_policy=cfg.remat_policy)
    definition = ModelDefinition(model_config(cfg), execution, lora)
    letters, _ = definition.split_trainable(definition.letters)
    return Parts(
        definition, NextToken(num_tiles=cfg.num_vocab_tiling), make_optimizer(cfg, cfg.steps, letters)
    )


def abstract_state(made: Parts, mesh: Mesh) -> TrainState:
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


def abstract_batch(cfg: RecipeConfig, mesh: Mesh) -> Batch:
    """One update's rows as shapes with shardings.

    Raises:
        UserError: the rows of a micro-batch cannot be divided over the mesh.
    """
    ways, rows = meshes.batch_ways(mesh), cfg.batch_size // cfg.gradient_accumulation_steps
    if rows % ways:
        steps = cfg.gradient_accumulation_steps
        raise UserError(
            f"batch_size={cfg.batch_size} in gradient_accumulation_steps={steps} parts is {rows} "
            f"rows at a time, and mesh {meshes.describe(mesh)} divides rows into {ways}: "
            f"make batch_size a multiple of {ways * steps}, or give some devices to tensor"
        )

    def column(dtype: str) -> Any:
        shape = (cfg.batch_size, cfg.seq_len)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(mesh))

    return Batch(
        tokens=column("int32"),
        targets=column("int32"),
        loss_mask=column("float32"),
        segment_ids=column("int32"),
        positions=column("int32"),
    )


def device_bytes(tree: Tree) -> int:
    """What one device holds of a tree of placed shapes."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        size = itemsize
        for dim in leaf.sharding.shard_shape(leaf.shape):
            size *= dim
        total += size
    return total


def _on(sharding: jax.sharding.Sharding | None, mesh: Mesh) -> jax.sharding.NamedSharding | None:
    """A sharding on an abstract mesh as one on the devices."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return jax.sharding.NamedSharding(mesh, sharding.spec)
