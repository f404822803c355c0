# SPDX-License-Identifier: Apache-2.0
"""QLoRA: frozen weights in 8 or 4 bits, the values Qwix gives, stored small, trained beside, saved and continued."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_families import FAMILIES
from tiny_models import random_batch, tiny, weights

import maxkit
from maxkit.checkpoint.contents import TreeContents
from maxkit.checkpoint.convert import convert
from maxkit.checkpoint.load import Loaded
from maxkit.checkpoint.parameters import read_params
from maxkit.errors import UserError
from maxkit.models import quantized
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig
from maxkit.objectives import NextToken
from maxkit.train.step import train_step
from maxkit.types import TrainState

SMALL = tiny(embed_dim=64, mlp_dim=128)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("axis", [-3, -1])
def test_the_values_are_those_of_qwix(kind, axis):
    """To the bit in nf4; in int8 the last bit of a scale can differ, which tips the largest of a tile."""
    qwix = pytest.importorskip("qwix")
    kernel = np.random.default_rng(0).normal(size=(128, 3, 192)).astype(np.float32)
    kernel[0] = 0.0
    values, scales = quantized.quantize(kernel, kind, axis)
    tiles = {axis % 3: 64}
    theirs = qwix.quantize(
        jnp.asarray(kernel), kind, channelwise_axes=[a for a in range(3) if a not in tiles], tiled_axes=tiles
    )
    ours, wanted = quantized.dequantize(values, scales, kind, axis), np.asarray(qwix.dequantize(theirs))
    if kind == "nf4":
        np.testing.assert_array_equal(ours, wanted)
    else:
        steps = np.abs(ours - wanted) / np.repeat(scales, 64, axis)
        assert (steps > 1e-4).mean() < 1 / 128 and steps.max() < 1.001
    assert values.nbytes + scales.nbytes == kernel.size * {"int8": 1, "nf4": 0.5}[kind] + kernel.size * 4 / 64
    with pytest.raises(UserError, match="have no divisor of 16 to 64"):
        quantized.check(67, kind, "layers/attention/query")


def quantized_params(definition, params, plain):
    """`params` of the model `plain` as `definition` stores them, and fresh adapters."""
    source = TreeContents(plain.config, plain.flat(params), scan_layers=plain.execution.scan_layers)
    return read_params(source, definition, None, report=[])


def logits(definition, params):
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) % 48
    return np.asarray(jax.jit(lambda params: definition.merge(params)(tokens)[0])(params))


@pytest.mark.parametrize("name", ["deepseek", "qwen3_next"])
def test_every_matrix_is_stored_small_and_means_the_rounded_weights(name):
    """Scanned (= unrolled) = the plain model with the rounded weights, 1e-5 of the spread (sums in another order)."""
    config, lora = FAMILIES[name], LoraConfig(rank=2, base_weight_dtype="nf4")
    found = []
    for scan in (True, False)[: 2 if name == "deepseek" else 1]:
        plain = ModelDefinition(config, Execution(scan_layers=scan))
        definition = ModelDefinition(config, Execution(scan_layers=scan), lora)
        params = quantized_params(definition, weights(plain), plain)
        kernels = [p for p in definition.parameters.values() if p.path.endswith(quantized.VALUES)]
        assert {p.dtype for p in kernels} == {jnp.dtype(jnp.uint8)} and len(kernels) == len(definition.matrices)
        assert not any(f"{path}/kernel" in definition.parameters for path in definition.matrices)
        loaded = Loaded(definition, params, None, (), "made here")
        assert definition.num_params == ModelDefinition(config, lora=LoraConfig(rank=2)).num_params
        found.append(logits(loaded.definition, loaded.params))
        if scan:
            merged = loaded.merged()
            found.append(logits(merged.definition, merged.params))
    for other in found[1:]:
        assert np.abs(other - found[0]).max() < 1e-5 * np.ptp(found[0])
    exact = logits(plain, weights(plain))
    assert 1e-3 < np.abs(exact - found[0]).max() / np.ptp(exact)


def losses(kind, steps=12):
    """Losses of a run on one batch, the bytes of its frozen and its trained weights."""
    plain = ModelDefinition(SMALL, Execution(remat_policy="none"))
    lora = LoraConfig(rank=4, base_weight_dtype=kind)
    definition, optimizer = ModelDefinition(SMALL, lora=lora), optax.adam(1e-2)
    params = plain.unflat({k: v * 0.3 for k, v in plain.flat(weights(plain)).items()})
    params, base = definition.split_trainable(quantized_params(definition, params, plain))
    state = TrainState(jnp.int32(0), params, base, optimizer.init(params), jax.random.key(0))
    step, found = jax.jit(train_step(definition, NextToken(num_tiles=1), optimizer)), []
    for _ in range(steps):
        state, metrics = step(state, random_batch(SMALL))
        found.append(float(metrics["loss"]))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    kernels = [
        leaf for path, leaf in definition.flat(state.base).items() if path.rpartition("/")[2].startswith("kernel")
    ]
    return np.array(found), sum(leaf.nbytes for leaf in kernels if leaf.ndim > 2)


def test_training_beside_small_weights_is_close_to_training_beside_whole_ones():
    """Loss after 12 updates; bytes of the frozen matrices: 4, 1.06 and 0.56 a weight."""
    whole, size = losses("")
    assert whole[-1] < whole[0] - 0.5
    for kind, ratio, near in (("int8", 4 / (1 + 4 / 64), 0.02), ("nf4", 4 / (0.5 + 4 / 64), 0.2)):
        found, small = losses(kind)
        assert size / small == pytest.approx(ratio, rel=1e-6)
        assert np.abs(found - whole).max() < near


def test_a_checkpoint_of_it_loads_converts_and_exports(tmp_path):
    """Bit for bit, in both layouts; merged and exported it is the model with the rounded weights."""
    definition = ModelDefinition(SMALL, lora=LoraConfig(rank=2, base_weight_dtype="nf4", targets=("query",)))
    plain = ModelDefinition(SMALL)
    params = quantized_params(definition, weights(plain), plain)
    loaded = Loaded(definition, params, None, (), "made here")
    maxkit.save(loaded, tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two", to="maxkit", scan_layers=False)
    convert(tmp_path / "two", tmp_path / "three", to="maxkit", scan_layers=True)
    again = maxkit.load(tmp_path / "three")
    assert again.definition.lora == definition.lora
    for path, value in definition.flat(params).items():
        found = again.definition.flat(again.params)[path]
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)
    convert(tmp_path / "one", tmp_path / "hf", to="hf")
    exported, merged = maxkit.load(tmp_path / "hf"), loaded.merged()
    for path, value in merged.definition.flat(merged.params).items():
        np.testing.assert_array_equal(exported.definition.flat(exported.params)[path], value)
