# SPDX-License-Identifier: Apache-2.0
"""Attention and its masks against numpy in float64, written as loops over queries; kernels against the reference.

attention_on_mesh.py runs a kernel on 8 simulated devices, in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh
from tiny_models import tiny

from maxkit import mesh, ops
from maxkit.data.packing import pack
from maxkit.errors import UserError
from maxkit.mesh_axes import AXES
from maxkit.models.config import Execution
from maxkit.models.kernels import attention_kernels
from maxkit.ops.attention_cudnn import cudnn_attention
from maxkit.ops.attention_splash import splash_attention

B, T, S, H = 2, 7, 11, 8
# A softmax over at most 11 keys and two products in float32: 2 ** -24 times a few tens.
FLOAT32 = dict(rtol=1e-5, atol=1e-6)


def reference(query, key, value, mask, scale, soft_cap=None, sinks=None):
    """One query at a time; a query that sees nothing gets the mean of all values."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    heads, groups = query.shape[2], query.shape[2] // key.shape[2]
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, t, n in np.ndindex(*query.shape[:2], heads):
        seen = np.flatnonzero(mask[b, t])
        if len(seen):
            scores = key[b, seen, n // groups] @ query[b, t, n] * scale
            scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
            sink = 0 if sinks is None else np.exp(np.float64(sinks[n]) - scores.max())
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ value[b, seen, n // groups] / (weights.sum() + sink)
        else:
            out[b, t, n] = value[b, :, n // groups].mean(0)
    return out


def arrays(heads, kv_heads, dtype="float32", length=S):
    draw = np.random.default_rng(0)
    shapes = (B, T, heads, H), (B, length, kv_heads, H), (B, length, kv_heads, H)
    return [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]


def random_mask():
    mask = np.random.default_rng(1).integers(0, 2, (B, T, S)).astype(bool)
    mask[0, 3] = mask[1, 0] = False
    return mask


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 1), (9, 3), (1, 1)])
def test_grouped_query_attention(heads, kv_heads):
    query, key, value = arrays(heads, kv_heads)
    mask = random_mask()
    found = ops.reference_attention(query, key, value, jnp.asarray(mask), scale=0.31)
    np.testing.assert_allclose(found, reference(query, key, value, mask, 0.31), **FLOAT32)


def test_bfloat16_keeps_its_type_and_scores_in_float32():
    query, key, value = arrays(6, 2, "bfloat16")
    query = query * 8  # scores of size 60: rounded to bfloat16 they would be off by 0.2
    mask = random_mask()
    found = ops.reference_attention(query, key, value, jnp.asarray(mask), scale=H**-0.5)
    want = reference(*(x.astype(jnp.float32) for x in (query, key, value)), mask, H**-0.5)
    assert found.dtype == jnp.bfloat16
    # Rounding a result between 2 and 4 costs 2 ** -7, rounding the weights 2 ** -9 of it.
    np.testing.assert_allclose(found.astype(jnp.float32), want, atol=2**-7 + 4 * 2**-9)


