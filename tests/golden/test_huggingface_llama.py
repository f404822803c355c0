# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: files that transformers wrote (`make_llama_tiny.py`), ours, and damaged ones."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoConfig, LlamaConfig

from maxkit.errors import UserError
from maxkit.formats.huggingface import HuggingFaceReader, config_json, read_config, write_huggingface
from maxkit.models.config import ModelConfig

FIXTURES = Path(__file__).parent.parent / "fixtures"
MODELS = ["llama_tiny_full", "llama_tiny_tied"]


def foreign_tensors(folder: Path) -> dict[str, np.ndarray]:
    """What the safetensors package reads, bfloat16 by its bits."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
        header.pop("__metadata__", None)
        begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        with safe_open(path, framework="numpy") as file:
            for key, entry in header.items():
                if entry["dtype"] == "BF16":
                    first, last = entry["data_offsets"]
                    bits = np.frombuffer(path.read_bytes()[begin + first : begin + last], np.uint16)
                    found[key] = (bits.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
                else:
                    found[key] = file.get_tensor(key)
    return found


def leaves(reader):
    return ((path, layer, reader.read(path, layer)) for path, layer in reader.addresses())


def wanted_leaf(tensors: dict[str, np.ndarray], config: ModelConfig, path: str, layer: int | None) -> np.ndarray:
    """The canonical tensor, by hand and not by the table."""
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    fixed = {
        "embed/table": "model.embed_tokens",
        "final_norm/scale": "model.norm",
        "output/kernel": "lm_head",
    }
    if layer is None:
        return tensors[f"{fixed[path]}.weight"]
    part = path.removeprefix("layers/").rsplit("/", 1)[0]
    names = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention": "self_attn",
    }
    names |= {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    names |= {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    kind = "bias" if path.endswith("bias") else "weight"
    key = ".".join(names.get(word, word) for word in part.split("/"))
    tensor = tensors[f"model.layers.{layer}.{key}.{kind}"]
    heads = {"attention/query": N, "attention/key": K, "attention/value": K}.get(part)
    if heads:
        return tensor.T.reshape(D, heads, H) if kind == "weight" else tensor.reshape(heads, H)
    if part == "attention/out" and kind == "weight":
        return tensor.T.reshape(N, H, D)
    return tensor.T


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_equals_what_transformers_wrote(name):
    reader, tensors = HuggingFaceReader(FIXTURES / name), foreign_tensors(FIXTURES / name)
    assert len(reader.addresses()) == len(tensors) and reader.unused_keys() == []
    for path, layer in reader.addresses():
        found, wanted = reader.read(path, layer), wanted_leaf(tensors, reader.config, path, layer)
        assert found.shape == reader.shape(path, layer) and found.flags.owndata
        assert np.array_equal(found.astype(np.float32), wanted), (path, layer)
    assert reader.tokenizer() is None


def test_configs_and_dtypes():
    full, tied = (HuggingFaceReader(FIXTURES / name) for name in MODELS)
    assert full.dtypes == {"float32": 51} and tied.dtypes == {"bfloat16": 29}
    assert tied.read("embed/table").dtype.name == "bfloat16"
    assert (full.config.embed_dim, full.config.num_heads, full.config.head_dim) == (24, 4, 8)
    assert full.config.attention_bias and full.config.attention_out_bias and full.config.mlp_bias
    assert not full.config.tie_embeddings and tied.config.tie_embeddings
    scaling = full.config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_max_seq_len) == ("llama3", 8.0, 16)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 15_000])
def test_written_folder_equals_the_one_read(tmp_path, name, shard_bytes):
    source = HuggingFaceReader(FIXTURES / name)
    given = list(leaves(source))[::-1]  # any order will do
    write_huggingface(tmp_path / "out", source.config, given, None, None, shard_bytes=shard_bytes)
    found, wanted = foreign_tensors(tmp_path / "out"), foreign_tensors(FIXTURES / name)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key], wanted[key]) for key in wanted)
    assert HuggingFaceReader(tmp_path / "out").config == source.config
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes > 10**6)
    assert all(file.stat().st_size < shard_bytes + 5000 for file in files)
    ours, theirs = AutoConfig.from_pretrained(tmp_path / "out"), AutoConfig.from_pretrained(FIXTURES / name)
    for key in (
        "rope_parameters",
        "head_dim",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "rms_norm_eps",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key


def test_a_cast_is_made_only_when_asked_for(tmp_path):
    source = HuggingFaceReader(FIXTURES / "llama_tiny_full")
    write_huggingface(tmp_path / "half", source.config, leaves(source), None, "bfloat16")
    assert HuggingFaceReader(tmp_path / "half").dtypes == {"bfloat16": 51}
    mixed = ((p, i, a.astype(np.float16) if i == 1 else a) for p, i, a in leaves(source))
    with pytest.raises(UserError, match="give a dtype"):
        write_huggingface(tmp_path / "mixed", source.config, mixed, None, None)
    with pytest.raises(UserError, match="dtype='int8'"):
        write_huggingface(tmp_path / "mixed", source.config, leaves(source), None, "int8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[1:], "1 tensors of the model were not given: embed/table"),
        (lambda rows: [*rows, rows[3]], "was given twice"),
        (lambda rows: [(rows[0][0], None, rows[0][2].T), *rows[1:]], "has shape"),
        (lambda rows: [("embed/tables", None, rows[0][2]), *rows[1:]], "did you mean 'embed/table'"),
        (lambda rows: [(rows[-1][0], 9, rows[-1][2]), *rows], "layer 9 is outside the model"),
    ],
)
def test_wrong_leaves_are_refused_and_nothing_is_left(tmp_path, change, words):
    source = HuggingFaceReader(FIXTURES / "llama_tiny_full")
    with pytest.raises(UserError, match=words):
        write_huggingface(tmp_path, source.config, change(list(leaves(source))), None, "float32")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_model_is_not_overwritten(tmp_path):
    source = HuggingFaceReader(FIXTURES / "llama_tiny_tied")
    write_huggingface(tmp_path, source.config, leaves(source), None, None)
    with pytest.raises(UserError, match="already holds a model"):
        write_huggingface(tmp_path, source.config, leaves(source), None, None)


ROPES = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0,
     "attention_factor": 1.25, "truncate": False},
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rope_scaling_in_old_and_new_spelling(tmp_path, rope):
    base = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}
    old = base | {"rope_theta": 5e5, "rope_scaling": rope}
    new = base | {"rope_parameters": rope | {"rope_theta": 5e5}}
    legacy = base | {"rope_theta": 5e5, "rope_scaling": {"type": rope["rope_type"], **rope}}
    legacy["rope_scaling"].pop("rope_type")
    configs = []
    for raw in (old, new, legacy):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        configs.append(read_config(tmp_path / "config.json"))
    assert configs[0] == configs[1] == configs[2] and configs[0].rope_theta == 5e5
    (tmp_path / "config.json").write_text(json.dumps(config_json(configs[0], None, "float32")))
    assert read_config(tmp_path / "config.json") == configs[0]
    theirs = LlamaConfig.from_pretrained(tmp_path).rope_parameters
    assert {key: theirs[key] for key in rope} == rope and theirs["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported: .*LlamaForCausalLM"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu_fast"}, "hidden_act='gelu_fast'"),
        ({"rope_scaling": {"rope_type": "longrop"}}, "rope_scaling.rope_type='longrop'.*did you mean 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "fctor": 1}}, "rope_scaling.fctor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3' must be a positive int"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"num_hidden_layers": 1000}, "1000 layers for 51 tensors"),
        ({"intermediate_size": 41}, "config.json says"),
    ],
)
def test_configs_that_cannot_be_read_are_refused_by_name(tmp_path, change, words):
    shutil.copytree(FIXTURES / "llama_tiny_full", tmp_path / "m")
    raw = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(raw | change))
    with pytest.raises(UserError, match=words):
        HuggingFaceReader(tmp_path / "m")


def test_missing_tensors_are_named(tmp_path):
    shutil.copytree(FIXTURES / "llama_tiny_full", tmp_path / "m")
    raw = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(raw | {"num_hidden_layers": 4}))
    reader = HuggingFaceReader(tmp_path / "m")
    assert "model.layers.3.input_layernorm.weight" in reader.missing_keys()
    assert ("layers/attention_norm/scale", 3) not in reader.addresses()
    with pytest.raises(UserError, match="'model.layers.3.input_layernorm.weight' is missing"):
        reader.read("layers/attention_norm/scale", 3)


def test_extra_tensors_are_named_and_missing_files_refused(tmp_path):
    shutil.copytree(FIXTURES / "llama_tiny_full", tmp_path / "m")
    raw = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    assert HuggingFaceReader(tmp_path / "m").unused_keys() == ["lm_head.weight"]
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        HuggingFaceReader(tmp_path / "m")
    shutil.copytree(FIXTURES / "llama_tiny_tied", tmp_path / "s")
    index = tmp_path / "s/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../m/model.safetensors"}}))
    with pytest.raises(UserError, match="is not the name of a safetensors file"):
        HuggingFaceReader(tmp_path / "s")
    index.write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(UserError, match="gone.safetensors: cannot be read"):
        HuggingFaceReader(tmp_path / "s")


def test_damaged_folders_are_refused_or_read_never_worse(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(FIXTURES / "llama_tiny_full", folder)
    rng, refused = np.random.default_rng(5), 0
    whole = {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}
    header = 8 + int.from_bytes(whole["model.safetensors"][:8], "little")
    tracemalloc.start()
    for number in range(300):
        name = ("model.safetensors", "config.json")[number % 2]
        data = bytearray(whole[name])
        if number % 6 < 2:
            data = data[: rng.integers(len(data))]
        else:
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(min(header, len(data)))] = rng.integers(256)
        (folder / name).write_bytes(data)
        try:
            for leaf in leaves(HuggingFaceReader(folder)):
                assert leaf[2].size
        except UserError:
            refused += 1
        (folder / name).write_bytes(whole[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 200 and peak < 30e6


def test_a_missing_layer_is_filled_and_the_others_are_kept(tmp_path):
    from maxkit.checkpoint.load import load

    shutil.copytree(FIXTURES / "llama_tiny_full", tmp_path / "m")
    raw = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(raw | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match="model.layers.3.input_layernorm.weight"):
        load(tmp_path / "m")
    filled = load(tmp_path / "m", missing="warn", scan_layers=True)
    kernel = np.asarray(filled.params["layers"]["block_0"]["mlp"]["gate"]["kernel"])
    whole = np.asarray(load(FIXTURES / "llama_tiny_full").params["layers"]["block_0"]["mlp"]["gate"]["kernel"])
    assert (kernel[:3] == whole).all() and not kernel[3].any()
