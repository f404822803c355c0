# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that MaxText wrote: inspected, opened, computed with, and written again byte for byte.

The oracle is MaxText 0.2.4 and 0.2.5: digests and logits in tests/fixtures/maxtext (its README says what is there).
`MAXKIT_MAXTEXT_FIXTURES` names a folder with more of the kind.
"""

import functools
import hashlib
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxkit.checkpoint import inspect, load
from maxkit.errors import UserError
from maxkit.formats import maxtext
from maxkit.formats.orbax_arrays import OrbaxArrays
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition

FOLDER = Path(__file__).parents[1] / "fixtures" / "maxtext"
MORE = os.environ.get("MAXKIT_MAXTEXT_FIXTURES")
FIXTURES = {
    p.parent.name: p.parent for root in (MORE, FOLDER) if root for p in Path(root).glob("*/config_resolved.txt")
}

SPREAD = 5e-4  # largest difference of logits, as a part of how far they are spread
TIED = 2e-2  # where MaxText rounds the tied table to bfloat16
BFLOAT16 = 2e-2  # weights rounded to bfloat16, against logits of the float32 ones

LLAMA = [("layers", 1, 4)]
DEEPSEEK = [("dense_layers", 1, 2), ("moe_layers", 1, 3)]
GEMMA3 = [("layers", 6, 1), ("layers_remainder", 2, 1)]
# format, scan_layers, optimizer, step, groups (name, pattern length, repeats)
EXPECTED = {
    "axis0_scanned_025": ("maxtext-nnx", True, "adamw", 1, LLAMA),
    "muon_scanned_025": ("maxtext-nnx", True, "muon", 1, LLAMA),
    "sgd_unscanned_025": ("maxtext-nnx", False, "sgd", 1, LLAMA),
    "paramonly_linen_scanned_024": ("maxtext-linen", True, None, 0, LLAMA),
    "paramonly_linen_unrolled_024": ("maxtext-linen", False, None, 0, LLAMA),
    "paramonly_nnx_scanned_025": ("maxtext-nnx", True, None, 0, LLAMA),
    "paramonly_nnx_unrolled_025": ("maxtext-nnx", False, None, 0, LLAMA),
    "deepseek_nnx_scanned_025": ("maxtext-nnx", True, "adamw", 1, DEEPSEEK),
    "deepseek_linen_unscanned_024": ("maxtext-linen", False, "adamw", 1, DEEPSEEK),
    "gemma3_nnx_scanned_025": ("maxtext-nnx", True, "adamw", 1, GEMMA3),
    "gemma3_nnx_unscanned_025": ("maxtext-nnx", False, "adamw", 1, [("layers", 1, 8)]),
    "linen_scanned_024": ("maxtext-linen", True, "adamw", 1, LLAMA),
    "linen_unscanned_024": ("maxtext-linen", False, "adamw", 1, LLAMA),
    "nnx_scanned_024": ("maxtext-nnx", True, "adamw", 1, LLAMA),
    "nnx_scanned_025": ("maxtext-nnx", True, "adamw", 1, LLAMA),
    "nnx_unscanned_025": ("maxtext-nnx", False, "adamw", 1, LLAMA),
    "nnxnative_scanned": ("maxtext-nnx", True, "adamw", 1, LLAMA),
    "nnxnative_unscanned_integer": ("maxtext-nnx", False, "adamw", 1, LLAMA),
}
every = pytest.mark.parametrize("name", sorted(FIXTURES))
scanned_and_not = pytest.mark.parametrize("scan_layers", [True, False])


def open_fixture(name: str) -> maxtext.MaxTextContents:
    return maxtext.open(FIXTURES[name], FIXTURES[name] / "config_resolved.txt")


def recorded(name: str) -> dict[str, dict | None]:
    """{key: {"shape", "dtype", "sha256"}} of the fixture's manifest."""
    manifest = json.loads((FIXTURES[name] / "manifest.json").read_text())
    return manifest["leaves"] if "leaves" in manifest else next(iter(manifest["steps"].values()))["leaves"]


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def logits(contents, scan_layers: bool, arrays, prefix: str = "", rounded: bool = False) -> np.ndarray:
    """Logits [B, T, V] of a checkpoint for the tokens of a fixture; rounded: with the tied table as MaxText has it."""
    definition = ModelDefinition(contents.config, Execution(scan_layers=scan_layers))
    params = load.read_params(contents, definition, None, report=[])
    positions, segments = arrays[f"{prefix}positions"], arrays[f"{prefix}segment_ids"]

    @functools.partial(jax.jit, static_argnames="rounded")
    def run(params, tokens, positions, segments, rounded):
        model = definition.merge(params)
        x = model.hidden(tokens, positions, segment_ids=segments).x
        if not rounded:
            return model.head(x)
        x, table = model.head_operands(x)
        table = table.astype(jnp.bfloat16).astype(jnp.float32)
        return jnp.einsum("BTD,VD->BTV", x, table)

    return np.asarray(run(params, arrays["tokens"], positions, segments, rounded))