def test_a_row_that_sees_nothing_is_finite_also_in_its_gradient():
    query, key, value = arrays(4, 2)
    mask = jnp.zeros((B, T, S), bool)
    out, gradients = jax.value_and_grad(
        lambda *qkv: ops.reference_attention(*qkv, mask, scale=1.0).sum(), argnums=(0, 1, 2)
    )(query, key, value)
    assert np.isfinite(out) and all(np.isfinite(g).all() for g in gradients)
    found = ops.reference_attention(query, key, value, mask, scale=1.0)
    np.testing.assert_allclose(found[:, 0], value.mean(1).repeat(2, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("soft_cap", "sinks"), [(2.0, False), (None, True), (1.5, True)])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_soft_cap_and_sinks(soft_cap, sinks, kv_heads):
    query, key, value = arrays(6, kv_heads)
    sinks = np.linspace(-2, 3, 6, dtype=np.float32) if sinks else None
    mask = random_mask()
    mask[:, :, 0] = True  # with sinks a query that sees nothing is nobody's business
    given = None if sinks is None else jnp.asarray(sinks)
    found = ops.reference_attention(query, key, value, jnp.asarray(mask), scale=0.9, soft_cap=soft_cap, sinks=given)
    np.testing.assert_allclose(found, reference(query, key, value, mask, 0.9, soft_cap, sinks), **FLOAT32)


def test_a_sink_takes_weight_by_its_own_logit_only():
    """One key with logit 0 and a sink with logit log 3 share the weight 1 to 3; a very large sink leaves nothing."""
    ones = jnp.ones((1, 1, 2, 4))
    sinks = jnp.asarray([np.log(3.0), 1e4], jnp.float32)
    found = ops.reference_attention(0 * ones, ones, ones, jnp.ones((1, 1, 1), bool), scale=1.0, sinks=sinks)
    np.testing.assert_allclose(found[0, 0, :, 0], [0.25, 0.0], rtol=1e-6)


@pytest.mark.parametrize("span", [ops.Span(None), ops.Span(1), ops.Span(3), ops.Span(100), ops.Span(None, 3)])
def test_the_mask_is_causal_windowed_and_within_segments(span):
    draw = np.random.default_rng(2)
    query_positions, key_positions = draw.integers(0, 8, (B, T)), draw.integers(-1, 8, (B, S))
    query_segments, key_segments = draw.integers(0, 3, (B, T)), draw.integers(0, 3, (B, S))
    extra = draw.integers(0, 2, (B, T, S)).astype(bool)
    sight = ops.Visibility(*map(jnp.asarray, (query_positions, key_positions, query_segments, key_segments, extra)))
    window, chunk = span.sliding_window, span.chunk_size
    found = np.asarray(sight.mask(span))
    for b, t, s in np.ndindex(B, T, S):
        back = query_positions[b, t] - key_positions[b, s]
        want = (
            back >= 0
            and key_positions[b, s] >= 0  # -1 is an empty slot of a cache
            and (window is None or back < window)
            and (chunk is None or query_positions[b, t] // chunk == key_positions[b, s] // chunk)
            and query_segments[b, t] == key_segments[b, s]
            and extra[b, t, s]
        )
        assert found[b, t, s] == want


def test_a_window_of_one_sees_itself_alone():
    positions = jnp.arange(5)[None]
    np.testing.assert_array_equal(ops.Visibility(positions, positions).mask(ops.Span(1))[0], np.eye(5, dtype=bool))


def test_nothing_flows_from_a_masked_key():
    """Not even a NaN-free trace of it: the output is bit-equal whatever the hidden keys and values are."""
    query, key, value = arrays(6, 2)
    mask = random_mask()
    mask[0, 3, 2] = mask[1, 0, 2] = True  # every query sees something
    hidden = ~mask.any(axis=1)[:, :, None, None] | (np.arange(S) == 4)[None, :, None, None]
    mask[:, :, 4] = False
    found = ops.reference_attention(query, key, value, jnp.asarray(mask), scale=1.0)
    other = [jnp.where(hidden, 1e4, x) for x in (key, value)]
    np.testing.assert_array_equal(found, ops.reference_attention(query, *other, jnp.asarray(mask), scale=1.0))


# ---------------------------------------------------------------- rows of segments, as packing makes them


def packed(rows, length, seed=0):
    """Positions and segments [rows, length]: four segments and three tokens of padding, cut at random places."""
    draw = np.random.default_rng(seed)
    positions, segments = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        cuts = [0, *sorted(draw.choice(np.arange(2, length - 4), 3, replace=False)), length - 3]
        for number, (start, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True), start=1):
            segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)
    return jnp.asarray(positions), jnp.asarray(segments)


def row_of(length, segments=True):
    """The visibility of two rows, of segments or without."""
    if segments:
        positions, segments = packed(2, length)
        return ops.Visibility(positions, query_segments=segments)
    return ops.Visibility(jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length)))


