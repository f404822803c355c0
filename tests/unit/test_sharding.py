# SPDX-License-Identifier: Apache-2.0
"""One device against 8 simulated ones, and what the table of axes refuses or leaves whole.

sharding_cases.py runs everything that needs devices, once, in a process of its own.
"""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh, AxisType
from tiny_models import TINY, tiny

from maxkit import build, mesh
from maxkit.config import resolve
from maxkit.errors import UserError
from maxkit.mesh_axes import AXES, parse_mesh, parse_sizes
from maxkit.models.definition import ModelDefinition

SCRIPT = Path(__file__).parent / "sharding_cases.py"
# The same float32 sums in the order of other devices, through 4 updates of Adam: 3e-6 measured.
RTOL = 2e-5


@functools.cache
def results():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(SCRIPT.parent.parent),
    }
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["even", "smollm2", "mqa", "lora", "qlora"])
def test_every_mesh_gives_the_losses_of_one_device(model):
    runs = results()["runs"]
    one = runs[f"{model}/1"]["losses"]
    others = [name for name in runs if name.startswith(f"{model}/") and not name.endswith("/1")]
    assert others and one[2] < one[0] and all(map(math.isfinite, one))  # batches 0 and 2 are the same rows
    for name in others:
        assert runs[name]["losses"] == pytest.approx(one, rel=RTOL), name


def test_weights_and_moments_keep_their_layout_and_the_step_is_compiled_once():
    for name, run in results()["runs"].items():
        assert (run["wrong"], run["compiled_after_the_first"]) == ([], 0), name
    assert results()["compiled"] > len(results()["runs"])  # they were counted


def test_gradients_are_laid_out_as_their_weights():
    """Read off the types: with Explicit axes they are what the compiler must keep."""
    assert len(results()["gradients"]) == 24
    assert not any(results()["gradients"].values()), results()["gradients"]


def test_heads_stay_divided_after_attention():
    """Where the mesh divides the query heads but not the kv heads (MQA), copies of these are made instead."""
    for name, spec in results()["attention"].items():
        heads = "'tensor'" if name.startswith("4/") else "None"  # 9 heads: divided by neither 2 nor 4
        assert spec == f"P('fsdp', None, {heads}, None)", name


def test_decoding_with_a_sharded_cache_is_the_full_pass_of_one_device():
    assert max(results()["decode"].values()) < 1e-5  # logits of size 3 in float32


# ---------------------------------------------------------------- the table, without devices


def abstract(**sizes):
    return AbstractMesh(tuple(sizes.get(a, 1) for a in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def letters(config):
    return {p.path: (p.letters, p.shape) for p in ModelDefinition(config).parameters.values()}


@pytest.mark.parametrize(
    ("given", "devices", "sizes"),
    [
        ("", 8, (1, 8, 1, 1)),
        ("", 1, (1, 1, 1, 1)),
        ("fsdp:4,tensor:2", 8, (1, 4, 1, 2)),
        (" tensor : 2 , fsdp:-1 ", 8, (1, 4, 1, 2)),
        ("data:-1", 6, (6, 1, 1, 1)),
        ("fsdp:-1,tensor:8", 8, (1, 1, 1, 8)),
    ],
)
def test_mesh_descriptions(given, devices, sizes):
    assert tuple(parse_mesh(given, devices).values()) == sizes


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("fsdp", "'fsdp' is not axis:size"),
        ("fsdp:two", "is not axis:size"),
        ("fsdp:2.0", "is not axis:size"),
        ("fsdp:--1", "is not axis:size"),
        ("fsdp:-", "is not axis:size"),
        ("fsdp:²", "is not axis:size"),
        ("fsdp=8", "is not axis:size"),
        ("tensr:2", "did you mean 'tensor'?"),
        ("model:2", "allowed: data, expert, fsdp, tensor"),
        ("fsdp:2,fsdp:4", "given twice"),
        ("fsdp:0", "must be positive"),
        ("fsdp:-2", "must be positive"),
        ("fsdp:-1,tensor:-1", "only one size may be -1"),
        ("fsdp:3", "needs 3 devices, here are 8"),
        ("fsdp:-1,tensor:3", "8 devices cannot be divided by 3"),
        ("fsdp:16", "needs 16 devices, here are 8"),
    ],
)
def test_bad_mesh_descriptions_are_one_line(given, words):
    with pytest.raises(UserError) as caught:
        parse_mesh(given, 8)
    assert words in str(caught.value) and repr(given) in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_are_read_without_devices():
    assert parse_sizes("fsdp:-1,tensor:2") == {"fsdp": -1, "tensor": 2} and parse_sizes("") == {}


