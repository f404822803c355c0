# SPDX-License-Identifier: Apache-2.0
"""Models of a few thousand weights, with values from numpy: drawing them with JAX would compile for seconds."""

import zlib

import jax.numpy as jnp
import numpy as np

from maxkit.models.config import ModelConfig
from maxkit.models.definition import ModelDefinition
from maxkit.types import Batch, Tree

TINY = ModelConfig(
    vocab_size=48, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=4, max_seq_len=64
)


def tiny(**changes) -> ModelConfig:
    """TINY with other sizes."""
    return ModelConfig.model_validate(TINY.model_dump() | changes)


def weights(definition: ModelDefinition, seed: int = 0) -> Tree:
    """Random weights for every parameter (norms and LoRA's B too), the same scanned and unrolled."""

    def layer(parameter, number):
        name = zlib.crc32(f"{parameter.address} {number}".encode())
        draw = np.random.default_rng([seed, name])
        shape = parameter.layer_shape
        if parameter.path.endswith("/kernel_q"):  # of a quantised kernel
            return draw.integers(0, 256, shape).astype(np.uint8).view(np.dtype(parameter.dtype))
        if parameter.path.endswith("/kernel_scale"):
            return 0.3 + 0.1 * draw.random(shape)
        if len(shape) < 2:
            return 1 + 0.1 * draw.normal(size=shape)
        return draw.normal(size=shape) * (0.3 if parameter.layers is None else 0.2)

    def value(parameter):
        numbers = parameter.layers or (None,)
        layers = [layer(parameter, number) for number in numbers]
        return jnp.asarray(np.stack(layers) if parameter.stacked else layers[0], parameter.dtype)

    return definition.tree(value)


def random_batch(config: ModelConfig, rows: int = 4, length: int = 16, seed: int = 0) -> Batch:
    """Random tokens in one to three segments a row, some padding, and very different numbers of trained tokens."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, config.vocab_size, (rows, length))
    segments, positions = np.zeros((rows, length), int), np.zeros((rows, length), int)
    mask = np.zeros((rows, length))
    for row in range(rows):
        cuts = sorted(draw.choice(np.arange(2, length), size=row % 3 + 1, replace=False))
        for number, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True), start=1):
            segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)
            mask[row, start : end - 1] = draw.random(end - 1 - start) < (row + 0.1) / (rows - 1)
    mask[:, 0] = 1
    targets = np.where(segments > 0, np.roll(tokens, -1, axis=1), 0)
    columns = (tokens, targets, segments, positions)
    tokens, targets, segments, positions = (jnp.asarray(x, jnp.int32) for x in columns)
    return Batch(tokens, targets, jnp.asarray(mask, jnp.float32), segments, positions)