@pytest.mark.parametrize("span", [ops.Span(), ops.Span(4), ops.Span(None, 5), ops.Span(4, 5)])
@pytest.mark.parametrize("segments", [True, False])
def test_keys_of_the_row_itself_need_not_be_described_twice(span, segments):
    own = row_of(40, segments)
    positions, ids = own.query_positions, own.query_segments
    np.testing.assert_array_equal(own.mask(span), ops.Visibility(positions, positions, ids, ids).mask(span))


@pytest.mark.parametrize("span", [ops.Span(), ops.Span(4), ops.Span(None, 5), ops.Span(4, 5)])
@pytest.mark.parametrize("segments", [True, False])
def test_place_and_number_say_the_same_as_position_and_segment(span, segments):
    """What kernels go by: not after the query, within reach, of its number."""
    row = row_of(40, segments)
    numbers = row.segments(span)
    place = np.arange(40)
    back = place[:, None] - place
    allowed = np.broadcast_to((back >= 0) & (back < (span.reach or 40)), (2, 40, 40))
    if numbers is not None:
        allowed = allowed & np.asarray(numbers[:, :, None] == numbers[:, None, :])
    real = np.ones((2, 40), bool) if row.query_segments is None else np.asarray(row.query_segments) > 0
    np.testing.assert_array_equal(allowed[real], np.asarray(row.mask(span))[real])
    assert row.in_order().all()


@pytest.mark.parametrize(
    ("positions", "segments", "in_order"),
    [
        ([0, 1, 2, 3], None, True),
        ([7, 8, 9, 10], None, True),  # a later part of a longer text
        ([0, 1, 1, 2], None, False),
        ([0, 2, 1, 3], None, False),
        ([0, 1, 0, 1], None, False),  # two documents that nobody told apart
        ([0, 1, 0, 1], [1, 1, 2, 2], True),
        ([0, 1, 0, 0], [1, 1, 0, 0], True),
        ([0, 0, 0, 1], [0, 0, 1, 1], True),
        ([0, 2, 0, 1], [1, 1, 2, 2], False),
        ([0, 1, 0, 2], [1, 1, 2, 1], False),  # a segment that goes on after another
        ([0, 1, 0, 1], [2, 2, 1, 1], False),
        ([0, 1, 0, 2], [1, 1, 0, 1], False),
    ],
)
def test_what_counts_as_in_order(positions, segments, in_order):
    segments = None if segments is None else jnp.asarray([segments])
    found = ops.Visibility(jnp.asarray([positions]), query_segments=segments).in_order()
    assert found.tolist() == [in_order]


@pytest.mark.parametrize("packing", [True, False])
def test_what_packing_makes_is_in_order(packing):
    examples = [([1] * length, [1] * length) for length in (3, 9, 4, 4, 12, 2, 7)]
    columns = pack(examples, 16, packing=packing).columns
    assert (columns["segment_ids"] == 0).any()
    rows = ops.Visibility(jnp.asarray(columns["positions"]), query_segments=jnp.asarray(columns["segment_ids"]))
    assert rows.in_order().all()


# ---------------------------------------------------------------- splash

# name: (query heads, kv heads, head_dim, value width, tokens, segments, span, soft cap, sinks, dtype)
SPLASH = {
    "causal": (2, 2, 16, 16, 128, False, ops.Span(), None, False, "float32"),
    "segments, grouped": (4, 2, 16, 16, 200, True, ops.Span(), None, False, "float32"),
    "window of three blocks, one kv head, wide values": (3, 1, 8, 24, 300, True, ops.Span(150), None, False, "float32"),
    "soft cap, sinks, window": (4, 2, 16, 16, 130, True, ops.Span(20), 2.0, True, "float32"),
    "chunks": (2, 1, 16, 16, 150, True, ops.Span(None, 16), None, False, "float32"),
    "chunks of a whole row": (2, 1, 16, 16, 150, False, ops.Span(None, 40), None, False, "float32"),
    "bfloat16": (4, 2, 16, 16, 128, True, ops.Span(), 30.0, True, "bfloat16"),
}