def test_what_is_left_whole_is_listed():
    smollm2 = tiny(num_heads=9, num_kv_heads=3, embed_dim=36, vocab_size=49)
    lines = mesh.unsharded(letters(smollm2), abstract(fsdp=8, tensor=2))
    assert lines == [
        "D=36 is left unsharded: fsdp=8 does not divide it",
        "K=3 is left unsharded: tensor=2 does not divide it",
        "N=9 is left unsharded: tensor=2 does not divide it",
        "V=49 is left unsharded: tensor=2 does not divide it",
    ]
    assert mesh.unsharded(letters(TINY), abstract(fsdp=4, tensor=2)) == []


def test_specs_follow_the_letters():
    both = abstract(data=2, fsdp=2, tensor=2)
    expected = {
        ("VD", (48, 16)): "P('tensor', 'fsdp')",
        ("LDNH", (2, 16, 4, 4)): "P(None, 'fsdp', 'tensor', None)",
        ("DKH", (16, 1, 4)): "P('fsdp', None, None)",  # one kv head
        ("LFD", (2, 24, 16)): "P(None, 'tensor', 'fsdp')",
        ("RNH", (2, 4, 4)): "P(None, 'tensor', None)",
        ("DR", (16, 2)): "P('fsdp', None)",
        ("LD", (2, 16)): "P(None, None)",  # a vector multiplies activations: replicated
        ("D", (16,)): "P(None,)",
    }
    for (names, shape), spec in expected.items():
        assert str(mesh.weight_spec(names, shape, both)) == spec, names
    with pytest.raises(AssertionError, match="does not describe"):
        mesh.weight_spec("DF", (16,), both)


@pytest.mark.parametrize(
    ("sizes", "advice"), [({"tensor": 5}, "mesh=''"), ({"fsdp": 5}, "data:-1"), ({"data": 2, "fsdp": 5}, "data:-1")]
)
def test_a_mesh_that_divides_no_parameter_is_refused(sizes, advice):
    with pytest.raises(UserError, match="shards nothing of this model") as caught:
        mesh.check_shards_something(letters(tiny(num_kv_heads=4)), abstract(**sizes))
    assert advice in str(caught.value) and "D=16" in str(caught.value) or "F=24" in str(caught.value)


@pytest.mark.parametrize("sizes", [{}, {"data": 5}, {"fsdp": 4}, {"fsdp": 5, "tensor": 2}])
def test_a_mesh_that_divides_something_is_not(sizes):
    mesh.check_shards_something(letters(TINY), abstract(**sizes))


@pytest.mark.parametrize(
    ("settings", "sizes", "allowed"),
    [
        ({"batch_size": 8, "gradient_accumulation_steps": 2}, {"fsdp": 4, "tensor": 2}, True),
        ({"batch_size": 8, "gradient_accumulation_steps": 4}, {"fsdp": 4, "tensor": 2}, False),
        ({"batch_size": 6}, {"data": 2, "fsdp": 2}, False),
        ({"batch_size": 3}, {"tensor": 2}, True),
    ],
)
def test_the_rows_of_a_micro_batch_must_divide_over_the_mesh(settings, sizes, allowed):
    cfg = resolve("pretrain", environ={}, given={k: (v, "keyword") for k, v in settings.items()})
    if allowed:
        build.check_mesh(cfg, ModelDefinition(TINY), abstract(**sizes))
        return
    with pytest.raises(UserError, match=f"batch_size={settings['batch_size']} .* multiple of") as caught:
        build.check_mesh(cfg, ModelDefinition(TINY), abstract(**sizes))
    assert "\n" not in str(caught.value)