def difference(got: np.ndarray, wanted: np.ndarray, segments: np.ndarray) -> float:
    """The largest difference where there is a token, as a part of the spread."""
    return float(np.abs(got - wanted)[segments > 0].max() / np.ptp(wanted[segments > 0]))


def test_every_fixture_is_expected():
    assert set(FIXTURES) <= set(EXPECTED)
    assert len(FIXTURES) >= 10


@every
def test_inspected(name):
    found = inspect.describe(FIXTURES[name])
    groups = [(group["name"], group["pattern_length"], group["repeats"]) for group in found["groups"]]
    wanted = EXPECTED[name]
    assert (found["format"], found["scan_layers"], found["optimizer"], found["step"], groups) == wanted
    if wanted[1]:
        axes = {group["layer_axis"] for group in found["groups"] if group["name"] != "layers_remainder"}
        assert axes == {0 if name.startswith("axis0") else 1}


@every
def test_opened(name):
    contents = open_fixture(name)
    assert (contents.format, contents.scan_layers, contents.optimizer) == EXPECTED[name][:3]
    assert contents.missing_keys() == contents.unused_keys() == []
    assert set(contents.ignored_keys().values()) <= {"state of random numbers"}
    arrays = [key for key, leaf in recorded(name).items() if leaf]
    counted = {key for key in arrays if key.endswith(("step", "step/value", "count", "count/value", "ns_coeffs"))}
    named = sum(len(tree) for tree in contents._sorted.trees.values()) + len(contents.ignored_keys())
    assert named + len([key for key in counted if key not in contents.ignored_keys()]) == len(arrays)
    if contents.optimizer == "adamw":
        assert contents.slots == ("params", "mu", "nu")
        assert set(contents.addresses("mu")) == set(contents.addresses("nu")) == set(contents.addresses())
    if contents.optimizer:
        assert (int(contents.scalars["step"]), int(contents.scalars["count"])) == (2, 2)


def test_muon_keeps_second_moments_of_vectors_and_ends_only():
    contents = open_fixture("muon_scanned_025")
    assert set(contents.addresses("mu")) == set(contents.addresses())
    assert {path for path, _ in contents.addresses("nu")} == {
        "embed/table",
        "output/kernel",
        "final_norm/scale",
        "layers/attention_norm/scale",
        "layers/mlp_norm/scale",
    }


@scanned_and_not
@pytest.mark.parametrize("name", sorted(name for name, path in FIXTURES.items() if (path / "logits.npz").exists()))
def test_logits(name, scan_layers):
    contents, arrays = open_fixture(name), np.load(FIXTURES[name] / "logits.npz")
    for prefix, wanted in (("", arrays["logits"]), ("packed_", arrays["packed_logits"])):
        segments = arrays[f"{prefix}segment_ids"]
        got = logits(contents, scan_layers, arrays, prefix)
        tied = contents.config.tie_embeddings
        assert difference(got, wanted, segments) < (TIED if tied else SPREAD)
        if tied:  # and the rounding of the table is all of the difference
            assert difference(logits(contents, scan_layers, arrays, prefix, True), wanted, segments) < SPREAD


