# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule against a recurrence in float64, and the mixer in pieces, packed, padded, scanned, sharded.

Values on 8 devices are those of test_family_sharding.py, whole models those of tests/golden.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from maxkit import mesh as meshes
from maxkit.mesh_axes import AXES
from maxkit.models.attention import Context
from maxkit.models.config import BlockSpec, GatedDeltaConfig, ModelConfig
from maxkit.models.gated_delta import GatedDelta
from maxkit.models.layers import Make
from maxkit.ops import Visibility
from maxkit.ops import gated_delta as ops

SPEC = BlockSpec(mixer="gated_delta")
CONFIG = ModelConfig(
    vocab_size=48,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_seq_len=64,
    pattern=(SPEC,),
    gated_delta=GatedDeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=6, value_head_dim=10),
)
# Lengths of segments, 0 meaning one token of padding; each has 21 tokens.
PACKED = [[21], [8, 8, 5], [1, 1, 16, 3], [3, 14, 0, 0, 0, 0]]
# The same in small, 8 tokens, for what compiles whole layers.
SHORT = [[8], [3, 5], [1, 1, 4, 2], [3, 3, 0, 0]]
# float32 sums in another order: 1e-6 measured, 2.5e-6 where keys repeat.
ATOL = 2e-5


def segments_of(rows):
    """[B, T] ids from lengths of segments."""
    return np.stack([np.concatenate([[0] if n == 0 else [i] * n for i, n in enumerate(row, 1)]) for row in rows])


# ---------------------------------------------------------------- the rule


def drawn(rows, length, heads=3, width=4, depth=5, seed=0, repeated=False):
    """Random arguments of the rule; `repeated` gives it one key for ever, written in full and never forgotten."""
    draw = np.random.default_rng(seed)
    query, key, value = (draw.normal(size=(rows, length, heads, n)) for n in (width, width, depth))
    query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    log_decay, beta = -draw.exponential(size=(rows, length, heads)), draw.random((rows, length, heads))
    if repeated:
        key, log_decay, beta = np.broadcast_to(key[:, :1], key.shape), 0 * log_decay, 0 * beta + 0.99
    return {"query": query, "key": key, "value": value, "log_decay": log_decay, "beta": beta}


def recurrence(given, segments, state, before):
    """Token by token in float64; padding is skipped, a new segment begins from nothing."""
    outputs = np.zeros_like(given["value"])
    state = state.astype(np.float64).copy()
    for row, ids in enumerate(segments):
        owner = before[row]
        for t in np.flatnonzero(ids):
            query, key, value, log_decay, beta = (given[name][row, t] for name in given)
            state[row] *= (owner == ids[t]) * np.exp(log_decay)[:, None, None]
            owner = ids[t]
            for head in range(len(beta)):
                seen = key[head] @ state[row, head]
                state[row, head] += beta[head] * np.outer(key[head], value[head] - seen)
                outputs[row, t, head] = query[head] @ state[row, head]
    return outputs, state