@pytest.mark.parametrize("name", SPLASH)
def test_splash_equals_the_reference_in_values_and_gradients(name):
    heads, kv_heads, width, value_width, length, segments, span, soft_cap, sinks, dtype = SPLASH[name]
    draw = np.random.default_rng(3)
    widths = ((heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width))
    query, key, value, weights = (jnp.asarray(draw.normal(size=(2, length, *w)), dtype) for w in widths)
    row = row_of(length, segments)
    if segments:  # nobody uses what padding sees
        weights = weights * (row.query_segments > 0)[:, :, None, None]
    parts = (query, key, value) + ((jnp.asarray(draw.normal(size=heads), jnp.float32),) if sinks else ())

    def run(call):
        def total(query, key, value, sinks=None):
            out = call(query, key, value, sinks) * weights
            return out.astype(jnp.float32).sum(), out

        return jax.jit(jax.value_and_grad(total, argnums=tuple(range(len(parts))), has_aux=True))(*parts)

    options = {"scale": 0.3, "soft_cap": soft_cap}
    mask = row.mask(span)
    (_, want), want_gradients = run(lambda q, k, v, s: ops.reference_attention(q, k, v, mask, sinks=s, **options))
    (_, found), gradients = run(
        lambda q, k, v, s: splash_attention(q, k, v, row, span=span, sinks=s, interpret=True, **options)
    )
    assert found.dtype == jnp.dtype(dtype)
    # Of the largest value; measured: 5e-7 in float32; in bfloat16, where both round what they keep, 5e-3.
    tolerance = 5e-6 if dtype == "float32" else 2e-2
    for got, expected in zip((found, *gradients), (want, *want_gradients), strict=True):
        got, expected = (np.asarray(x, np.float64) for x in (got, expected))
        np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def test_splash_answers_nan_where_place_is_not_position():
    query = jnp.ones((2, 128, 1, 8))
    positions = jnp.stack([jnp.arange(128), jnp.arange(128)[::-1]])
    out = splash_attention(query, query, query, ops.Visibility(positions), scale=1.0, interpret=True)
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def test_splash_on_a_mesh_equals_splash_on_one_device():
    script = Path(__file__).parent / "attention_on_mesh.py"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found and all(error < 2e-6 for case in found.values() for error in case), found


# ---------------------------------------------------------------- cuDNN, whose arguments also XLA understands


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("span", [ops.Span(), ops.Span(5), ops.Span(None, 8)])
@pytest.mark.parametrize("segments", [True, False])
def test_what_cudnn_is_told_means_the_same_to_xla(segments, span, kv_heads):
    draw = np.random.default_rng(4)
    query, key, value = (jnp.asarray(draw.normal(size=(2, 24, n, 8)), jnp.float32) for n in (4, kv_heads, kv_heads))
    row = row_of(24, segments)
    found = cudnn_attention(query, key, value, row, scale=0.7, span=span, implementation="xla")
    want = ops.reference_attention(query, key, value, row.mask(span), scale=0.7)
    real = np.ones((2, 24), bool) if not segments else np.asarray(row.query_segments) > 0
    np.testing.assert_allclose(found[real], want[real], **FLOAT32)


def test_cudnn_is_told_of_an_extra_mask_and_refuses_to_go_by_place_alone():
    draw = np.random.default_rng(5)
    query = jnp.asarray(draw.normal(size=(2, 24, 2, 8)), jnp.float32)
    backwards = ops.Visibility(jnp.broadcast_to(jnp.arange(24)[::-1], (2, 24)))
    assert np.isnan(cudnn_attention(query, query, query, backwards, scale=1.0, implementation="xla")).all()
    extra = jnp.asarray(draw.integers(0, 2, (2, 24, 24)).astype(bool) | np.eye(24, dtype=bool))
    masked = ops.Visibility(backwards.query_positions, extra=extra)
    found = cudnn_attention(query, query, query, masked, scale=1.0, implementation="xla")
    np.testing.assert_allclose(found, ops.reference_attention(query, query, query, masked.mask(), scale=1.0), **FLOAT32)


