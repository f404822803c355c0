# SPDX-License-Identifier: Apache-2.0
"""Run by test_sharding.py in a process with 8 simulated devices: all cases, one JSON object on the last line.

One process for all of them, so that JAX starts once. The file says what is run; what must come out is said there.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_models import TINY, random_batch, tiny, weights

from maxkit import mesh as meshes
from maxkit import ops
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig
from maxkit.objectives import NextToken
from maxkit.train.step import compile_train_step
from maxkit.types import TrainState

STEPS = 4
# SmolLM2's heads in small: 9 query and 3 kv heads, which neither 2 nor 4 divides.
SMOLLM2 = tiny(num_heads=9, num_kv_heads=3, embed_dim=40, tie_embeddings=True)
MQA = tiny(num_kv_heads=1, attention_bias=True, mlp_bias=True)
OBJECTIVE = NextToken(num_tiles=3, z_loss=1e-3)
UNROLLED = Execution(scan_layers=False)
LORA = LoraConfig(rank=2, dropout=0.1)
QLORA = LoraConfig(rank=2, base_weight_dtype="nf4")

# name: (config, mesh, accumulation, LoRA, execution)
RUNS = {
    "even/1": (TINY, "", 1, None, Execution()),
    "even/fsdp:8": (TINY, "fsdp:8", 1, None, Execution()),
    "even/fsdp:4,tensor:2": (TINY, "fsdp:4,tensor:2", 1, None, Execution()),
    "even/data:2,fsdp:2,tensor:2": (TINY, "data:2,fsdp:2,tensor:2", 1, None, Execution()),
    "even/fsdp:2,tensor:4": (TINY, "fsdp:2,tensor:4", 1, None, Execution()),
    "even/fsdp:4,tensor:2 in two parts": (TINY, "fsdp:4,tensor:2", 2, None, Execution()),
    "even/fsdp:4,tensor:2 unrolled": (TINY, "fsdp:4,tensor:2", 1, None, UNROLLED),
    "smollm2/1": (SMOLLM2, "", 1, None, Execution()),
    "smollm2/fsdp:4,tensor:2": (SMOLLM2, "fsdp:4,tensor:2", 1, None, Execution()),
    "smollm2/fsdp:2,tensor:4": (SMOLLM2, "fsdp:2,tensor:4", 1, None, Execution(remat_policy="full")),
    "mqa/1": (MQA, "", 1, None, Execution()),
    "mqa/fsdp:2,tensor:4": (MQA, "fsdp:2,tensor:4", 1, None, Execution()),
    "lora/1": (TINY, "", 1, LORA, Execution()),
    "lora/fsdp:4,tensor:2": (TINY, "fsdp:4,tensor:2", 2, LORA, Execution()),
    "qlora/1": (TINY, "", 1, QLORA, Execution()),
    "qlora/fsdp:4,tensor:2": (TINY, "fsdp:4,tensor:2", 2, QLORA, Execution()),
}


COMPILED: list[str] = []


def note(event: str, seconds: float, **_: object) -> None:
    """Note every program that the compiler finishes."""
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


def mesh_of(description):
    return meshes.make_mesh(description) if description else meshes.make_mesh("", jax.devices()[:1])


def on_mesh(definition, mesh):
    return jax.device_put(weights(definition), definition.shardings(mesh))


def losses(config, description, accumulation, lora, execution):
    """The losses of STEPS updates of AdamW, and the specs of what came out."""
    mesh, definition = mesh_of(description), ModelDefinition(config, execution, lora)
    optimizer = optax.adamw(3e-3)
    with jax.set_mesh(mesh):
        trained, base = definition.split_trainable(on_mesh(definition, mesh))
        step, key = jax.device_put((jnp.int32(0), jax.random.key(0)), meshes.replicated(mesh))
        state = TrainState(step, trained, base, jax.jit(optimizer.init)(trained), key)
        step = compile_train_step(definition, OBJECTIVE, optimizer, accumulation)
        values, compilations = [], []
        for number in range(STEPS):
            before = len(COMPILED)
            batch = jax.device_put(random_batch(config, rows=8, seed=number % 2), meshes.batch_sharding(mesh))
            state, metrics = step(state, batch, None)
            values.append(float(metrics["loss"]))
            compilations.append(len(COMPILED) - before)
    specs = definition.flat(jax.tree.map(lambda x: str(x.sharding.spec), state.params))
    moments = definition.flat(jax.tree.map(lambda x: str(x.sharding.spec), state.opt_state[0].mu))
    return {
        "losses": values,
        "compiled_after_the_first": sum(compilations[1:]),
        "wrong": [
            path for path in specs if not specs[path] == moments[path] == spec_of(definition.parameters[path], mesh)
        ],
    }


def spec_of(parameter, mesh):
    return str(meshes.weight_spec(parameter.letters, parameter.shape, mesh))


def gradient_specs(config, description, num_tiles):
    """The parameters whose gradient is laid out otherwise than they are, read off the types without compiling."""
    mesh, definition = mesh_of(description), ModelDefinition(config)
    objective = NextToken(num_tiles=num_tiles, z_loss=1e-3)
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            definition.shapes,
            definition.shardings(mesh),
        )
        batch = jax.device_put(random_batch(config, rows=8), meshes.batch_sharding(mesh))

        def loss(params):
            return objective(definition.merge(params), batch, None, objective.weights(batch)).loss

        gradients = definition.flat(jax.eval_shape(jax.grad(loss), params))
    found = {path: str(leaf.sharding.spec) for path, leaf in gradients.items()}
    return [path for path, p in definition.parameters.items() if found[path] != spec_of(p, mesh)]


def attention_spec(heads, kv_heads, description):
    """The layout of the result of attention, read off its type."""
    with jax.set_mesh(mesh_of(description)):
        query = meshes.zeros((8, 4, heads, 4), jnp.float32, "BTNH")
        key = meshes.zeros((8, 4, kv_heads, 4), jnp.float32, "BSKH")
        mask = meshes.constrain(jnp.ones((8, 4, 4), bool), "BTS")
        call = lambda q, k: ops.reference_attention(q, k, k, mask, scale=1.0)  # noqa: E731
        return str(jax.eval_shape(call, query, key).sharding.spec)


def decode(description):
    """Largest difference between cached decoding on a mesh and the full pass on one device."""
    definition, tokens = ModelDefinition(TINY), np.asarray(random_batch(TINY, rows=4, length=6).tokens)
    full = jax.jit(lambda p: definition.merge(p)(tokens)[0])(weights(definition))
    mesh = mesh_of(description)
    with jax.set_mesh(mesh):
        params = on_mesh(definition, mesh)

        @jax.jit
        def run(params, tokens):
            model = definition.merge(params)
            first, cache = model(tokens[:, :4], None, model.init_cache(4, 6))
            outs = [first]
            for at in (4, 5):
                logits, cache = model(tokens[:, at : at + 1], None, cache)
                outs.append(logits)
            return outs

        outs = run(params, jax.device_put(tokens, meshes.batch_sharding(mesh)))
    return float(np.abs(np.concatenate([np.asarray(x) for x in outs], axis=1) - full).max())


def main():
    jax.monitoring.register_event_duration_secs_listener(note)
    out = {"runs": {name: losses(*case) for name, case in RUNS.items()}}
    out["gradients"] = {
        f"{name} {mesh} tiles {tiles}": gradient_specs(config, mesh, tiles)
        for name, config in (("even", TINY), ("smollm2", SMOLLM2), ("mqa", MQA))
        for mesh in ("fsdp:8", "fsdp:4,tensor:2", "data:2,fsdp:2,tensor:2", "fsdp:2,tensor:4")
        for tiles in (1, 3)
    }
    out["attention"] = {
        f"{heads}/{kv} {mesh}": attention_spec(heads, kv, mesh)
        for heads, kv in ((4, 2), (4, 1), (9, 3))
        for mesh in ("fsdp:4,tensor:2", "fsdp:2,tensor:4")
    }
    out["decode"] = {mesh: decode(mesh) for mesh in ("fsdp:4,tensor:2", "fsdp:2,tensor:4")}
    out["compiled"] = len(COMPILED)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