@functools.partial(jax.jit, static_argnames="chunk_size")
def run_rule(given, segments, state, before, chunk_size):
    restarts = ops.count_restarts(segments, before)
    real = (segments != 0)[..., None]
    given = given | {name: jnp.where(real, given[name], 0) for name in ("log_decay", "beta")}
    return ops.gated_delta(**given, restarts=restarts, state=state, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
@pytest.mark.parametrize("before", [0, 1])
def test_chunks_equal_the_recurrence_in_float64(chunk_size, before):
    segments = segments_of(PACKED)
    given = drawn(*segments.shape)
    state, before = np.random.default_rng(1).normal(size=(4, 3, 4, 5)), np.full(4, before)
    wanted, after = recurrence(given, segments, state, before)
    outputs, found = run_rule(_single(given), segments, state.astype(np.float32), before, chunk_size)
    real = segments != 0
    np.testing.assert_allclose(np.asarray(outputs)[real], wanted[real], atol=ATOL)
    np.testing.assert_allclose(found, after, atol=ATOL)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_any_length(length):
    given, segments = drawn(1, length), np.ones((1, length), int)
    state, before = np.ones((1, 3, 4, 5)), np.ones(1, int)
    wanted, after = recurrence(given, segments, state, before)
    outputs, found = run_rule(_single(given), segments, state.astype(np.float32), before, 64)
    np.testing.assert_allclose(outputs, wanted, atol=ATOL)
    np.testing.assert_allclose(found, after, atol=ATOL)


def test_keys_that_repeat_do_not_overflow():
    given, segments = drawn(1, 64, repeated=True), np.ones((1, 64), int)
    wanted, after = recurrence(given, segments, np.zeros((1, 3, 4, 5)), np.ones(1))
    outputs, found = run_rule(_single(given), segments, np.zeros((1, 3, 4, 5), np.float32), np.ones(1, int), 64)
    np.testing.assert_allclose(outputs, wanted, atol=ATOL)
    np.testing.assert_allclose(found, after, atol=ATOL)


@pytest.mark.parametrize("repeated", [False, True])
def test_gradients_equal_those_of_the_steps(repeated):
    segments = segments_of(PACKED)
    given, state = _single(drawn(*segments.shape, repeated=repeated)), jnp.ones((4, 3, 4, 5))
    weights = np.random.default_rng(2).normal(size=given["value"].shape).astype(np.float32)

    def by_chunks(given, state):
        outputs, state = run_rule(given, segments, state, np.ones(4, int), 8)
        return jnp.sum(outputs * weights * (segments != 0)[..., None, None]) + jnp.sum(jnp.sin(state))

    def by_steps(given, state):
        # The same masks said otherwise: a restart is a decay to nothing, padding neither decays nor writes.
        begins = np.diff(segments, axis=1, prepend=1) > 0
        real = (segments != 0)[..., None]
        decay = jnp.where(begins[..., None], -jnp.inf, jnp.where(real, given["log_decay"], 0))
        given = given | {"log_decay": decay, "beta": jnp.where(real, given["beta"], 0)}

        def one(state, token):
            output, state = ops.step(**token, state=state)
            return state, output

        state, outputs = jax.lax.scan(one, state, jax.tree.map(lambda x: x.swapaxes(0, 1), given))
        outputs = outputs.swapaxes(0, 1)
        return jnp.sum(outputs * weights * real[..., None]) + jnp.sum(jnp.sin(state))

    found, wanted = (jax.jit(jax.grad(f, argnums=(0, 1)))(given, state) for f in (by_chunks, by_steps))
    for name, a, b in zip([*given, "state"], [*found[0].values(), found[1]], [*wanted[0].values(), wanted[1]]):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()), err_msg=name)


def _single(given):
    return {name: jnp.asarray(value, jnp.float32) for name, value in given.items()}


# ---------------------------------------------------------------- the convolution


def test_restarts_count_new_segments_and_padding_begins_none():
    segments = jnp.asarray([[1, 1, 2, 2, 0, 0], [0, 0, 3, 3, 3, 4], [0, 0, 0, 0, 0, 0], [2, 0, 2, 1, 1, 0]])
    found = ops.count_restarts(segments, jnp.asarray([1, 0, 5, 1]))
    assert found.tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 2], [0] * 6, [1, 1, 1, 2, 2, 2]]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_stays_inside_its_segment(width):
    segments = segments_of(PACKED)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(*segments.shape, 2, 3)).astype(np.float32) * (segments != 0)[..., None, None]
    kernel, tail = draw.normal(size=(2, 3, width)), draw.normal(size=(4, width - 1, 2, 3)).astype(np.float32)
    wanted = np.zeros(x.shape)
    before = np.asarray([1, 1, 7, 1])  # the third row's tail is of another document
    ids = np.concatenate([np.repeat(before[:, None], width - 1, axis=1), segments], axis=1)
    whole = np.concatenate([tail, x], axis=1)
    for row, t, tap in np.ndindex(4, 21, width):
        if ids[row, t + tap] == segments[row, t]:
            wanted[row, t] += whole[row, t + tap] * kernel[..., tap]
    restarts = ops.count_restarts(jnp.asarray(segments), jnp.asarray(before))
    found = ops.causal_conv(jnp.asarray(x), jnp.asarray(kernel, jnp.float32), jnp.asarray(tail), restarts)
    real = segments != 0
    np.testing.assert_allclose(np.asarray(found)[real], wanted[real], atol=1e-5)
    kept = ops.next_tail(jnp.asarray(x), jnp.asarray(tail), restarts, jnp.asarray(real.sum(axis=1)))
    for row in range(4):
        last = int(real[row].sum()) + width - 1  # one behind the last real token, in `whole`
        own = (ids[row, last - width + 1 : last] == ids[row, last - 1])[:, None, None]
        np.testing.assert_array_equal(kept[row], whole[row, last - width + 1 : last] * own)


# ---------------------------------------------------------------- the mixer


def context(segments, layer=None):
    """What the decoder hands to this mixer."""
    positions = jnp.zeros((1, 1), jnp.int32)
    return Context(positions, segments, Visibility(positions, positions), {}, {}, layer=layer)


@functools.lru_cache(maxsize=8)
def built(width=4, layers=None):
    """(config, graphdef, state) of a mixer, or of a stack of them, with random values made by numpy."""
    sizes = CONFIG.gated_delta.model_copy(update={"conv_width": width})
    config = CONFIG.model_copy(update={"gated_delta": sizes})
    draw = np.random.default_rng(3)

    def make():
        make = Make(jax.random.key(0), jnp.float32).at("delta")
        return GatedDelta(config, SPEC, make if layers is None else make.for_layers(layers, stacked=True))

    graphdef, state = nnx.split(nnx.eval_shape(make))
    return config, graphdef, jax.tree.map(lambda x: jnp.asarray(0.4 * draw.normal(size=x.shape), x.dtype), state)


