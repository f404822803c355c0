# SPDX-License-Identifier: Apache-2.0
"""The decoder: scanned and unrolled, packed and apart, cached and whole, on every kind of mesh: one function."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from tiny_models import TINY, random_batch, tiny, weights

from maxkit import mesh as meshes
from maxkit.checkpoint.load import load
from maxkit.models.config import BlockSpec, Execution
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig

FIXTURES = Path(__file__).parent.parent / "fixtures"
# Two compilations of the same float32 sums: logits of size 3, a few units in the last place.
SAME = dict(rtol=1e-5, atol=1e-5)
GEMMA_LIKE = (BlockSpec(sliding_window=4, rope_theta=100.0), BlockSpec())


def logits_of(config, batch, *, params=None, execution=None, **call):
    definition = ModelDefinition(config, execution or Execution())
    params = weights(definition) if params is None else params
    return forward(definition)(params, batch.tokens, batch.positions, segment_ids=batch.segment_ids, **call)


def forward(definition):
    return jax.jit(lambda params, *a, **k: definition.merge(params)(*a, **k)[0])


# ---------------------------------------------------------------- scanned and unrolled


@pytest.mark.parametrize(
    "config",
    [tiny(num_layers=3), tiny(num_layers=5, pattern=GEMMA_LIKE), tiny(num_layers=1, pattern=GEMMA_LIKE)],
    ids=["plain", "pattern with a remainder", "pattern longer than the model"],
)
def test_scanned_and_unrolled_compute_the_same(config):
    batch = random_batch(config)
    scanned, unrolled = (logits_of(config, batch, execution=Execution(scan_layers=s)) for s in (True, False))
    np.testing.assert_allclose(scanned, unrolled, **SAME)


def test_one_seed_gives_equal_weights_scanned_and_unrolled():
    config = tiny(num_layers=3, pattern=GEMMA_LIKE, attention_bias=True)
    lora = LoraConfig(rank=2)
    scanned, unrolled = (ModelDefinition(config, Execution(scan_layers=s), lora) for s in (True, False))
    by_address = {}
    for path, leaf in unrolled.flat(unrolled.init(3)).items():
        parameter = unrolled.parameters[path]
        by_address[parameter.address, (parameter.layers or (None,))[0]] = leaf
    seen = 0
    for path, leaf in scanned.flat(scanned.init(3)).items():
        parameter = scanned.parameters[path]
        for row, layer in enumerate(parameter.layers or (None,)):
            value = leaf[row] if parameter.stacked else leaf
            np.testing.assert_array_equal(value, by_address[parameter.address, layer])
            seen += 1
    assert seen == len(by_address) and scanned.num_params == unrolled.num_params
    # Layers differ from each other: a stack of copies would pass everything above.
    up, adapter = (by_address[f"layers/mlp/up/{name}", 0] for name in ("kernel", "lora_b"))
    assert not np.array_equal(up, by_address["layers/mlp/up/kernel", 1])
    assert not np.any(adapter) and np.all(by_address["layers/mlp/up/lora_a", 0])


def test_the_remainder_of_a_pattern_keeps_its_layer_numbers_and_kinds():
    config = tiny(num_layers=8, pattern=(BlockSpec(sliding_window=2), BlockSpec(sliding_window=3), BlockSpec()))
    groups = config.layer_groups()
    assert [(g.name, g.repeats, g.first_layer, len(g.pattern)) for g in groups] == [
        ("layers", 2, 0, 3),
        ("last_layers", 1, 6, 2),
    ]
    assert groups[1].layer_numbers(1) == (7,) and groups[1].pattern == config.pattern[:2]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("scan", [True, False])
def test_logits_of_transformers(scan, tie):
    """Logits of size 60 from float32 torch: 1e-4 is a few units in their last place."""
    path = FIXTURES / ("llama_tiny_tied" if tie else "llama_tiny_full")
    golden = np.load(path / "logits.npz")
    loaded = load(path, scan_layers=scan, dtype="float32")
    found = forward(loaded.definition)(loaded.params, jnp.asarray(golden["tokens"], jnp.int32))
    assert np.abs(np.asarray(found) - golden["logits"]).max() < 1e-4


# ---------------------------------------------------------------- packed rows


@pytest.mark.parametrize("pattern", [(BlockSpec(),), GEMMA_LIKE], ids=["plain", "windows"])
def test_a_packed_row_is_its_documents_apart(pattern):
    config = tiny(pattern=pattern, num_layers=2)
    batch, definition = random_batch(config, rows=3, length=20), ModelDefinition(config)
    packed, params = logits_of(config, batch), weights(definition)
    call = forward(definition)
    for row, segments in enumerate(np.asarray(batch.segment_ids)):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            # In a row of its own, in front of padding: one compilation for all lengths.
            alone = np.zeros((1, 20), np.int32)
            alone[0, : len(at)] = np.asarray(batch.tokens)[row, at]
            apart = call(params, jnp.asarray(alone))[0, : len(at)]
            np.testing.assert_allclose(packed[row, at], apart, **SAME)


# ---------------------------------------------------------------- cache


def decode(definition, params, prompts, total):
    """Prefill right-padded prompts, then feed `total` - longest tokens one by one; the logits after each token."""
    longest = max(map(len, prompts))
    rows = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.asarray([len(prompt) for prompt in prompts])
    segments = (np.arange(longest) < lengths[:, None]).astype(np.int32)

    @jax.jit
    def step(params, tokens, positions, cache, segments):
        return definition.merge(params)(tokens, positions, cache, segment_ids=segments)

    cache = definition.merge(params).init_cache(len(prompts), longest + total)
    logits, cache = step(params, rows, np.broadcast_to(np.arange(longest), rows.shape), cache, segments)
    out = [[row[: len(prompt)] for row, prompt in zip(np.asarray(logits), prompts, strict=True)]]
    fed = np.random.default_rng(5).integers(0, 48, (total, len(prompts), 1))
    for number, tokens in enumerate(fed):
        logits, cache = step(params, tokens, lengths[:, None] + number, cache, np.ones_like(tokens))
        out.append([row for row in np.asarray(logits)])
    whole = [np.concatenate([prompt, fed[:, row, 0]]) for row, prompt in enumerate(prompts)]
    return whole, [np.concatenate([step[row] for step in out]) for row in range(len(prompts))]


@pytest.mark.parametrize("scan", [True, False])
def test_decoding_with_a_cache_is_the_full_forward_pass(scan):
    config = tiny(num_layers=3, pattern=GEMMA_LIKE)
    definition = ModelDefinition(config, Execution(scan_layers=scan))
    params = weights(definition)
    draw = np.random.default_rng(4)
    prompts = [draw.integers(0, 48, n) for n in (9, 3, 1)]
    for tokens, logits in zip(*decode(definition, params, prompts, 6), strict=True):
        padded = np.zeros((1, 15), np.int32)
        padded[0, : len(tokens)] = tokens
        full = forward(definition)(params, padded)[0, : len(tokens)]
        np.testing.assert_allclose(logits, full, **SAME)


def test_without_positions_a_cache_counts_on():
    definition = ModelDefinition(TINY)
    params = weights(definition)
    tokens = np.random.default_rng(4).integers(0, 48, (2, 8)).astype(np.int32)
    model = definition.merge(params)
    cache, parts = model.init_cache(2, 8), []
    call = jax.jit(lambda p, t, c: definition.merge(p)(t, None, c))
    for start in (0, 4):
        logits, cache = call(params, tokens[:, start : start + 4], cache)
        parts.append(logits)
    np.testing.assert_array_equal(cache.end_index, [8, 8])
    np.testing.assert_allclose(np.concatenate(parts, 1), forward(definition)(params, tokens), **SAME)


# ---------------------------------------------------------------- as Tunix calls it


def test_the_positional_call_with_a_left_padded_mask():
    """`model(tokens, positions, None, attention_mask)`: Tunix's trainers pad prompts on the left."""
    definition = ModelDefinition(TINY)
    params, call = weights(definition), forward(definition)
    length, pads = 10, (0, 3, 9)
    draw = np.random.default_rng(6)
    rows = draw.integers(0, 48, (3, length)).astype(np.int32)
    real = np.arange(length) >= np.asarray(pads)[:, None]
    counted = np.cumsum(real, axis=-1)
    positions = counted - (counted >= 1)  # as tunix.sft.utils.build_positions_from_mask
    mask = np.tril(np.ones((length, length), bool))[None] & real[:, None, :]  # make_causal_attn_mask
    logits = call(params, rows, positions, None, mask)
    assert np.isfinite(logits).all()
    for row, pad in enumerate(pads):
        shifted = np.zeros((1, length), np.int32)
        shifted[0, : length - pad] = rows[row, pad:]
        alone = call(params, shifted)[0, : length - pad]
        np.testing.assert_allclose(logits[row, pad:], alone, **SAME)