@pytest.mark.parametrize(
    ("segments", "span", "call", "said"),
    [
        (False, ops.Span(), "fmhaSoftmax", ("CAUSAL", 0)),
        (False, ops.Span(5), "fmhaSoftmax", ("CAUSAL", 5)),
        (True, ops.Span(5), "fmhaScaleBiasSoftmax", ("NO_MASK", 0)),
    ],
)
def test_for_cuda_the_program_calls_cudnn_forward_and_backward(monkeypatch, segments, span, call, said):
    from jax._src.cudnn import fused_attention_stablehlo as lowering

    # Lowering asks which cuDNN is installed, to refuse old ones; here is none, so the test says for which it lowers.
    version = type("Versions", (), {"cudnn_get_version": staticmethod(lambda: 91100)})
    monkeypatch.setattr(lowering, "cuda_versions", version)
    row = row_of(24, segments)
    query, key = (jnp.zeros((2, 24, heads, 64), jnp.bfloat16) for heads in (4, 2))

    def total(query, key, value):
        return cudnn_attention(query, key, value, row, scale=0.25, span=span).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(query, key, key).lower(lowering_platforms=("cuda",))
    lines = [line.replace("\\22", "") for line in program.as_text().splitlines() if "@__cudnn$" in line]
    assert [f"@__cudnn${call}(" in lines[0], f"@__cudnn${call}Backward(" in lines[1], len(lines)] == [True, True, 2]
    for line in lines:
        assert f"mask_type: {said[0]}," in line and f"sliding_window_length: {said[1]}," in line
        assert "fmha_scale: 0.25," in line


# ---------------------------------------------------------------- which kernel

TPU, CPU = mesh.Devices("tpu"), mesh.Devices("cpu")
A100, H100, V100 = (mesh.Devices("gpu", compute_capability=c) for c in (8.0, 9.0, 7.0))


def call(devices, **changes):
    return ops.AttentionCall(**{"length": 512, "dtype": "bfloat16", "widths": (64, 64), "devices": devices} | changes)


@pytest.mark.parametrize(
    ("devices", "changes", "kernel", "words"),
    [
        (CPU, {}, "reference", "no kernel for platform cpu"),
        (TPU, {}, "splash", "platform tpu"),
        (TPU, {"dtype": "float32", "length": 77, "widths": (80, 80)}, "splash", "platform tpu"),
        (
            TPU,
            {"soft_cap": True, "sinks": True, "span": ops.Span(7, 9), "widths": (192, 128)},
            "splash",
            "platform tpu",
        ),
        (TPU, {"extra_mask": True}, "reference", "not splash: .* attention_mask"),
        (TPU, {"own_keys": False}, "reference", "keys from a cache"),
        (mesh.Devices("tpu", divisible=False), {}, "reference", "not splash: .* Explicit"),
        (H100, {}, "cudnn", "platform gpu"),
        (H100, {"extra_mask": True, "span": ops.Span(7, 9)}, "cudnn", "platform gpu"),
        (H100, {"widths": (256, 256)}, "cudnn", "platform gpu"),
        (A100, {"widths": (256, 256)}, "reference", "multiple of 8 up to 128, not 256"),
        (A100, {"widths": (192, 128)}, "reference", "equally wide, not 192 and 128"),
        (A100, {"widths": (36, 36)}, "reference", "multiple of 8"),
        (A100, {"dtype": "float32"}, "reference", "not in float32"),
        (A100, {"soft_cap": True}, "reference", "no soft cap"),
        (A100, {"sinks": True}, "reference", "no attention sinks"),
        (A100, {"length": 511}, "reference", "even number of tokens"),
        (A100, {"length": 511, "segments": False}, "cudnn", "platform gpu"),
        (V100, {}, "reference", "compute capability 8.0"),
        (mesh.Devices("gpu"), {}, "reference", "compute capability 8.0"),
        (mesh.Devices("gpu", False, 9.0), {}, "reference", "Explicit"),
    ],
)
def test_auto_takes_the_kernel_of_the_platform_where_it_can(devices, changes, kernel, words):
    choice = ops.choose_kernel("auto", call(devices, **changes))
    assert choice.kernel == kernel
    assert re.search(words, choice.reason)
    name = {"tpu": "splash", "gpu": "cudnn"}.get(devices.platform)
    if kernel == "reference" and name and changes.get("own_keys", True):  # the same reason when it is named
        with pytest.raises(UserError, match=f"attention_kernel='{name}' cannot be used here: .*attention_kernel=auto"):
            ops.choose_kernel(name, call(devices, **changes))


