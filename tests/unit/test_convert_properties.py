# SPDX-License-Identifier: Apache-2.0
"""Conversion of any model: random groups of layers, optimizers, adapters, types and bits; and how much memory it takes.

Sources are written by the converter itself from arrays of numpy, so that what comes back is compared with numpy's
bytes and not with what some checkpoint said.
"""

import importlib.util
import tempfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_models import tiny

from maxkit.checkpoint import arrays
from maxkit.checkpoint.compare import compare, compare_contents
from maxkit.checkpoint.contents import OPTIMIZER_PLACES, StoreContents
from maxkit.checkpoint.conversion_plan import make_plan
from maxkit.checkpoint.convert import convert, write
from maxkit.formats.contents import WEIGHTS
from maxkit.models.config import BlockSpec, MoeConfig
from maxkit.models.definition import ModelDefinition
from maxkit.models.lora import LoraConfig

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "convert.py"
BLOCKS = {"local": BlockSpec(sliding_window=3), "global": BlockSpec(), "experts": BlockSpec(mlp="moe")}
MOE = MoeConfig(num_experts=3, experts_per_token=1, mlp_dim=4, shared_mlp_dim=4)


class Drawn:
    """A checkpoint (`formats/contents.py`) of random bits: NaNs, infinities and subnormal numbers among them."""

    format, scan_layers, facts = "drawn", None, {}

    def __init__(self, config, kind, lora, dtype):
        self.config, self.optimizer, self.lora = config, kind, lora
        self.slots = (WEIGHTS, *OPTIMIZER_PLACES[kind].slots)
        self.scalars = {"step": np.asarray(5, np.int32), "count": np.asarray(5, np.int32)}
        self.values = {}
        for parameter in ModelDefinition(config, None, lora).parameters.values():
            trained = lora is None or parameter.trainable_adapter
            for slot in self.slots if trained else self.slots[:1]:
                for layer in parameter.layers or (None,):
                    draw = np.random.default_rng(zlib.crc32(f"{slot} {parameter.address} {layer}".encode()))
                    kept = np.dtype(dtype if slot == WEIGHTS else np.float32)
                    bits = draw.bytes(int(np.prod(parameter.layer_shape)) * kept.itemsize)
                    tensor = np.frombuffer(bits, kept).reshape(parameter.layer_shape)
                    self.values[slot, parameter.address, layer] = tensor

    def tokenizer(self):
        return None

    def addresses(self, slot=WEIGHTS):
        return [(path, layer) for there, path, layer in self.values if there == slot]

    def shape(self, path, layer=None, slot=WEIGHTS):
        return self.values[slot, path, layer].shape

    def dtype(self, path, layer=None, slot=WEIGHTS):
        return self.values[slot, path, layer].dtype

    def read(self, path, layer=None, slot=WEIGHTS):
        return self.values[slot, path, layer]

    def missing_keys(self):
        return []

    def unused_keys(self):
        return []

    def ignored_keys(self):
        return {}


@st.composite
def checkpoints(draw):
    names = st.sampled_from(sorted(BLOCKS))
    lead, pattern = draw(st.lists(names, max_size=2)), draw(st.lists(names, min_size=1, max_size=3))
    config = tiny(
        vocab_size=6,
        num_layers=len(lead) + draw(st.integers(1, 7)),  # whole repeats of the pattern and a remainder
        leading_blocks=[BLOCKS[name] for name in lead],
        pattern=[BLOCKS[name] for name in pattern],
        moe=MOE if "experts" in lead + pattern else None,
        tie_embeddings=draw(st.booleans()),
    )
    lora = draw(st.sampled_from([None, LoraConfig(rank=2, targets=("query", "down"))]))
    kind, dtype = draw(st.sampled_from(sorted(OPTIMIZER_PLACES))), draw(st.sampled_from(["float32", "bfloat16"]))
    return Drawn(config, kind, lora, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)


def opened(path):
    return StoreContents(path / "checkpoints" / "5")


