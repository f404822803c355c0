# SPDX-License-Identifier: Apache-2.0
"""Compile a training step with experts for eight TPU chips, by dispatch: one JSON object on the last line.

Needs libtpu; run by test_moe_tpu.py.
"""

import json
import os
import sys
import types
from pathlib import Path

from maxkit.plan.topology import QUIET_ENVIRONMENT

os.environ.update(QUIET_ENVIRONMENT)
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax  # noqa: E402 - libtpu reads the environment when it is loaded
from moe_layers import config  # noqa: E402

from maxkit import build  # noqa: E402
from maxkit import mesh as meshes  # noqa: E402
from maxkit.models.config import Execution  # noqa: E402
from maxkit.models.definition import ModelDefinition  # noqa: E402
from maxkit.objectives import NextToken  # noqa: E402
from maxkit.optim import OptimizerConfig, make_optimizer  # noqa: E402
from maxkit.plan import hlo, topology  # noqa: E402
from maxkit.plan.abstract import abstract_state  # noqa: E402
from maxkit.train.step import compile_train_step  # noqa: E402


def compiled(dispatch):
    """Grouped products that reach the compiler, and the opcodes of its collectives."""
    moe = {"scoring": "sigmoid", "correction_bias": True, "normalize_weights": True, "expert_bias": True}
    definition = ModelDefinition(config(**moe), Execution(dtype="bfloat16", moe_dispatch=dispatch))
    optimizer = make_optimizer(OptimizerConfig(optimizer="sgd"), 10, definition.letters)
    mesh = meshes.make_mesh("fsdp:2,expert:2,tensor:2", topology.devices("v5e:2x4"))
    with jax.set_mesh(mesh):
        state = abstract_state(types.SimpleNamespace(definition=definition, optimizer=optimizer), mesh)
        batch = build.batch_shapes(types.SimpleNamespace(batch_size=8, seq_len=128), mesh)
        objective = NextToken(num_tiles=1, balance_loss=0.01, router_z_loss=0.001)
        step = compile_train_step(definition, objective, optimizer, 1, 0.001)
        lowered = step.trace(state, batch, None).lower(lowering_platforms=("tpu",))
    found = hlo.collectives(lowered.compile().as_text())
    return {"grouped": lowered.as_text().count("chlo.ragged_dot"), "collectives": sorted({c.opcode for c in found})}


if __name__ == "__main__":
    print(json.dumps({dispatch: compiled(dispatch) for dispatch in ("ragged", "capacity")}))
