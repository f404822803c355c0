# SPDX-License-Identifier: Apache-2.0
"""Run by test_attention.py in a process with 8 simulated devices: {case: errors} as JSON on the last line.

An error is the largest difference to one device, relative to the largest value: of the result, then of the gradients.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from maxkit import mesh as meshes
from maxkit import ops
from maxkit.ops.attention import _as_split
from maxkit.ops.attention_splash import splash_attention

# name: (mesh, query heads, kv heads)
CASES = {
    "rows": ("fsdp:8", 2, 2),
    "rows and heads": ("fsdp:4,tensor:2", 4, 2),
    "kv heads that the mesh does not divide": ("data:2,fsdp:2,tensor:2", 4, 1),
    "heads that it does not divide either": ("fsdp:4,tensor:2", 3, 1),
}


def errors(description, heads, kv_heads):
    draw = np.random.default_rng(0)
    shapes = [(8, 128, n, 8) for n in (heads, kv_heads, kv_heads, heads)]
    query, key, value, weights = (draw.normal(size=shape).astype(np.float32) for shape in shapes)
    sinks = draw.normal(size=heads).astype(np.float32)
    segments = np.sort(draw.integers(1, 4, (8, 128)), axis=1).astype(np.int32)
    starts = np.stack([np.searchsorted(row, row) for row in segments])
    positions = (np.arange(128) - starts).astype(np.int32)

    def total(query, key, value, sinks, weights, positions, segments):
        row = ops.Visibility(positions, query_segments=segments)
        key, value = _as_split(query, key, value)
        out = splash_attention(
            query, key, value, row, scale=0.4, span=ops.Span(50), soft_cap=5.0, sinks=sinks, interpret=True
        )
        return (out * weights).sum(), out

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))
    arrays = (query, key, value, sinks, weights, positions, segments)
    (_, want), want_gradients = run(*arrays)
    with jax.set_mesh(meshes.make_mesh(description)):
        letters = ("BTNH", "BTKH", "BTKH", "S", "BTNH", "BT", "BT")
        placed = [meshes.constrain(jnp.asarray(x), spec) for x, spec in zip(arrays, letters, strict=True)]
        (_, found), gradients = run(*placed)
    pairs = zip((found, *gradients), (want, *want_gradients), strict=True)
    return [float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()) for a, b in pairs]


print(json.dumps({name: errors(*case) for name, case in CASES.items()}))
