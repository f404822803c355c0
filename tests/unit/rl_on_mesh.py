# SPDX-License-Identifier: Apache-2.0
"""Two rollouts and their updates on a mesh, in one of several processes; prints what they came to, as JSON.

python rl_on_mesh.py DEVICES_PER_PROCESS MESH [PROCESS PROCESSES PORT]
"""

import hashlib
import json
import os
import sys
from pathlib import Path

DEVICES, MESH, *PROCESSES = sys.argv[1:]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402

if PROCESSES:
    jax.distributed.initialize(f"localhost:{PROCESSES[2]}", int(PROCESSES[1]), int(PROCESSES[0]))

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from tiny_models import tiny, weights  # noqa: E402

from maxkit import mesh as meshes  # noqa: E402
from maxkit.data.tokenizer import train_bpe  # noqa: E402
from maxkit.models.definition import ModelDefinition  # noqa: E402
from maxkit.objectives.policy import Policy  # noqa: E402
from maxkit.rl.answers import Answerer  # noqa: E402
from maxkit.rl.batches import RolloutBatches  # noqa: E402
from maxkit.rl.config import RlConfig  # noqa: E402
from maxkit.rl.prompts import load_prompts  # noqa: E402
from maxkit.rl.rollout import EngineRollout  # noqa: E402
from maxkit.run.batches import Placer  # noqa: E402
from maxkit.train.step import compile_train_step  # noqa: E402
from maxkit.types import TrainState  # noqa: E402


def judged(completion, num_tokens):
    """Half as much in another process: all must go by what the first one says."""
    return float((len(completion) + num_tokens) % 2) / (1 + jax.process_index())


cfg = RlConfig(
    seq_len=16,
    max_new_tokens=8,
    num_generations=4,
    batch_size=8,
    num_vocab_tiling=1,
    epochs_per_rollout=2,
    beta=0.1,
    dynamic_sampling=True,
    rewards="__main__:judged",
)
mesh = meshes.make_mesh(MESH)
definition, tokenizer = ModelDefinition(tiny(vocab_size=260)), train_bpe(["0123456789+-*="], 260)
with jax.set_mesh(mesh):
    values = jax.tree.map(np.asarray, weights(ModelDefinition(tiny(vocab_size=260))))
    place = jax.jit(lambda x: x, out_shardings=definition.shardings(mesh))
    params, reference = place(values), place(values)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, optax.sgd(0.1).init(params), jnp.zeros(2, jnp.uint32))
    rollout = EngineRollout.of(cfg, definition, [5, 77, 200], mesh)
    prompts = load_prompts("arithmetic", tokenizer, max_prompt_length=8, seed=0).train
    source = RolloutBatches(
        Answerer(cfg, rollout, tokenizer), prompts, definition, Placer(mesh), mesh=mesh, reference=reference
    )
    step = compile_train_step(definition, Policy(**cfg.policy_arguments()), optax.sgd(0.1))
    found, tokens = [], hashlib.sha256()
    for _ in range(4):
        batch, measured = source.next(state)
        tokens.update(np.asarray(jax.jit(lambda x: x, out_shardings=meshes.replicated(mesh))(batch.tokens)).tobytes())
        state, metrics = step(state, batch)
        found.append({name: float(value) for name, value in {**measured, **metrics}.items() if "time" not in name})
print(json.dumps({"tokens": tokens.hexdigest(), "updates": found}))
