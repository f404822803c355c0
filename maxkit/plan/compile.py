# SPDX-License-Identifier: Apache-2.0
"""One compile in a process of its own: a request on stdin, the plan on the last line of stdout.

libtpu must be told to be quiet before JAX is imported, holds its lock until the process ends, and answers
some topologies with abort(): none of that belongs into the process of who asks. Started by `command.py`.
"""

import importlib.metadata
import json
import sys
import time
from typing import Any

import jax
from jax.sharding import Mesh

from maxkit import build
from maxkit import mesh as meshes
from maxkit.config import RecipeConfig, resolve, training
from maxkit.errors import UserError
from maxkit.models.kernels import attention_kernels
from maxkit.plan import hlo, topology
from maxkit.plan.abstract import abstract_state, abstract_teacher, blueprint, device_bytes
from maxkit.plan.report import Memory, Plan
from maxkit.train.metrics import model_flops_per_token, peak_flops_per_device
from maxkit.train.step import compile_train_step


def compile_plan(cfg: RecipeConfig, topology_name: str) -> Plan:
    """Compile the step of `cfg` for a topology.

    Raises:
        UserError: unknown topology or model, a mesh or batch that does not divide.
    """
    devices = topology.devices(topology_name)
    mesh = meshes.make_mesh(cfg.mesh, devices)
    made = blueprint(cfg)
    layout: dict[str, Any] = {p.path: (p.letters, p.shape) for p in made.definition.parameters.values()}
    build.check_mesh(cfg, made.definition, mesh)
    with jax.set_mesh(mesh):
        arguments = abstract_state(made, mesh), build.batch_shapes(cfg, mesh), abstract_teacher(made, mesh)
        kernels = attention_kernels(made.definition.config, made.definition.execution, cfg.seq_len)
        compiled, refusal, seconds = _compile(made, cfg, arguments)
    state, batch, teacher = arguments
    memory = Memory(
        params=device_bytes((state.params, state.base)),
        optimizer=device_bytes(state.opt_state),
        batch=device_bytes(batch),
        teacher=device_bytes(teacher),
        **(_compilers_own(compiled) if compiled else {}),
    )
    required, available = _need(memory, refusal, devices[0])
    found = hlo.collectives(compiled.as_text()) if compiled else ()
    flops, least_seconds = _work(made, cfg, mesh)
    return Plan(
        recipe=cfg.recipe,
        topology=topology_name,
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        mesh=meshes.describe(mesh),
        parameters=cfg.different(),
        scan_layers=made.definition.execution.scan_layers,
        num_params=made.definition.num_params,
        tokens_per_step=cfg.batch_size * cfg.seq_len,
        fits=compiled is not None,
        refusal=refusal.splitlines()[0] if refusal else None,
        required_bytes=required,
        available_bytes=available,
        memory=memory,
        collectives=tuple(found),
        unsharded=tuple(meshes.unsharded(layout, mesh)),
        seconds=seconds,
        versions=_versions(),
        flops_per_step=flops,
        least_seconds_per_step=least_seconds,
        attention=tuple(kernels),
    )


Outcome = tuple[Any, str | None, dict[str, float]]


def _compile(made: build.Blueprint, cfg: RecipeConfig, arguments: tuple[Any, ...]) -> Outcome:
    """The compiled step, or None and the compiler's refusal; and the seconds it took."""
    accumulate = cfg.gradient_accumulation_steps
    rate = cfg.routed_bias_update_rate
    step: Any = compile_train_step(made.definition, made.objective, made.optimizer, accumulate, rate)
    start = time.perf_counter()
    lowered = step.trace(*arguments).lower(lowering_platforms=("tpu",))
    traced = time.perf_counter()
    compiled, refusal = None, None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error)
    return compiled, refusal, {"trace": traced - start, "compile": time.perf_counter() - traced}


def _compilers_own(compiled: Any) -> dict[str, int]:
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "output": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }


def _need(memory: Memory, refusal: str | None, device: jax.Device) -> tuple[int | None, int | None]:
    """(required, available) bytes of HBM per device."""
    if refusal is not None:
        return hlo.out_of_memory(refusal) or (None, None)
    return memory.needed, topology.hbm_bytes(device)


def _work(made: build.Blueprint, cfg: RecipeConfig, mesh: Mesh) -> tuple[float, float | None]:
    """FLOPs of an update and the seconds they take at least; the compiler's count sees a loop's body once."""
    lora, config = made.definition.lora, made.definition.config
    per_token = model_flops_per_token(config, cfg.seq_len, frozen_weights=lora is not None)
    teacher = getattr(made.objective, "teacher", None)
    if teacher is not None:  # forward only: a third
        per_token += model_flops_per_token(teacher.config, cfg.seq_len) / 3
    flops = per_token * cfg.batch_size * cfg.seq_len
    peak = peak_flops_per_device(mesh.devices.flat[0])
    return flops, flops / (peak * mesh.size) if peak else None


def _versions() -> dict[str, str]:
    names = ("maxkit", "jax", "jaxlib", "libtpu")
    return {name: importlib.metadata.version(name) for name in names}


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        given = {name: tuple(pair) for name, pair in request["given"].items()}
        cfg = training(resolve(request["recipe"], environ={}, given=given))
        answer = {"plan": compile_plan(cfg, request["topology"]).to_dict()}
    except UserError as error:
        answer = {"refused": str(error)}
    print("\n" + json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