def same_bytes(contents, drawn):
    """Every tensor, of every slot, in whatever leaf and row it is."""
    assert set(contents.slots) >= set(drawn.slots)
    for slot in drawn.slots:
        assert set(contents.addresses(slot)) == set(drawn.addresses(slot))
    for (slot, path, layer), value in drawn.values.items():
        found = contents.read(path, layer, slot)
        assert found.dtype == value.dtype and found.tobytes() == value.tobytes(), (slot, path, layer)


# Without shrinking, which takes minutes: a failing example is small already.
@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(checkpoints(), st.booleans(), st.sampled_from([40, 1 << 20]), st.data())
def test_there_and_back_is_the_identity_for_any_model(drawn, scan, chunk_bytes, data):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "_CHUNK_BYTES", chunk_bytes)
        folder = Path(name)
        first, other = (
            write(drawn, make_plan(drawn, "maxkit", "memory", scan_layers=layout), folder / f"from memory {layout}")
            for layout in (scan, not scan)
        )
        there = convert(first.path, folder / "there", to="maxkit", scan_layers=not scan)
        back = convert(there.path, folder / "back", to="maxkit", scan_layers=scan)
        for done in (first, there, back):
            same_bytes(opened(done.path), drawn)
        assert opened(there.path).manifest.leaves == opened(other.path).manifest.leaves
        assert opened(back.path).manifest.model_copy(update={"parent": None}) == opened(first.path).manifest.model_copy(
            update={"parent": None}
        )
        assert compare(first.path, there.path, values=True, only="all", atol=0, rtol=0).equal
        agrees_with_numpy(opened(there.path), drawn, data)


def agrees_with_numpy(contents, drawn, data):
    """One tensor made different in some places: named with the difference that numpy finds."""
    key = data.draw(st.sampled_from(sorted(drawn.values, key=str)))
    with np.errstate(invalid="ignore"):
        value = np.nan_to_num(drawn.values[key].astype(np.float64), posinf=1.0, neginf=1.0) % 1
    changed = (value + np.where(np.arange(value.size).reshape(value.shape) % 3 == 2, 0.5, 0)).astype(np.float32)
    drawn.values[key] = changed
    with np.errstate(invalid="ignore"):
        old, new = (x.astype(np.float64) for x in (contents.read(key[1], key[2], key[0]), changed))
    found = compare_contents(contents, drawn, values=True, only="all", atol=0.25, rtol=0.125)
    outside = ~np.isclose(old, new, atol=0.25, rtol=0.125, equal_nan=True)
    assert len(found.differences) == int(outside.any())
    if outside.any():
        (difference,) = found.differences
        with np.errstate(invalid="ignore", over="ignore"):
            gaps = np.where(outside, np.nan_to_num(np.abs(old - new), nan=np.inf, posinf=np.inf), -1.0)
        assert (difference.slot, difference.path, difference.layer) == key
        assert (difference.absolute, difference.count) == (gaps.max(), outside.sum())
        assert gaps[difference.index] == gaps.max()


def test_memory_is_about_twice_the_largest_tensor(tmp_path):
    """173 MB with stacks of 39 MB, of tensors up to 5 MB: a converter that read whole stacks would exceed the limit."""
    description = importlib.util.spec_from_file_location("benchmark_of_convert", BENCHMARK)
    benchmark = importlib.util.module_from_spec(description)
    description.loader.exec_module(benchmark)
    stack, tensor = benchmark.make(tmp_path / "run", layers=24, embed=384, optimizer="sgd")
    limit = 2 * tensor + benchmark.BUFFERS
    assert 2 * stack > limit
    for to, *options in (("maxkit", "--scan-layers", "false"), ("hf",), ("maxtext-linen",)):
        done = benchmark.run(tmp_path / "run", tmp_path / to, "--to", to, *options)
        assert done["code"] == 0 and done["peak"] - done["before"] < limit, (to, done)