def test_an_attention_mask_only_takes_away():
    """The mask comes on top of causality: allowing everything shows nobody the future."""
    batch = random_batch(TINY)
    everything = jnp.ones((4, 16, 16), bool)
    np.testing.assert_array_equal(logits_of(TINY, batch), logits_of(TINY, batch, attention_mask=everything))


# ---------------------------------------------------------------- meshes and precision


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_one_device_changes_nothing(kind):
    batch = random_batch(TINY)
    want = logits_of(TINY, batch)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(logits_of(TINY, batch), want)
    with jax.set_mesh(meshes.make_mesh("")):
        np.testing.assert_array_equal(logits_of(TINY, batch), want)


@pytest.mark.parametrize("scan", [True, False])
def test_bfloat16_activations_keep_float32_where_it_matters(scan):
    batch = random_batch(TINY)
    low = Execution(dtype="bfloat16", scan_layers=scan)
    definition = ModelDefinition(TINY, low)
    found, exact = logits_of(TINY, batch, execution=low), logits_of(TINY, batch)
    assert found.dtype == jnp.float32
    # 3 significant digits through two layers; logits are of size 3.
    np.testing.assert_allclose(found, exact, atol=0.1)
    assert np.abs(found - exact).max() > 1e-4  # it really was bfloat16
    hidden = jax.eval_shape(lambda p: definition.merge(p).hidden(batch.tokens).x, definition.shapes)
    assert hidden.dtype == jnp.bfloat16
    # A position in the thousands is no bfloat16 number: if angles were, neighbours could not be told apart.
    far = definition.merge(weights(definition))
    call = jax.jit(lambda t, p: far(t, p)[0])
    near = call(batch.tokens, batch.positions)
    np.testing.assert_allclose(call(batch.tokens, batch.positions + 4097), near, atol=0.1)


