# SPDX-License-Identifier: Apache-2.0
"""Paxml's GPT-3 in its documented layout (zarr, one folder for each leaf), written here and read."""

import numpy as np
import pytest
import tensorstore as ts
from tiny_models import tiny, weights

from maxkit.checkpoint import inspect
from maxkit.checkpoint.open import open_contents
from maxkit.errors import UserError
from maxkit.formats import paxml, paxml_tree
from maxkit.models.config import Execution, ModelConfig
from maxkit.models.definition import ModelDefinition

L = 3
CONFIG = tiny(
    family="gpt2",
    num_layers=L,
    num_kv_heads=4,
    norm="layer",
    norm_bias=True,
    norm_scale_offset=1.0,
    position="learned",
    tie_embeddings=True,
    attention_bias=True,
    attention_out_bias=True,
    mlp_gated=False,
    mlp_bias=True,
    activation="gelu_tanh",
)
LAYER = "lm.transformer.repeat.sub.x_layers_0."


def tensors(seed: int) -> dict:
    definition = ModelDefinition(CONFIG, Execution(scan_layers=False))
    flat = definition.flat(weights(definition, seed))
    return {
        (p.address, p.layers[0] if p.layers else None): np.asarray(flat[p.path]) for p in definition.parameters.values()
    }


def arrays(values: dict) -> dict[str, np.ndarray]:
    """As Paxml names and shapes them; fused projections along axis 1 of a stack."""

    def stack(path: str) -> np.ndarray:
        return np.stack([values[f"layers/{path}", i] for i in range(L)])

    def fused(part: str) -> np.ndarray:
        return np.stack([stack(f"attention/{name}/{part}") for name in ("query", "key", "value")], axis=1)

    found = {
        "lm.softmax.logits_ffn.linear.w": values["embed/table", None].T,
        "lm.position_emb.emb_var": values["positions/table", None],
        "lm.final_ln.scale": values["final_norm/scale", None],
        "lm.final_ln.bias": values["final_norm/bias", None],
        LAYER + "layer_norm.scale": stack("attention_norm/scale"),
        LAYER + "layer_norm.bias": stack("attention_norm/bias"),
        LAYER + "self_attention.combined_qkv.w": fused("kernel"),
        LAYER + "self_attention.combined_qkv.b": fused("bias"),
        LAYER + "self_attention.post.w": np.moveaxis(stack("attention/out/kernel"), -1, 1),
        LAYER + "self_attention.post.b": stack("attention/out/bias"),
        LAYER + "ff_layer.layer_norm.scale": stack("mlp_norm/scale"),
        LAYER + "ff_layer.layer_norm.bias": stack("mlp_norm/bias"),
        LAYER + "ff_layer.ffn_layer1.linear.w": stack("mlp/up/kernel"),
        LAYER + "ff_layer.ffn_layer1.bias.b": stack("mlp/up/bias"),
        LAYER + "ff_layer.ffn_layer2.linear.w": stack("mlp/down/kernel"),
        LAYER + "ff_layer.ffn_layer2.bias.b": stack("mlp/down/bias"),
    }
    assert found[LAYER + "self_attention.combined_qkv.w"].shape == (L, 3, 16, 4, 4)
    assert found[LAYER + "self_attention.post.w"].shape == (L, 16, 4, 4)
    return found


def save(folder, key: str, array: np.ndarray) -> None:
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / key}/"}}
    chunks = [1, *array.shape[1:]] if array.ndim > 1 and array.shape[0] == L else list(array.shape)
    layout = ts.ChunkLayout(chunk_shape=chunks)
    ts.open(spec, create=True, dtype=array.dtype, shape=array.shape, chunk_layout=layout).result()[...] = array


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt3") / "checkpoints" / "checkpoint_00000200"
    for slot, seed in (("mdl_vars", 0), ("m", 1), ("v", 2)):
        for key, array in arrays(tensors(seed)).items():
            prefix = "mdl_vars"
            if slot != "mdl_vars":
                prefix = f"opt_states_0.{'p#3#i-1' if LAYER in key else 'no_prefix'}_2.{slot}"
            save(folder, f"{prefix}.params.{key}", array)
    save(folder, "step", np.asarray(200, np.int32))
    for number in range(3):
        save(folder, f"opt_states_0.no_prefix_{number}.count", np.asarray(200, np.int32))
        save(folder, f"opt_states_0.p#3#i-1_{number}.count", np.full(L, 200, np.int32))
    return folder


def test_read(checkpoint):
    for path in (checkpoint, checkpoint.parent, checkpoint.parents[1]):
        contents = paxml.PaxmlContents(path, CONFIG)
    assert (contents.format, contents.optimizer, contents.slots) == ("paxml", "adam_pax", ("params", "mu", "nu"))
    for slot, seed in (("params", 0), ("mu", 1), ("nu", 2)):
        wanted = tensors(seed)
        assert set(contents.addresses(slot)) == set(wanted)
        for (address, layer), value in wanted.items():
            assert contents.shape(address, layer, slot) == value.shape
            assert contents.dtype(address, layer, slot) == np.float32
            assert np.array_equal(contents.read(address, layer, slot), value), (slot, address, layer)
    assert {name: int(value) for name, value in contents.scalars.items()} == {"step": 200, "count": 200}
    assert contents.missing_keys() == contents.unused_keys() == []
    assert contents.facts["norm offset"].endswith("norm_scale_offset=1")


def test_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"vocab_size=48, embed_dim=16, num_layers=3. Not known: norm_eps"):
        paxml.PaxmlContents(checkpoint)
    with pytest.raises(UserError, match=r"arrays contradict config: .* is \[16, 48\], not \[12288, 50257\]"):
        paxml.PaxmlContents(checkpoint, "gpt3-175b")
    with pytest.raises(UserError, match="a llama model"):
        paxml.PaxmlContents(checkpoint, "llama2-7b")
    with pytest.raises(UserError, match="no Paxml checkpoint there"):
        paxml.PaxmlContents(tmp_path, CONFIG)


def test_a_missing_piece_is_damage_not_zeros(checkpoint, tmp_path):
    key = f"mdl_vars.params.{LAYER}layer_norm.scale"
    (tmp_path / paxml_tree.MARK).symlink_to(checkpoint / paxml_tree.MARK)
    save(tmp_path, key, np.ones((L, 16), np.float32))
    (tmp_path / key / "1.0").unlink()
    contents = paxml.PaxmlContents(tmp_path, CONFIG)
    assert isinstance(contents.config, ModelConfig)
    assert "mdl_vars.params.lm.final_ln.scale" in contents.missing_keys()
    assert np.array_equal(contents.read("layers/attention_norm/scale", 0), np.ones(16))
    with pytest.raises(UserError, match="cannot be read"):
        contents.read("layers/attention_norm/scale", 1)


def test_inspected_and_opened_by_its_look(checkpoint):
    found = inspect.describe(checkpoint.parents[1])
    sizes = sum(value.size for value in tensors(0).values())
    assert (found["format"], found["step"], found["optimizer"]) == ("paxml", 200, "adam_pax")
    assert found["num_params"] == sizes
    assert found["groups"] == [{"name": "layers", "pattern_length": 1, "repeats": L, "layer_axis": 0}]
    assert open_contents(checkpoint.parents[1], CONFIG).format == "paxml"
