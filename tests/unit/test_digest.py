# SPDX-License-Identifier: Apache-2.0
"""The digest: numpy equals device for every dtype, on one device and on a mesh; every small change shows."""

import os
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from maxkit.checkpoint import digest, digest_numpy

DTYPES = [
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "int8",
    "uint8",
    "int16",
    "int32",
    "uint32",
    "bool",
    "int4",
]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def random_array(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Every bit random (NaNs and negative zeros included) where the dtype allows it."""
    generator = np.random.default_rng(seed)
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    if dtype == "int4":
        return generator.integers(-8, 8, shape).astype(ml_dtypes.int4)
    size = jnp.dtype(dtype).itemsize
    return generator.integers(0, 256, (*shape, size), dtype=np.uint8).view(jnp.dtype(dtype))[..., 0]


@hypothesis.given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 1000))
@hypothesis.settings(max_examples=150, deadline=None)
def test_numpy_equals_device(shape, dtype, seed):
    array = random_array(shape, dtype, seed)
    assert digest.digest_tree({"x": jnp.asarray(array)})["x"] == digest_numpy.digest_array(array)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 3, 4)])
def test_64_bits_equal_device(dtype, shape):
    array = random_array(shape, dtype, 7)
    with jax.enable_x64(True):
        assert digest.digest_tree([jnp.asarray(array)])["0"] == digest_numpy.digest_array(array)


def test_prng_keys_are_their_key_data():
    keys = jax.random.split(jax.random.key(3), 4)
    raw = np.asarray(jax.random.key_data(keys))
    assert digest.digest_tree({"rng": keys})["rng"] == digest_numpy.digest_array(raw)


def plain_python_digest(words: list[int]) -> str:
    """The formula as it is written down, one word at a time."""
    sums = [0, 0]
    for n, word in enumerate(words):
        a = word ^ ((n * 0x9E3779B1 + 1) % 2**32)
        a = (a ^ a >> 16) * 0x85EBCA6B % 2**32
        a = (a ^ a >> 13) * 0xC2B2AE35 % 2**32
        b = word ^ ((n * 0x85EBCA77 + 0x165667B1) % 2**32)
        b = (b ^ b >> 16) * 0x7FEB352D % 2**32
        b = (b ^ b >> 15) * 0x846CA68B % 2**32
        sums = [(sums[0] + (a ^ a >> 16)) % 2**32, (sums[1] + (b ^ b >> 16)) % 2**32]
    return f"{sums[0]:08x}{sums[1]:08x}"


def test_value_is_fixed():
    """The formula is part of the format: a checkpoint of today must verify in ten years."""
    floats = np.arange(70_000, dtype=np.float32)
    assert digest_numpy.digest_array(floats) == plain_python_digest(floats.view(np.uint32).tolist())
    longs = np.arange(-3, 3, dtype=np.int64).reshape(2, 3)
    assert digest_numpy.digest_array(longs) == plain_python_digest(longs.reshape(-1).view(np.uint32).tolist())
    bytes_ = np.arange(-5, 5, dtype=np.int8)
    assert digest_numpy.digest_array(bytes_) == plain_python_digest(bytes_.view(np.uint8).tolist())
    assert digest_numpy.digest_array(np.arange(100_000, dtype=np.float32)) == "c554ddb9edf948d6"
    assert digest_numpy.digest_array(np.zeros((0, 4), np.float32)) == "0" * 16


def test_strided_and_big_endian_arrays_count_as_their_values():
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for same in (np.asfortranarray(array), array.astype(">f4"), array[:, ::-1][:, ::-1]):
        assert digest_numpy.digest_array(same) == digest_numpy.digest_array(array)


@hypothesis.given(st.sampled_from(DTYPES[:-2]), st.integers(1, 400), st.data())
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_flipped_bit_changes_both_lanes(dtype, size, data):
    array = random_array((size,), dtype, size)
    flipped = array.copy()
    bytes_ = flipped.view(np.uint8)
    bytes_[data.draw(st.integers(0, bytes_.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    before, after = digest_numpy.digest_array(array), digest_numpy.digest_array(flipped)
    assert before[:8] != after[:8] and before[8:] != after[8:]


@hypothesis.given(st.integers(2, 300), st.data())
@hypothesis.settings(max_examples=100, deadline=None)
def test_swapping_two_elements_changes_it(size, data):
    array = np.arange(size, dtype=np.int32)
    i, j = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True))
    swapped = array.copy()
    swapped[[i, j]] = swapped[[j, i]]
    assert digest_numpy.digest_array(array) != digest_numpy.digest_array(swapped)


def test_random_permutations_and_lengths_never_collide():
    generator = np.random.default_rng(0)
    seen = {digest_numpy.digest_array(generator.permutation(64).astype(np.int32)) for _ in range(5000)}
    assert len(seen) == 5000
    assert len({digest_numpy.digest_array(np.zeros(size, np.float32)) for size in range(500)}) == 500


def test_more_words_than_32_bits_can_count(monkeypatch):
    """With the limit lowered to 2^5 words both sides use the two-part position, and still agree."""

    def small_inner(shape, words):
        size = words
        for extent in reversed(shape):
            if size * extent > 32:
                return size
            size *= extent
        return size

    plain = digest_numpy.digest_array(np.ones((3, 4, 8), np.float32))
    monkeypatch.setattr(digest_numpy, "inner_words", small_inner)
    for shape in ((3, 4, 8), (4, 9), (2, 3, 5, 7)):
        array = random_array(shape, "float32", 1)
        device = digest.array_lanes.__wrapped__(jnp.asarray(array))
        assert digest_numpy.format_lanes(*device) == digest_numpy.digest_array(array)
    assert digest_numpy.digest_array(np.ones((3, 4, 8), np.float32)) != plain


def test_paths_name_dictionaries_sequences_and_named_tuples():
    import optax

    params = {"layers": {"block_0": {"scale": jnp.ones(3)}}}
    state = {"params": params, "opt_state": optax.adamw(1e-3).init(params)}
    assert "opt_state/0/mu/layers/block_0/scale" in digest.digest_tree(state)


MESH_SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from maxkit.checkpoint import digest, digest_numpy
assert jax.device_count() == 8
host = {"a": np.random.default_rng(0).normal(size=(6, 64, 96)).astype(np.float32),
        "b": np.arange(64, dtype=np.int8), "c": np.float32(3.0)}
expected = {path: digest_numpy.digest_array(leaf) for path, leaf in host.items()}
specs = {"a": P(None, "fsdp", "tensor"), "b": P(("fsdp", "tensor")), "c": P()}
for kind in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    tree = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in host.items()}
    assert digest.digest_tree(tree) == expected
    with jax.set_mesh(mesh):
        assert digest.digest_tree(tree) == expected
    alone = dict(tree, key=jax.random.key(0))  # one leaf on one device beside leaves on eight
    assert {k: v for k, v in digest.digest_tree(alone).items() if k != "key"} == expected
    text = digest.array_lanes.lower(tree["a"]).compile().as_text()
    gathered = [line for line in text.splitlines() if " all-gather(" in line and "f32" in line]
    assert not gathered, gathered
print("equal")
"""


def test_sharded_over_eight_devices_equals_unsharded():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", MESH_SCRIPT], env=os.environ | flags, capture_output=True, text=True)
    assert run.stdout.strip() == "equal", run.stderr[-3000:]


def test_numpy_half_imports_no_jax():
    code = "import sys, maxkit.checkpoint.digest_numpy; print({'jax', 'flax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
