# SPDX-License-Identifier: Apache-2.0
"""Run by test_objectives.py in a process with 8 simulated devices: one update of each objective, into a .npz file."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from objective_cases import OBJECTIVES, STUDENT, TEACHER, case
from tiny_models import weights

from maxkit import mesh as meshes
from maxkit.train.step import train_step
from maxkit.types import TrainState


def main(path):
    mesh, found = meshes.make_mesh("fsdp:4,tensor:2"), {}
    for name in OBJECTIVES:
        objective, batch, frozen = case(name)
        with jax.set_mesh(mesh):
            params = jax.device_put(weights(STUDENT), STUDENT.shardings(mesh))
            frozen = None if frozen is None else jax.device_put(frozen, TEACHER.shardings(mesh))
            batch = jax.tree.map(lambda x: jax.device_put(x, meshes.batch_sharding(mesh, x.ndim)), batch)
            number, key = jax.device_put((jnp.int32(0), jax.random.key(0)), meshes.replicated(mesh))
            optimizer = optax.sgd(1.0)
            state = TrainState(number, params, {}, optimizer.init(params), key)
            new, metrics = jax.jit(train_step(STUDENT, objective, optimizer))(state, batch, frozen)
        for leaf, value in STUDENT.flat(jax.tree.map(lambda after, before: after - before, new.params, params)).items():
            assert value.sharding == STUDENT.flat(STUDENT.shardings(mesh))[leaf], (name, leaf, value.sharding)
            found[f"{name}|update|{leaf}"] = np.asarray(value)
        for metric, value in metrics.items():
            found[f"{name}|metric|{metric}"] = np.asarray(value)
    np.savez(path, **found)


if __name__ == "__main__":
    main(sys.argv[1])