# Compiling is what takes the time here.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quickly, static_argnums=0)
def mix(graphdef, state, x, segments=None, cache=None):
    return nnx.merge(graphdef, state)(x, context(segments), cache)


def inputs(rows, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, length, 16)), jnp.float32)


def empty(config, rows, dtype="float32"):
    shapes = GatedDelta.cache_shapes(config, rows, 99)
    return {name: jnp.zeros(shape, kind or dtype) for name, (shape, _, kind) in shapes.items()}


def test_packed_documents_do_not_know_each_other():
    _, graphdef, state = built()
    x, segments = inputs(1, 9), segments_of([[3, 3, 3]])
    packed, _ = mix(graphdef, state, x, segments)
    alone = [mix(graphdef, state, x[:, a : a + 3])[0] for a in (0, 3, 6)]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=ATOL)
    joined, _ = mix(graphdef, state, x, np.ones_like(segments))
    assert np.abs(np.asarray(joined - packed)).max() > 0.01


@pytest.mark.parametrize("width", [1, 4])
def test_token_by_token_equals_the_whole_row(width):
    config, graphdef, state = built(width)
    segments = segments_of(SHORT[:3])
    x = inputs(*segments.shape)
    wanted, _ = mix(graphdef, state, x, segments)
    cache, outputs = empty(config, 3), []
    for t in range(x.shape[1]):
        y, cache = mix(graphdef, state, x[:, t : t + 1], segments[:, t : t + 1], cache)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), wanted, atol=ATOL)


def test_unequal_prompts_padded_right_go_on_from_their_own_ends():
    config, graphdef, state = built()
    lengths, total = np.asarray([2, 9, 6, 1]), 13
    x = inputs(4, total)
    wanted, _ = mix(graphdef, state, x)
    prompt = np.zeros((4, 9, 16), np.float32)
    for row, n in enumerate(lengths):
        prompt[row, :n], prompt[row, n:] = x[row, :n], np.nan  # whatever is in the padding, nobody reads it
    segments = (np.arange(9) < lengths[:, None]).astype(np.int32)
    y, cache = mix(graphdef, state, prompt, segments, empty(config, 4))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(y[row, :n], wanted[row, :n], atol=ATOL)
    for _ in range(4):
        y, cache = mix(graphdef, state, x[np.arange(4), lengths][:, None], None, cache)
        np.testing.assert_allclose(y[:, 0], wanted[np.arange(4), lengths], atol=ATOL)
        lengths = lengths + 1


def test_padding_on_the_left_of_a_prompt_counts_for_nothing():
    config, graphdef, state = built()
    x = inputs(1, 9)
    wanted, kept = mix(graphdef, state, x, None, empty(config, 1))
    padded = jnp.concatenate([jnp.full((1, 4, 16), 7.0), x], axis=1)
    found, cache = mix(graphdef, state, padded, segments_of([[0, 0, 0, 0, 9]]) // 5, empty(config, 1))
    np.testing.assert_allclose(found[:, 4:], wanted, atol=ATOL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), cache, kept)


@pytest.mark.parametrize("length", [1, 3])
def test_a_row_of_padding_keeps_its_cache(length):
    config, graphdef, state = built()
    _, cache = mix(graphdef, state, inputs(2, 6), None, empty(config, 2))
    segments = np.stack([np.zeros(length, np.int32), np.ones(length, np.int32)])
    _, after = mix(graphdef, state, inputs(2, length, seed=1), segments, cache)
    for name in cache:
        np.testing.assert_array_equal(after[name][0], cache[name][0])
    assert all((after[name][1] != cache[name][1]).any() for name in cache if name != "segment")


def test_bfloat16_keeps_a_float32_state():
    config, graphdef, state = built()
    x = inputs(2, 12)
    wanted, _ = mix(graphdef, state, x)
    y, cache = mix(graphdef, state, x.astype(jnp.bfloat16), None, empty(config, 2, "bfloat16"))
    kinds = {name: str(value.dtype) for name, value in cache.items()}
    convs = {f"conv_{name}": "bfloat16" for name in ("query", "key", "value")}
    assert kinds == convs | {"state": "float32", "segment": "int32"} and y.dtype == jnp.bfloat16
    # 8 bits of mantissa through projections, convolution, gate and norm: 3 % measured.
    assert np.abs(np.asarray(y, np.float32) - wanted).max() < 0.06 * np.abs(wanted).max()


