# SPDX-License-Identifier: Apache-2.0
"""Models of other formats written as MaxText holds them: the same function, the same weights on the way back.

The source is a Hugging Face folder of every family (`families.py`), whose forward pass is checked against transformers
in `test_families.py`. What MaxText's settings cannot say is in the weights, so logits agree to the rounding of that.
"""

import functools

import jax
import numpy as np
import pytest
from golden import families
from tiny_families import FAMILIES
from tiny_models import tiny, weights

from maxkit.checkpoint import load
from maxkit.checkpoint.contents import Plain, TreeContents
from maxkit.errors import UserError
from maxkit.formats import maxtext
from maxkit.formats.huggingface import HuggingFaceReader
from maxkit.formats.restated import Restated, differences
from maxkit.models.config import AttentionTemperature, BlockSpec, Execution, RopeScaling
from maxkit.models.definition import ModelDefinition

# What is rewritten in the weights for MaxText, by case.
REWRITTEN = {
    "llama-linear": {"query scale"},
    "llama-yarn": {"query scale"},
    "mistral-full": {"query scale"},
    "qwen2-full": set(),
    "qwen3-full": set(),
    "qwen3-bias": set(),
    "qwen3_moe-all": set(),
    "gemma-mqa": {"query scale", "norm offset", "embedding scale"},
    "gemma-mha": {"query scale", "norm offset", "embedding scale"},
    "gemma3-remainder": {"query scale", "norm offset", "embedding scale"},
    "mixtral-full": {"query scale"},
    "deepseek_v2-lite": set(),
    "deepseek_v3-groups": set(),
    "deepseek_v3-kimi": set(),
    "gpt_oss-yarn": set(),
    "olmo3-remainder": set(),
    "olmo2-gqa": set(),
    "gpt2-tied": {"norm offset"},
    "gpt2-untied": {"norm offset"},
}
REFUSED = {
    "llama-dynamic": "rope_type='dynamic'",
    "mistral-window": "sliding_window=6 in layer 0",
    "gemma2-caps": "in pairs",
    "deepseek_v3-plain": "moe=",
    "olmo3-yarn": "rope_scaled=False",
    "qwen3_next-dense": "mlp='dense' in layer 0",
    "qwen2_moe-all": "has no MaxText form",
    "llama4-chunks": "attention_temperature=(floor_scale=4.0, coefficient=0.3)",
    "llama4-all": "num_experts_per_tok=2",
    "phi3-longrope": "rope_type='longrope'",
    "starcoder2-plain": "norm='layer'",
}
# Of the spread of the logits, and of a weight: every rewritten weight is rounded once in its own type.
LOGITS = {"float32": 2e-5, "bfloat16": 5e-3}
WEIGHTS = {"float32": 4e-7, "bfloat16": 2**-7}


@functools.lru_cache
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 48, (2, 20), dtype=np.int32)


def logits(contents) -> np.ndarray:
    definition = ModelDefinition(contents.config, Execution())
    params = load.read_params(contents, definition, None, report=[])
    return np.asarray(jax.jit(lambda params, ids: definition.merge(params)(ids)[0])(params, tokens()))


def check(source, folder, scan_layers, scan_axis, names) -> None:
    """Write, open, compute, and bring the weights back."""
    written = maxtext.write(folder / "out", source, scan_layers=scan_layers, scan_axis=scan_axis)
    assert {name for given in written.rewritten.values() for name in given} == names
    contents, told = (maxtext.open(folder / "out", config) for config in (None, folder / "out" / "maxtext.yml"))
    assert differences(contents.config, told.config) == []  # what we record, and what MaxText is told
    assert contents.addresses() == told.addresses()
    assert (contents.scan_layers, contents.scan_axis) == (scan_layers, scan_axis)
    assert contents.missing_keys() == contents.unused_keys() == []
    wanted, dtype = logits(source), source.dtype("embed/table").name
    assert np.abs(logits(contents) - wanted).max() < LOGITS[dtype] * np.ptp(wanted)
    back = Restated(contents, source.config)
    for path, layer in source.addresses():
        ours, theirs = source.read(path, layer), back.read(path, layer)
        if path in written.rewritten:  # there and back round once each; what lies near 0 beside an offset of 1
            ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
            np.testing.assert_allclose(theirs, ours, rtol=WEIGHTS[dtype], atol=1.2e-7)
        else:
            assert np.array_equal(ours, theirs), path


