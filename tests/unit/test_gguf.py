# SPDX-License-Identifier: Apache-2.0
"""The GGUF reader against the `gguf` package: its writer, its dequantisation, and files that were damaged."""

import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from maxkit.errors import UserError
from maxkit.formats.gguf import GGUFFile, GGUFReader

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
V, D, F, N, K, H, L = 64, 32, 64, 4, 2, 8, 2


def write_model(path: Path, extra=lambda writer: None, tensors: dict | None = None, **numbers: int) -> dict:
    """A tiny llama file; returns the matrices in Hugging Face orientation, before llama.cpp's row order."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(numbers.get("block_count", L))
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    extra(writer)
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,), "output.weight": (V, D)}
    for i in range(L):
        block = {"attn_norm": (D,), "attn_q": (N * H, D), "attn_k": (K * H, D), "attn_v": (K * H, D)}
        block |= {"attn_output": (D, N * H), "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D)}
        block |= {"ffn_down": (D, F)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    matrices = {}
    for name, shape in (tensors or shapes).items():
        matrices[name] = rng.normal(size=shape).astype(np.float32)
        stored = matrices[name]
        heads = N if "attn_q." in name else K if "attn_k." in name else 0
        if heads:  # as llama.cpp's converter does it
            stored = stored.reshape(heads, 2, H // 2, D).swapaxes(1, 2).reshape(shape)
        writer.add_tensor(name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|a|>", "x", "y", "xy"] + [f"t{i}" for i in range(V - 4)])
    writer.add_token_types([3] + [1] * (V - 1))
    writer.add_token_merges(["x y"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")


@pytest.mark.parametrize("type_name", TYPES)
def test_dequantised_tensors_equal_the_gguf_package(tmp_path, type_name):
    path, kind = tmp_path / "t.gguf", gguf.GGMLQuantizationType[type_name]
    values = np.random.default_rng(1).normal(size=(6, 4, 96)).astype(np.float32)
    raw = gguf.quants.quantize(values, kind)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    found, wanted = file.read("t"), gguf.quants.dequantize(raw, kind)
    assert file.tensors["t"].type == type_name
    assert found.shape == values.shape and found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))


def test_metadata_of_every_type(tmp_path):
    def extra(writer):
        for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
            getattr(writer, f"add_{kind}")(f"x.{kind}", 7)
        writer.add_float32("x.float32", 0.5)
        writer.add_float64("x.float64", 0.25)
        writer.add_bool("x.bool", True)
        writer.add_array("x.strings", ["a", "\u00e9", ""])
        writer.add_array("x.numbers", [1, 2, 3])
        writer.add_array("x.nested", [[1, 2], [3, 4]])

    write_model(tmp_path / "m.gguf", extra)
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert [metadata[f"x.{k}"] for k in ("uint8", "int64", "float32", "float64", "bool")] == [
        7,
        7,
        0.5,
        0.25,
        True,
    ]
    assert metadata["x.strings"] == ["a", "\u00e9", ""]
    assert metadata["x.numbers"].tolist() == [1, 2, 3]
    assert [row.tolist() for row in metadata["x.nested"]] == [[1, 2], [3, 4]]


def test_a_model_in_canonical_orientation(tmp_path):
    matrices = write_model(tmp_path / "m.gguf", add_tokenizer)
    reader = GGUFReader(tmp_path / "m.gguf")
    assert (reader.config.num_heads, reader.config.num_kv_heads, reader.config.head_dim) == (N, K, H)
    assert reader.config.norm_eps == 1e-5 and not reader.config.tie_embeddings and reader.unused_keys() == []
    assert reader.dtypes == {"F32": len(matrices)}
    x = np.random.default_rng(0).normal(size=(3, D)).astype(np.float32)
    for name, heads, path in (("attn_q", N, "query"), ("attn_k", K, "key"), ("attn_v", K, "value")):
        kernel = reader.read(f"layers/attention/{path}/kernel", 1)
        assert kernel.shape == reader.shape(f"layers/attention/{path}/kernel", 1) == (D, heads, H)
        wanted = (x @ matrices[f"blk.1.{name}.weight"].T).reshape(3, heads, H)
        np.testing.assert_allclose(np.einsum("TD,DNH->TNH", x, kernel), wanted, rtol=1e-4, atol=1e-4)
    out = reader.read("layers/attention/out/kernel", 0)
    assert np.array_equal(out, matrices["blk.0.attn_output.weight"].T.reshape(N, H, D))
    assert np.array_equal(reader.read("layers/mlp/down/kernel", 0), matrices["blk.0.ffn_down.weight"].T)
    assert np.array_equal(reader.read("output/kernel"), matrices["output.weight"])
    assert len(reader.addresses()) == len(matrices)
    tokenizer = reader.tokenizer()
    assert tokenizer.encode("<|a|>xyx") == [0, 3, 1] and tokenizer.chat_template == "{{ messages }}"


def test_rope_scalings(tmp_path):
    def linear(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)

    write_model(tmp_path / "m.gguf", linear)
    scaling = GGUFReader(tmp_path / "m.gguf").config.rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 2.5)

    strange = np.full(H // 2, 3.0, np.float32)
    write_model(tmp_path / "m.gguf", lambda writer: writer.add_tensor("rope_freqs.weight", strange))
    with pytest.raises(UserError, match="rope_freqs.weight"):
        GGUFReader(tmp_path / "m.gguf")


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path):
    def extra(writer):
        writer.add_rope_freq_base(500000.0)
        plain = 1 / 500000.0 ** (np.arange(0, H, 2) / H)
        ramp = np.clip((8192 / (2 * np.pi / plain) - 1) / 3, 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - ramp) / 32 + ramp)).astype(np.float32))

    write_model(tmp_path / "m.gguf", extra)
    reader = GGUFReader(tmp_path / "m.gguf")
    assert reader.config.rope_scaling.kind == "llama3" and reader.config.rope_scaling.factor == 32.0
    assert reader.unused_keys() == []


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (lambda w: w.add_expert_count(8), "llama.expert_count"),
        (lambda w: w.add_rope_dimension_count(4), "llama.rope.dimension_count"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "llama.rope.scaling.type"),
    ],
)
def test_metadata_that_changes_the_maths_is_refused_by_name(tmp_path, extra, words):
    write_model(tmp_path / "m.gguf", extra)
    with pytest.raises(UserError, match=words):
        GGUFReader(tmp_path / "m.gguf")


def test_unsupported_quantisation_and_missing_tensor_are_named(tmp_path):
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", np.zeros((1, 210), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="'t' is stored as Q6_K"):
        GGUFFile(path).read("t")
    write_model(path, tensors={"token_embd.weight": (V, D), "output_norm.weight": (D,)}, block_count=1)
    assert "blk.0.attn_norm.weight" in GGUFReader(path).missing_keys()
    with pytest.raises(UserError, match="'blk.0.attn_norm.weight' is missing"):
        GGUFReader(path).read("layers/attention_norm/scale", 0)


def test_huge_counts_are_refused_without_allocating(tmp_path):
    path = tmp_path / "m.gguf"
    write_model(path, add_tokenizer)
    data = bytearray(path.read_bytes())
    for place in (8, 16):  # the numbers of tensors and of metadata keys
        broken = data.copy()
        broken[place : place + 8] = (2**60).to_bytes(8, "little")
        path.write_bytes(broken)
        with pytest.raises(UserError, match="cannot fit"):
            GGUFFile(path)
    for content in (b"", b"GGUF", b"PK\3\4" + bytes(100), b"GGUF" + bytes(3) + b"\3" + bytes(16)):
        path.write_bytes(content)
        with pytest.raises(UserError):
            GGUFFile(path)
    with pytest.raises(UserError, match="cannot be read"):
        GGUFFile(tmp_path / "none.gguf")


def test_damaged_files_are_refused_or_read_never_worse(tmp_path):
    path = tmp_path / "m.gguf"
    write_model(path, add_tokenizer)
    whole = path.read_bytes()
    begin = min(info.start for info in GGUFFile(path).tensors.values())
    rng, refused = np.random.default_rng(11), 0
    tracemalloc.start()
    for number in range(300):
        data = bytearray(whole)
        if number % 3 == 0:
            data = data[: rng.integers(len(data))]
        else:
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(begin)] = rng.integers(256)
        path.write_bytes(data)
        try:
            reader = GGUFReader(path)
            reader.tokenizer()
            for address in reader.addresses():
                reader.read(*address)
        except UserError:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 200 and peak < 30e6