@pytest.mark.parametrize("name", ["paramonly_linen_scanned_024", "paramonly_nnx_scanned_025"])
def test_logits_of_weights_in_bfloat16_against_the_parents(name):
    contents, arrays = open_fixture(name), np.load(FIXTURES[name] / "parent_logits.npz")
    definition = ModelDefinition(contents.config, Execution(), None, "bfloat16")
    params = load.read_params(contents, definition, None, report=[])
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    for prefix in ("", "packed_"):
        segments = arrays[f"{prefix}segment_ids"]
        model = definition.merge(wide)
        got, _ = model(arrays["tokens"], arrays[f"{prefix}positions"], segment_ids=segments)
        assert difference(np.asarray(got), arrays[f"{prefix}logits"], segments) < BFLOAT16


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_what_maxtext_unrolled_is_what_is_stacked(kind):
    version = {"linen": "024", "nnx": "025"}[kind]
    stacked, unrolled = (open_fixture(f"paramonly_{kind}_{how}_{version}") for how in ("scanned", "unrolled"))
    assert stacked.addresses() == unrolled.addresses()
    for address in stacked.addresses():
        assert np.array_equal(stacked.read(*address), unrolled.read(*address)), address


@every
def test_read_and_written_every_leaf_has_its_digest(name, tmp_path):
    contents = open_fixture(name)
    native = name.startswith("nnxnative")
    written = maxtext.write(
        tmp_path / "out",
        contents,
        layout=contents.format,
        scan_layers=contents.scan_layers,
        params_only=contents.optimizer is None,
        scan_axis=contents.scan_axis,
    )
    assert written.rewritten == written.left_out == {}
    arrays = OrbaxArrays(written.path / "items")
    for key, leaf in recorded(name).items():
        if native and "rngs" in key:
            continue
        key = as_a_run_writes_it(key) if native else key
        if leaf is None:
            assert not arrays.leaves[key].is_array
            continue
        found = arrays.read(key)
        if key != "step":
            assert (list(found.shape), found.dtype.name, digest(found)) == (
                leaf["shape"],
                leaf["dtype"],
                leaf["sha256"],
            )
        assert key != "step" or int(found) == int(contents.scalars["step"])


def as_a_run_writes_it(key: str) -> str:
    """A key of NNX state, which is only read, where the Linen layout has it."""
    parts = key.split("/")
    parts = parts[:-1] if parts[-1] == "value" else parts
    if parts[0] == "model":
        parts = ["params", "params", *parts[1:]]
    parts = parts[1:] if parts[0] == "optimizer" else parts
    for slot in ("mu", "nu"):
        if slot in parts:
            at = parts.index(slot) + 1
            parts = [*parts[:at], "params", *parts[at:]]
    return re.sub(r"decoder/layers/(\d+)/", r"decoder/layers_\1/", "/".join(parts))


@scanned_and_not
@every
def test_the_other_layout_and_back(name, scan_layers, tmp_path):
    contents = open_fixture(name)
    once = maxtext.write(tmp_path / "once", contents, scan_layers=scan_layers)
    again = maxtext.open(once.path)  # our own writer records the architecture
    assert (again.scan_layers, again.config) == (scan_layers, contents.config)
    back = maxtext.write(tmp_path / "back", again, scan_layers=contents.scan_layers, scan_axis=contents.scan_axis)
    assert once.rewritten == back.rewritten == {}
    arrays = OrbaxArrays(back.path / "items")
    digests = {digest(arrays.read(key)) for key in arrays.shapes}
    for tree in contents._sorted.trees.values():
        for key in tree.values():
            assert recorded(name)[key]["sha256"] in digests, key


@every
def test_refused_without_a_description(name):
    with pytest.raises(UserError) as caught:
        maxtext.open(FIXTURES[name])
    text = str(caught.value)
    assert "\n" not in text
    for unknown in ("norm_eps", "rope_theta", "activation", "soft caps", "max_seq_len", "the closest is"):
        assert unknown in text
    contents = open_fixture(name)
    assert f"vocab_size={contents.config.vocab_size}, embed_dim={contents.config.embed_dim}" in text
    assert f"mlp_dim={contents.config.mlp_dim}" in text


@pytest.mark.parametrize("name", ["axis0_scanned_025", "deepseek_nnx_scanned_025"])
def test_every_spelling_of_the_path(name):
    step = FIXTURES[name] / "checkpoints" / "1"
    config = FIXTURES[name] / "config_resolved.txt"
    for path in (FIXTURES[name], step.parent, step, step / "items"):
        for text in (path, str(path), f"{path}/", f"file://{path.absolute()}/"):
            contents = maxtext.open(text, config)
            assert (contents.scan_layers, len(contents.addresses())) == (True, len(open_fixture(name).addresses())), (
                text
            )
