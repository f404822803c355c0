# SPDX-License-Identifier: Apache-2.0
"""Writes the TPU programs that test_plan.py counts collectives in.

    .venv-tpu/bin/python tests/unit/make_hlo_snippets.py

Two toys compiled by libtpu for v5e:2x2, cut down to what says who calls whom and what is communicated.
"""

import os
import re
from pathlib import Path

from maxkit.plan.topology import QUIET_ENVIRONMENT, devices

os.environ.update(QUIET_ENVIRONMENT)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from maxkit.mesh import make_mesh  # noqa: E402

FOLDER = Path(__file__).parents[1] / "fixtures" / "hlo"
LAYERS, WIDTH = 6, 1024


def main() -> None:
    mesh = make_mesh("", devices("v5e:2x2"))
    with jax.set_mesh(mesh):
        weights = jax.ShapeDtypeStruct(
            (LAYERS, WIDTH, WIDTH), jnp.float32, sharding=jax.NamedSharding(mesh, P(None, "fsdp", None))
        )
        rows = jax.ShapeDtypeStruct((512, WIDTH), jnp.float32, sharding=jax.NamedSharding(mesh, P("fsdp", None)))
        write("scan", jax.jit(jax.grad(loss)), weights, rows)
        write("exchange", jax.jit(exchange), rows)


def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(jnp.einsum("bd,de->be", x, w, out_sharding=P("fsdp", None))), None

    return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)


def exchange(x: jax.Array) -> jax.Array:
    """Columns instead of rows, then the neighbour's."""
    x = jax.sharding.reshard(x, P(None, "fsdp"))
    size = jax.sharding.get_abstract_mesh().shape["fsdp"]
    shift = [(i, (i + 1) % size) for i in range(size)]
    move = lambda y: jax.lax.ppermute(y, "fsdp", shift)  # noqa: E731
    return jax.shard_map(move, in_specs=P(None, "fsdp"), out_specs=P(None, "fsdp"))(x)


def write(name: str, function, *arguments) -> None:
    text = function.trace(*arguments).lower(lowering_platforms=("tpu",)).compile().as_text()
    text = re.sub(r", (metadata|backend_config|frontend_attributes)=\{.*$", "", text, flags=re.MULTILINE)
    kept = re.compile(r"^\S|all-|permute|scatter|gather| while\(|calls=|constant\(|compare\(|async|^\s*$", re.MULTILINE)
    lines = [line for line in text.splitlines() if kept.search(line)]
    start = next(i for i, line in enumerate(lines) if line.startswith("%"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.txt").write_text("\n".join(lines[start:]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
