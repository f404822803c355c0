# SPDX-License-Identifier: Apache-2.0
"""Run by test_family_sharding.py in a process with 8 simulated devices: one JSON object on the last line."""

import json

import jax
import numpy as np
from tiny_families import FAMILIES
from tiny_models import random_batch, weights

from maxkit import mesh as meshes
from maxkit.infer import Engine
from maxkit.models.definition import ModelDefinition
from maxkit.objectives import NextToken

DENSE, EXPERTS = "fsdp:4,tensor:2", "fsdp:2,expert:2,tensor:2"
OBJECTIVE = NextToken(num_tiles=2, z_loss=1e-3)


def gradients(config, mesh):
    """Loss, gradients on the host, and which of them are laid out otherwise than their weights."""
    definition = ModelDefinition(config)
    with jax.set_mesh(mesh):
        params = jax.device_put(weights(definition), definition.shardings(mesh))
        batch = jax.device_put(random_batch(config, rows=8), meshes.batch_sharding(mesh))

        @jax.jit
        def run(params, batch):
            def loss(params):
                return OBJECTIVE(definition.merge(params), batch, None, OBJECTIVE.weights(batch)).loss

            return jax.value_and_grad(loss)(params)

        loss, found = run(params, batch)
    found = definition.flat(found)
    wanted = {path: p.sharding for path, p in definition.flat(params).items()}
    wrong = [path for path, g in found.items() if not g.sharding.is_equivalent_to(wanted[path], g.ndim)]
    return float(loss), {path: np.asarray(g) for path, g in found.items()}, wrong


def decoded(config, mesh):
    """Logits of a prefill and two single tokens with a cache."""
    definition, tokens = ModelDefinition(config), np.asarray(random_batch(config, rows=8, length=8).tokens)
    with jax.set_mesh(mesh):
        params = jax.device_put(weights(definition), definition.shardings(mesh))

        @jax.jit
        def run(params, tokens):
            model = definition.merge(params)
            first, cache = model(tokens[:, :6], None, model.init_cache(8, 8))
            outs = [first]
            for at in (6, 7):
                logits, cache = model(tokens[:, at : at + 1], None, cache)
                outs.append(logits)
            return outs

        outs = run(params, jax.device_put(tokens, meshes.batch_sharding(mesh)))
    return np.concatenate([np.asarray(x) for x in outs], axis=1)


def generated(config, mesh):
    """Greedy tokens of a batch, and of the first prompt in a slot of its own."""
    definition = ModelDefinition(config)
    params = jax.device_put(weights(definition), definition.shardings(mesh))
    engine = Engine(definition, params, batch_size=8, cache_size=16, mesh=mesh)
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    state = engine.insert(engine.prefill(prompts[:1], max_new_tokens=5), engine.init_state(), [2])
    slot = [int(np.asarray(state.tokens)[2])]
    for _ in range(4):
        state, step = engine.generate(state)
        slot.append(int(np.asarray(step.tokens)[2]))
    return engine.generate_batch(prompts, max_new_tokens=5).tokens, slot


def main():
    out = {"generated": {}}
    one = meshes.make_mesh("", jax.devices()[:1])
    for name in ("deepseek", "qwen3_next"):  # their caches are not keys and values
        out["generated"][name] = [generated(FAMILIES[name], mesh) for mesh in (one, meshes.make_mesh(EXPERTS))]
    for name, config in FAMILIES.items():
        loss, wanted, _ = gradients(config, one)
        logits = decoded(config, one)
        largest = max(float(np.abs(g).max()) for g in wanted.values())
        for description in (DENSE, EXPERTS) if name == "deepseek" else (EXPERTS,) if config.moe else (DENSE,):
            mesh = meshes.make_mesh(description)
            found_loss, found, wrong = gradients(config, mesh)
            out[f"{name} {description}"] = {
                "loss": [found_loss, loss],
                "gradients": max(
                    # Some gradients are zero but for rounding (a key's bias without RoPE), hence the second part.
                    float(np.abs(found[path] - wanted[path]).max() / (np.abs(wanted[path]).max() + 1e-3 * largest))
                    for path in wanted
                ),
                "decode": float(np.abs(decoded(config, mesh) - logits).max() / logits.std()),
                "wrong": wrong,
            }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
