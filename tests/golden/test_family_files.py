# SPDX-License-Identifier: Apache-2.0
"""Files of the same weights in other spellings, with keys that are no weights, quantised, or damaged."""

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden.families import CASES, FIXTURES, weights, write_folder
from safetensors.numpy import save_file

from maxkit.checkpoint.load import load
from maxkit.errors import UserError
from maxkit.formats.huggingface import HuggingFaceReader, read_config
from maxkit.formats.tables import find_table

Tensors = dict[str, np.ndarray]


def write(folder: Path, name: str, tensors: Tensors, change: Callable[[dict], dict] = lambda raw: raw) -> Path:
    """A folder with the config of a case, changed, and these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((FIXTURES / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(raw)))
    return folder


def everything(folder: Path) -> dict[tuple[str, int | None], np.ndarray]:
    reader = HuggingFaceReader(folder)
    assert reader.missing_keys() == [] and reader.unused_keys() == []
    return {address: reader.read(*address) for address in reader.addresses()}


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for address, array in wanted.items():
        assert found[address].dtype == array.dtype and np.array_equal(found[address], array), address


def experts_in_two(tensors: Tensors, before: str, after: str, gate: str, up: str, down: str) -> Tensors:
    """The experts of each layer as `gate_up_proj` [E, 2 F, D] and `down_proj` [E, D, F]."""
    pattern = re.compile(rf"(.*layers\.\d+\.){re.escape(before)}experts\.(\d+)\.(\w+)\.weight")
    found, experts = {}, {}
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            found[key.replace(before, after)] = tensor
        else:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
    for layer, parts in experts.items():
        numbers = sorted({number for number, _ in parts})
        both = [np.concatenate([parts[n, gate], parts[n, up]]) for n in numbers]
        found[f"{layer}{after}experts.gate_up_proj"] = np.stack(both)
        found[f"{layer}{after}experts.down_proj"] = np.stack([parts[n, down] for n in numbers])
    return found


@pytest.mark.parametrize(
    ("name", "before", "after", "parts"),
    [
        ("qwen3_moe-mixed", "mlp.", "mlp.", ("gate_proj", "up_proj", "down_proj")),
        ("deepseek_v3-kimi", "mlp.", "mlp.", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral-full", "block_sparse_moe.", "block_sparse_moe.", ("w1", "w3", "w2")),
        ("mixtral-full", "block_sparse_moe.", "mlp.", ("w1", "w3", "w2")),
    ],
)
def test_experts_that_are_stored_together_are_the_same_model(tmp_path, name, before, after, parts):
    write_folder(tmp_path / "apart", name)
    together = experts_in_two(weights(name), before, after, *parts)
    assert len(together) < len(weights(name))
    assert_same(everything(write(tmp_path / "together", name, together)), everything(tmp_path / "apart"))


def test_gpt2_without_its_prefix_and_with_its_masks(tmp_path):
    write_folder(tmp_path / "new", "gpt2-tied")
    old = {key.removeprefix("transformer."): tensor for key, tensor in weights("gpt2-tied").items()}
    for layer in range(3):
        old[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))
        old[f"h.{layer}.attn.masked_bias"] = np.full((), -1e4, np.float32)
    old["lm_head.weight"] = old["wte.weight"].copy()
    folder = write(tmp_path / "old", "gpt2-tied", old)
    assert_same(everything(folder), everything(tmp_path / "new"))
    ignored = HuggingFaceReader(folder).ignored_keys()
    assert ignored["h.1.attn.bias"] == ignored["h.0.attn.masked_bias"] == "the causal mask"
    assert ignored["lm_head.weight"] == "the embedding table once more" and len(ignored) == 7
    report = load(folder).report
    assert "not read, the causal mask: h.0.attn.bias, h.0.attn.masked_bias, h.1.attn.bias and 3 more" in report


def test_a_head_that_contradicts_tied_embeddings_is_not_ignored(tmp_path):
    tensors = weights("qwen2-full")
    table = tensors["model.embed_tokens.weight"]
    for head in (table + np.float32(0.5), table[:-1], table.astype(ml_dtypes.bfloat16)):
        reader = HuggingFaceReader(
            write(tmp_path, "qwen2-full", tensors | {"lm_head.weight": np.ascontiguousarray(head)})
        )
        assert reader.unused_keys() == ["lm_head.weight"] and reader.ignored_keys() == {}
    with pytest.raises(UserError, match=r"not part of the model: lm_head\.weight"):
        load(tmp_path)


SPELLINGS = [("model.language_model.", ""), ("language_model.model.", "language_model.")]


@pytest.mark.parametrize(("body", "head"), SPELLINGS)
@pytest.mark.parametrize("name", ["gemma3-mixed", "llama4-chunks"])
def test_the_text_model_of_a_multimodal_folder(tmp_path, name, body, head):
    write_folder(tmp_path / "text", name)
    inside = {
        key.replace("model.", body, 1) if key.startswith("model.") else head + key: tensor
        for key, tensor in weights(name).items()
    }
    inside["vision_tower.embeddings.patch.weight"] = np.ones((2, 3), np.float32)

    def wrapped(raw: dict) -> dict:
        architecture, kind = ("Gemma3", "gemma3") if name.startswith("gemma3") else ("Llama4", "llama4")
        return {
            "architectures": [f"{architecture}ForConditionalGeneration"],
            "model_type": kind,
            "text_config": raw,
            "vision_config": {"hidden_size": 8},
            "tie_word_embeddings": raw["tie_word_embeddings"],
        }

    folder = write(tmp_path / "all", name, inside, wrapped)
    assert_same(everything(folder), everything(tmp_path / "text"))
    assert HuggingFaceReader(folder).config == HuggingFaceReader(tmp_path / "text").config
    assert HuggingFaceReader(folder).ignored_keys() == {
        "vision_tower.embeddings.patch.weight": "not part of the text model"
    }


@pytest.mark.parametrize(
    ("name", "key", "reason"),
    [
        ("llama-yarn", "model.layers.0.self_attn.rotary_emb.inv_freq", "rope_theta"),
        ("deepseek_v3-groups", "model.layers.3.eh_proj.weight", "further tokens"),
        ("deepseek_v3-groups", "model.layers.3.mlp.experts.0.up_proj.weight", "further tokens"),
        ("qwen3_next-dense", "mtp.layers.0.input_layernorm.weight", "further tokens"),
        ("llama-yarn", "model.layers.3.mlp.up_proj.weight", None),
        ("deepseek_v3-groups", "model.layers.2.eh_proj.weight", None),
        ("llama-yarn", "mtp.norm.weight", None),
        ("llama-yarn", "vision_tower.weight", None),
        ("llama-yarn", "model.layers.0.attn.bias", None),
    ],
)
def test_every_other_key_is_ignored_for_a_reason_or_named(tmp_path, name, key, reason):
    reader = HuggingFaceReader(write(tmp_path, name, weights(name) | {key: np.zeros(3, np.float32)}))
    assert reader.unused_keys() == ([] if reason else [key])
    assert list(reader.ignored_keys()) == ([key] if reason else [])
    if reason:
        assert reason in reader.ignored_keys()[key]


# --- quantised ---------------------------------------------------------------------------------


def e2m1(code: int) -> float:
    """A 4-bit float by its bits: sign, two of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def small_gpt_oss(raw: dict) -> dict:
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return raw | {"hidden_size": 64, "intermediate_size": 32, "quantization_config": quantized}


