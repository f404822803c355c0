# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a few thousand weights with optimizer state, without a training run: values come from numpy."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import tiny, weights

from maxkit.checkpoint.manifest import GroupRecord, RunRecord
from maxkit.checkpoint.store import CheckpointStore
from maxkit.models.config import BlockSpec, Execution, MoeConfig
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig
from maxkit.optim import make_optimizer
from maxkit.optim.config import OptimizerConfig
from maxkit.types import TrainState

LOCAL, GLOBAL, MOE = BlockSpec(sliding_window=4), BlockSpec(), BlockSpec(mlp="moe")
MODELS = {
    "llama": tiny(num_layers=3),
    "gemma": tiny(num_layers=14, pattern=(LOCAL,) * 5 + (GLOBAL,), tie_embeddings=True, norm_placement="both"),
    "deepseek": tiny(
        num_layers=5,
        leading_blocks=(GLOBAL,) * 2,
        pattern=(MOE,),
        moe=MoeConfig(num_experts=4, experts_per_token=2, mlp_dim=8, shared_mlp_dim=8, correction_bias=True),
    ),
    "one layer": tiny(num_layers=1),
    "text": tiny(vocab_size=258),
}
LORA = LoraConfig(rank=2, alpha=6.0, targets=("query", "out", "down"))
POSITION = {"position": 11}


def definition_of(name: str, scan_layers: bool, lora: LoraConfig | None = None) -> ModelDefinition:
    return ModelDefinition(MODELS[name], Execution(scan_layers=scan_layers), lora)


def state_of(definition: ModelDefinition, optimizer: str = "adamw", step: int = 7) -> TrainState:
    """A state in the middle of a run: the statistics are random, equal for one parameter in both layouts."""
    params, base = definition.split_trainable(weights(definition))
    letters, _ = definition.split_trainable(definition.letters)
    rule = make_optimizer(OptimizerConfig(optimizer=optimizer), 100, letters)
    parameters = {p.path: p for p in definition.parameters.values()}

    def value(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        parameter = next((p for end, p in parameters.items() if name.endswith("/" + end)), None)
        if parameter is None:
            return jnp.full(leaf.shape, step, leaf.dtype)
        kind = name.removesuffix("/" + parameter.path)
        rows = [
            np.random.default_rng(zlib.crc32(f"{kind} {parameter.address} {layer}".encode())).random(
                parameter.layer_shape
            )
            for layer in parameter.layers or (None,)
        ]
        return jnp.asarray(np.stack(rows) if parameter.stacked else rows[0], leaf.dtype)

    opt_state = jax.tree_util.tree_map_with_path(value, jax.eval_shape(rule.init, params))
    key = jax.random.wrap_key_data(np.array([3, 5], np.uint32))
    return TrainState(jnp.int32(step), params, base, opt_state, key)


def record_of(definition: ModelDefinition, optimizer: str = "adamw", tokenizer: dict | None = None) -> RunRecord:
    model = definition.config.model_dump(mode="json")
    if definition.lora is not None:
        model["lora"] = definition.lora.model_dump(mode="json")
    return RunRecord(
        scan_layers=definition.execution.scan_layers,
        config={"optimizer": optimizer, "scan_layers": definition.execution.scan_layers},
        explicit={"scan_layers": "papermill"},
        model=model,
        groups=tuple(
            GroupRecord(name=g.name, pattern_length=len(g.pattern), repeats=g.repeats)
            for g in definition.config.layer_groups()
        ),
        optimizer=optimizer,
        data="rows",
        tokenizer=tokenizer or {},
    )


def save_run(
    folder, definition: ModelDefinition, optimizer: str = "adamw", step: int = 7, tokenizer: dict | None = None
) -> TrainState:
    """Write `<folder>/checkpoints/<step>` as a run does; what was written."""
    state = state_of(definition, optimizer, step)
    with CheckpointStore(folder / "checkpoints") as store:
        store.save(step, state, record_of(definition, optimizer, tokenizer), POSITION, {"loss": 1.5})
    return state