def test_bfloat16_weights_are_cast_to_the_activations():
    """A model stored in bfloat16 and run in float32 equals the float32 model of the rounded weights."""
    batch = random_batch(TINY)
    low = ModelDefinition(TINY, weight_dtype="bfloat16")
    params = weights(low)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    found = forward(low)(params, batch.tokens)
    np.testing.assert_allclose(found, forward(ModelDefinition(TINY))(wide, batch.tokens), **SAME)


def test_call_is_head_after_hidden():
    batch, definition = random_batch(TINY), ModelDefinition(TINY)
    params = weights(definition)
    apart = jax.jit(lambda p: (m := definition.merge(p)).head(m.hidden(batch.tokens).x))(params)
    np.testing.assert_allclose(apart, forward(definition)(params, batch.tokens), rtol=1e-6, atol=1e-6)


def test_lora_starts_as_the_plain_model():
    batch = random_batch(TINY)
    adapted = ModelDefinition(TINY, lora=LoraConfig(rank=2))
    params = adapted.flat(weights(adapted))
    for path in adapted.parameters:
        if path.endswith("lora_b"):
            params[path] = jnp.zeros_like(params[path])
    found = forward(adapted)(adapted.unflat(params), batch.tokens)
    np.testing.assert_allclose(
        found, forward(ModelDefinition(TINY))(weights(ModelDefinition(TINY)), batch.tokens), **SAME
    )