def test_gpt_oss_with_experts_in_mxfp4(tmp_path):
    rng = np.random.default_rng(0)
    raw = small_gpt_oss(json.loads((FIXTURES / "gpt_oss-yarn" / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    table = find_table(read_config(tmp_path / "config.json"), "hf")
    plain, packed = {}, {}
    for key, shape in table.shapes().items():
        value = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        if key.endswith(("gate_up_proj", "down_proj")):
            rows = (shape[0], shape[2], shape[1] // 32)  # blocks lie along what a row sums over
            codes = rng.integers(0, 16, (*rows, 32))
            scales = rng.integers(110, 140, rows, dtype=np.uint8)
            values = np.vectorize(e2m1)(codes) * 2.0 ** (scales[..., None].astype(int) - 127)
            value = values.reshape(shape[0], shape[2], shape[1]).swapaxes(1, 2).astype(ml_dtypes.bfloat16)
            packed[key + "_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
            packed[key + "_scales"] = scales
        else:
            packed[key] = value
        plain[key] = np.ascontiguousarray(value)
    write(tmp_path / "plain", "gpt_oss-yarn", plain, small_gpt_oss)
    write(tmp_path / "packed", "gpt_oss-yarn", packed, small_gpt_oss)
    assert_same(everything(tmp_path / "packed"), everything(tmp_path / "plain"))
    reader = HuggingFaceReader(tmp_path / "packed")
    assert reader.dtypes == {"bfloat16": len(plain) - 8, "mxfp4": 8} and reader.ignored_keys() == {}
    assert load(tmp_path / "packed").params["embed"]["table"].dtype == "bfloat16"
    key = "model.layers.0.mlp.experts.down_proj_scales"
    write(tmp_path / "bad", "gpt_oss-yarn", packed | {key: packed[key][:, :1].copy()}, small_gpt_oss)
    with pytest.raises(UserError, match=r"down_proj_blocks' of shape .* does not fit its scales"):
        HuggingFaceReader(tmp_path / "bad")


def test_deepseek_in_blocks_of_fp8(tmp_path):
    rng = np.random.default_rng(1)

    def wide(raw: dict) -> dict:
        quantized = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        return raw | {"hidden_size": 200, "intermediate_size": 130, "quantization_config": quantized}

    (tmp_path / "config.json").write_text(
        json.dumps(wide(json.loads((FIXTURES / "deepseek_v3-groups" / "config.json").read_text())))
    )
    tensors, wanted = {}, {}
    for key, shape in find_table(read_config(tmp_path / "config.json"), "hf").shapes().items():
        value = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        wanted[key] = value.astype(np.float32)
        if re.search(r"_proj(_with_mqa)?\.weight", key):
            value = value.astype(ml_dtypes.float8_e4m3fn)
            scales = rng.uniform(0.01, 2, [-(-size // 128) for size in shape]).astype(np.float32)
            tensors[key + "_scale_inv"] = scales
            factors = np.kron(scales, np.ones((128, 128), np.float32))[: shape[0], : shape[1]]
            wanted[key] = value.astype(np.float32) * factors
        tensors[key] = value
    write(tmp_path / "plain", "deepseek_v3-groups", wanted, wide)
    folder = tmp_path / "fp8"
    folder.mkdir()
    write_raw(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text((tmp_path / "config.json").read_text())
    found, plain = everything(folder), everything(tmp_path / "plain")
    assert found.keys() == plain.keys()
    for address, array in plain.items():
        assert np.array_equal(found[address].astype(np.float32), array), address
    assert HuggingFaceReader(folder).dtypes["float8_e4m3"] > 60
    assert load(folder, dtype="bfloat16").params["embed"]["table"].dtype == "bfloat16"
    scale = next(key for key in tensors if key.endswith("_scale_inv"))
    write_raw(folder / "model.safetensors", {key: value for key, value in tensors.items() if key != scale})
    with pytest.raises(UserError, match="is stored as F8_E4M3"):
        everything(folder)


def write_raw(path: Path, tensors: Tensors) -> None:
    """A safetensors file by hand: the package's numpy half does not write 8-bit floats."""
    names = {"float8_e4m3fn": "F8_E4M3", "float32": "F32", "bfloat16": "BF16"}
    header, body = {}, b""
    for key, value in tensors.items():
        place = [len(body), len(body) + value.nbytes]
        header[key] = {"dtype": names[value.dtype.name], "shape": value.shape, "data_offsets": place}
        body += np.ascontiguousarray(value).tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


# --- bad and big -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "qwen3_moe-all",
            {"num_experts": 2**30, "num_local_experts": 2**30},
            "1073741824 experts for|experts in all layers",
        ),
        ("qwen3_moe-all", {"num_experts": 36, "num_local_experts": 36}, "config.json says"),
        ("deepseek_v3-groups", {"n_routed_experts": 2**30}, "1073741824 experts for|experts in all layers"),
        ("gemma3-mixed", {"num_hidden_layers": 2**30, "layer_types": None}, "layers"),
        ("gpt2-tied", {"n_positions": 2**60}, "n_positions"),
        ("gpt2-tied", {"n_inner": 99}, "config.json says"),
        ("phi3-window", {"num_key_value_heads": 3}, "config.json says"),
        ("deepseek_v3-kimi", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (
            "deepseek_v3-kimi",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "quantization_config",
        ),
    ],
)
def test_configs_that_do_not_fit_the_tensors_are_refused(tmp_path, name, change, words):
    folder = write(tmp_path, name, weights(name), lambda raw: raw | change)
    tracemalloc.start()
    with pytest.raises(UserError, match=words):
        HuggingFaceReader(folder)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_experts_are_read_one_by_one(tmp_path):
    shapes = {
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_experts": 64,
        "num_local_experts": 64,
        "num_hidden_layers": 1,
    }

    def wide(raw: dict) -> dict:
        return raw | shapes | {"layer_types": None}

    (tmp_path / "config.json").write_text(
        json.dumps(wide(json.loads((FIXTURES / "qwen3_moe-all" / "config.json").read_text())))
    )
    keys = find_table(read_config(tmp_path / "config.json"), "hf").shapes()
    folder = write(tmp_path / "m", "qwen3_moe-all", {key: np.zeros(s, np.float32) for key, s in keys.items()}, wide)
    reader = HuggingFaceReader(folder)
    tracemalloc.start()
    stack = reader.read("layers/mlp/experts/gate/kernel", 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stack.shape == (64, 256, 128) and peak < stack.nbytes + 4 * stack[0].nbytes


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(("kimi", "chunks"))])
def test_damaged_folders_of_experts_are_refused_or_read_never_worse(tmp_path, name):
    write_folder(tmp_path, name)
    rng, refused, file = np.random.default_rng(3), 0, tmp_path / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for number in range(100):
        data = bytearray(whole)
        if number % 3 == 0:
            data = data[: rng.integers(len(data))]
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(min(header, len(data)))] = rng.integers(256)
        file.write_bytes(data)
        try:
            reader = HuggingFaceReader(tmp_path)
            for address in reader.addresses():
                assert reader.read(*address).size
            refused += bool(reader.missing_keys())
        except UserError:
            refused += 1
    assert refused > 60