def test_a_named_kernel_is_taken_or_refused():
    assert ops.choose_kernel("reference", call(TPU)).kernel == "reference"
    assert ops.choose_kernel("splash", call(TPU)).kernel == "splash"
    assert ops.choose_kernel("splash", call(TPU, own_keys=False)).kernel == "reference"
    with pytest.raises(UserError, match="splash runs on TPU, not on gpu"):
        ops.choose_kernel("splash", call(H100))
    with pytest.raises(UserError, match="did you mean 'splash'"):
        ops.choose_kernel("splesh", call(TPU))
    query = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(UserError, match="splash runs on TPU, not on cpu"):
        ops.attention(query, query, query, ops.Visibility(jnp.arange(4)[None]), scale=1.0, kernel="splash")


def topology(kind, platform, axis_types=AxisType.Explicit):
    """A mesh of four devices that are not here."""
    sizes = tuple(4 if axis == "fsdp" else 1 for axis in AXES)
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return AbstractMesh(sizes, AXES, (axis_types,) * len(AXES), abstract_device=device)


@pytest.mark.parametrize(("platform", "kernels"), [("tpu", 1), ("cpu", 0)])
def test_auto_goes_by_the_mesh_that_is_compiled_for(platform, kernels):
    devices = topology("some", platform)
    rows = NamedSharding(devices, PartitionSpec("fsdp"))
    query = jax.ShapeDtypeStruct((4, 128, 2, 16), "float32", sharding=rows)
    positions = jax.ShapeDtypeStruct((4, 128), "int32", sharding=rows)

    def attend(query, positions):
        return ops.attention(query, query, query, ops.Visibility(positions), scale=1.0, kernel="auto")

    with use_abstract_mesh(devices):
        assert mesh.devices_in_force() == mesh.Devices(platform)
        assert str(jax.make_jaxpr(attend)(query, positions)).count("pallas_call[") == kernels
        assert jax.eval_shape(attend, query, positions).sharding.spec == PartitionSpec("fsdp", None, None, None)


def test_under_auto_axes_no_kernel_can_be_divided():
    with use_abstract_mesh(topology("some", "tpu", AxisType.Auto)):
        assert mesh.devices_in_force() == mesh.Devices("tpu", divisible=False)


def test_the_kernels_of_a_model_in_words():
    blocks = [{"sliding_window": 8}, {}, {"mixer": "gated_delta"}]
    delta = {"num_key_heads": 1, "num_value_heads": 1, "key_head_dim": 4, "value_head_dim": 4}
    config = tiny(num_layers=7, pattern=blocks, gated_delta=delta, attention_soft_cap=3.0)
    with use_abstract_mesh(topology("some", "tpu")):
        assert attention_kernels(config, Execution(), 64) == ["splash in 5 layers (platform tpu)"]
        named = Execution(attention_kernel="reference")
        assert attention_kernels(config, named, 64) == ["reference in 5 layers (named)"]
    assert attention_kernels(config, Execution(), 64) == ["reference in 5 layers (no kernel for platform cpu)"]
