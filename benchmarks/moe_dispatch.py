# SPDX-License-Identifier: Apache-2.0
"""Time of one MoE layer, forward and backward, by dispatch: `python benchmarks/moe_dispatch.py`.

Prints a line of JSON per shape: milliseconds (median of the repeats) and the ratio to dispatch=dense. `groups` and
`blocks` are the two ways to compute dispatch=ragged.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp

from maxkit.ops import moe

SHAPES = {  # (tokens, D, F, experts, choices)
    "Mixtral-like": (1024, 256, 896, 8, 2),
    "Qwen3-MoE-like": (1024, 256, 96, 64, 8),
    "decoding": (8, 256, 96, 64, 8),
}
REPEATS = 7


def milliseconds(shape: tuple[int, ...], dispatch: str) -> float:
    """Median time of values and gradients of a layer."""
    tokens, dim, width, num, choices = shape
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (1, tokens, dim))
    scores = jax.random.normal(keys[1], (1, tokens, num))
    choice, weights = moe.choose_experts(scores, choices), jnp.ones((1, tokens, choices)) / choices
    parameters = {
        name: jax.random.normal(key, (num, *((dim, width) if name != "down" else (width, dim)))) * dim**-0.5
        for name, key in zip(("gate", "up", "down"), keys[2:], strict=True)
    }
    capacity = moe.expert_capacity(tokens, choices, num, 1.25)

    def loss(x, parameters):
        y = moe.run_experts(
            x,
            choice,
            weights,
            parameters,
            lambda gate, up: jax.nn.silu(gate) * up,
            dispatch="ragged" if dispatch in ("groups", "blocks") else dispatch,
            grouping=dispatch if dispatch in ("groups", "blocks") else "blocks",
            capacity=capacity,
        )
        return jnp.sum(y * y)

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    jax.block_until_ready(step(x, parameters))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(step(x, parameters))
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    for name, shape in SHAPES.items():
        found = {dispatch: milliseconds(shape, dispatch) for dispatch in ("dense", "groups", "blocks", "capacity")}
        ratios = {dispatch: round(value / found["dense"], 2) for dispatch, value in found.items()}
        line = {"shape": name, "sizes": dict(zip(("tokens", "D", "F", "E", "k"), shape, strict=True))}
        print(json.dumps(line | {"ms": {k: round(v, 1) for k, v in found.items()}, "of_dense": ratios}))