@pytest.mark.parametrize("name", REWRITTEN)
def test_hugging_face_to_maxtext(name, tmp_path):
    families.write_folder(tmp_path / "hf", name)
    source = Plain(HuggingFaceReader(tmp_path / "hf"))
    # Half of the cases scanned on axis 1, the others unrolled, as OLMo's must be: these are no whole cycles of layers.
    scan_layers = bool(len(name) % 2) and not name.startswith("olmo")
    check(source, tmp_path, scan_layers=scan_layers, scan_axis=1, names=REWRITTEN[name])


def test_layers_that_maxtext_would_leave_out_are_refused(tmp_path):
    families.write_folder(tmp_path / "hf", "olmo3-remainder")
    with pytest.raises(UserError, match="in cycles of 4, the model has 6: give scan_layers=false"):
        maxtext.write(tmp_path / "out", Plain(HuggingFaceReader(tmp_path / "hf")), scan_layers=True)


@pytest.mark.parametrize("name", REFUSED)
def test_what_maxtext_does_not_compute_is_refused_by_name(name, tmp_path):
    families.write_folder(tmp_path / "hf", name)
    with pytest.raises(UserError) as caught:
        maxtext.write(tmp_path / "out", Plain(HuggingFaceReader(tmp_path / "hf")))
    assert REFUSED[name] in str(caught.value)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


MOE, DELTA = BlockSpec(mlp="moe"), BlockSpec(mixer="gated_delta", mlp="moe")
OTHERS = {
    # Two cycles of three and a layer more, which are scanned in the three ways in which MaxText scans them.
    "qwen3_next": FAMILIES["qwen3_next"].model_copy(
        update={
            "family": "qwen3_next",
            "num_layers": 7,
            "pattern": (DELTA, DELTA, MOE),
            "moe": FAMILIES["qwen3_next"].moe.model_copy(update={"normalize_weights": True}),
        }
    ),
    # Every second layer is a mixture, every fourth does not turn.
    "llama4": FAMILIES["llama4"].model_copy(
        update={
            "family": "llama4",
            "num_layers": 8,
            "attention_temperature": AttentionTemperature(floor_scale=8192.0, coefficient=0.1),
            "pattern": (
                BlockSpec(chunk_size=4),
                BlockSpec(chunk_size=4, mlp="moe"),
                BlockSpec(chunk_size=4),
                BlockSpec(rope=False, mlp="moe"),
            ),
        }
    ),
    "gpt3": FAMILIES["gpt2"].model_copy(update={"family": "gpt2", "num_kv_heads": 4}),
    "olmo2": FAMILIES["olmo2"].model_copy(update={"family": "olmo2", "num_layers": 8}),
    "gemma2": tiny(
        family="gemma2",
        num_layers=4,
        norm_placement="both",
        norm_scale_offset=1.0,
        embedding_scale=16**0.5,
        attention_soft_cap=5.0,
        final_soft_cap=3.0,
        tie_embeddings=True,
        activation="gelu_tanh",
        pattern=(BlockSpec(sliding_window=3), BlockSpec()),
    ),
    "llama3.1": tiny(
        num_layers=2,
        rope_scaling=RopeScaling(
            kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
        ),
    ),
    "llama3.1 as MaxText has it": tiny(num_layers=2, rope_interleaved=True, attention_scale=1.0),
}


def test_llama3_scaling_is_written_in_the_code_of_maxtext():
    """Its four numbers are constants there, so that any others are refused."""
    scaling = OTHERS["llama3.1"].rope_scaling
    for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"):
        other = scaling.model_copy(update={name: 2 * getattr(scaling, name)})
        with pytest.raises(UserError, match=r"cannot compute a llama model with rope_scaling=\(kind='llama3', factor="):
            maxtext.maxtext_form(tiny(num_layers=2, rope_scaling=other))


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_weights_in_memory_to_maxtext(name, scan_layers, tmp_path):
    config = OTHERS[name]
    config = config.model_copy(update={"embedding_scale": config.embedding_scale and config.embed_dim**0.5})
    definition = ModelDefinition(config, Execution())
    params = {path: np.asarray(x) for path, x in definition.flat(weights(definition, 3)).items()}
    source = TreeContents(config, params, scan_layers=True)
    names = {
        "gemma2": {"query scale", "norm offset", "embedding scale"},
        "llama3.1": {"query scale", "rope order"},
        "llama3.1 as MaxText has it": set(),
        "gpt3": {"norm offset"},
    }.get(name, set())
    check(source, tmp_path, scan_layers=scan_layers, scan_axis=0 if scan_layers else 1, names=names)
    if name == "gemma2":
        tree = maxtext.open(tmp_path / "out")._sorted.trees["params"]
        layer = "decoder/layers/" if scan_layers else "decoder/layers_1/"
        assert {f"{layer}self_attention_local/query/kernel", f"{layer}mlp_global/wo/kernel"} <= set(tree)