def test_paths_and_letters_are_those_of_the_canonical_table():
    _, _, state = built()
    letters = {"/".join(path): v.get_metadata()["letters"] for path, v in nnx.to_flat_state(state)}
    assert letters == {
        "query/kernel": "DKH",
        "key/kernel": "DKH",
        "value/kernel": "DNH",
        "gate/kernel": "DNH",
        "beta/kernel": "DN",
        "decay/kernel": "DN",
        "query_conv/kernel": "KHW",
        "key_conv/kernel": "KHW",
        "value_conv/kernel": "NHW",
        "dt_bias": "N",
        "log_decay": "N",
        "norm/scale": "H",
        "out/kernel": "NHD",
    }


def test_heads_begin_with_memories_of_many_lengths():
    sizes = GatedDeltaConfig(num_key_heads=64, num_value_heads=512, key_head_dim=1, value_head_dim=1)
    config = CONFIG.model_copy(update={"gated_delta": sizes})
    mixer = GatedDelta(config, SPEC, Make(jax.random.key(0), jnp.float32))
    log_decay, _ = mixer._gates(jnp.zeros((1, 1, 16)))
    tokens = -1 / np.asarray(log_decay)  # after how many a state is down to 1 / e
    assert 0.6 < tokens.min() < 2 and 1_000 < tokens.max() < 100_000 and 1 < np.median(tokens) < 50


# ---------------------------------------------------------------- stacked, rematerialised, on a mesh


def scanned(graphdef, state, x, segments, caches=None):
    """Two layers with a residual stream, as the decoder scans them: caches carried, layer numbers scanned."""

    def body(carry, layer):
        (x, caches), (state, number) = carry, layer
        mixer = nnx.merge(graphdef, state)
        y, caches = mixer(x, dataclasses.replace(context(segments), layer=number), caches)
        return (x + y, caches), None

    return jax.lax.scan(jax.checkpoint(body), (x, caches), (state, jnp.arange(2)))[0]


def loss(graphdef, state, x, segments):
    x, caches = scanned(graphdef, state, x, segments)
    return jnp.sum(jnp.sin(x)), caches


def test_stacked_layers_equal_single_ones_with_and_without_caches():
    _, graphdef, state = built(layers=(0, 1))
    _, single, _ = built()
    segments = segments_of(SHORT[:3])
    x = inputs(3, 8)

    def unrolled(state):
        y = x
        for number in (0, 1):
            layer = jax.tree.map(lambda leaf, number=number: leaf[number], nnx.to_pure_dict(state))
            mixer = nnx.merge(single, nnx.State(layer))
            y = y + mixer(y, context(segments), None)[0]
        return jnp.sum(jnp.sin(y)), y

    gradients, wanted = quickly(jax.grad(unrolled, has_aux=True))(state)
    found, _ = quickly(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)(graphdef, state, x, segments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), found, gradients)
    caches = {name: jnp.stack([value, value]) for name, value in empty(CONFIG, 3).items()}
    run = quickly(scanned, static_argnums=0)
    first, caches = run(graphdef, state, x[:, :7], segments[:, :7], caches)
    second, _ = run(graphdef, state, x[:, 7:], segments[:, 7:], caches)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), wanted, atol=ATOL)


@pytest.mark.parametrize("tensor", [2, 4])  # 4 divides the value heads but not the key heads
def test_layouts_on_a_mesh(tensor):
    """Traced only: under Explicit axes every array's layout is part of its type."""
    config, graphdef, state = built(layers=(0, 1))
    sizes = {"fsdp": 2, "tensor": tensor}
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))

    def shaped(shape, kind, letters, spec_of=meshes.sharding_of):
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec_of(letters, shape)))

    with jax.sharding.use_abstract_mesh(mesh):
        spec_of = functools.partial(meshes.weight_spec, mesh=mesh)
        weights = jax.tree.map(
            lambda v: v.replace(shaped(v.shape, v.dtype, v.get_metadata()["letters"], spec_of)),
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        caches = {
            name: shaped((2, *shape), kind or "float32", "L" + letters)
            for name, (shape, letters, kind) in GatedDelta.cache_shapes(config, 2, 32).items()
        }
        for length in (1, 8):  # a step, a prefill
            x, segments = shaped((2, length, 16), "float32", "BTD"), shaped((2, length), "int32", "BT")
            y, after = jax.eval_shape(functools.partial(scanned, graphdef), weights, x, segments, caches)
            assert y.sharding == x.sharding
            assert {name: c.sharding for name, c in after.items()} == {name: c.sharding for name, c in caches.items()}
        gradients, _ = jax.eval_shape(jax.grad(functools.partial(loss, graphdef), has_aux=True), weights, x, segments)
    wanted = {path: leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    assert {path: leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)} == wanted
    assert sum("tensor" in str(sharding.spec) for sharding in wanted.values()) == (10 if tensor == 2 else 6)
