# SPDX-License-Identifier: Apache-2.0
"""Layouts of MaxText and Tunix of which no checkpoint is at hand: written by Orbax in their documented form, read."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_models import tiny, weights

from maxkit.checkpoint import inspect
from maxkit.errors import UserError
from maxkit.formats import maxtext
from maxkit.models.config import BlockSpec, Execution, MlaConfig, ModelConfig, MoeConfig
from maxkit.models.definition import ModelDefinition

CONFIG = tiny(num_layers=4, attention_scale=1.0)


def tensors(config: ModelConfig = CONFIG, seed: int = 0) -> dict:
    """{(path, layer): array} of every tensor of a model."""
    definition = ModelDefinition(config, Execution(scan_layers=False))
    flat = definition.flat(weights(definition, seed))
    return {
        (p.address, p.layers[0] if p.layers else None): np.asarray(flat[p.path]) for p in definition.parameters.values()
    }


def llama_tree(values: dict, axis: int | None = 1) -> dict:
    """The tree that MaxText has of them: stacked on `axis`, or layer by layer."""
    leaves = {
        "pre_self_attention_layer_norm/scale": "attention_norm/scale",
        "post_self_attention_layer_norm/scale": "mlp_norm/scale",
        **{f"self_attention/{name}/kernel": f"attention/{name}/kernel" for name in ("query", "key", "value", "out")},
        "mlp/wi_0/kernel": "mlp/gate/kernel",
        "mlp/wi_1/kernel": "mlp/up/kernel",
        "mlp/wo/kernel": "mlp/down/kernel",
    }
    tree = {
        "token_embedder/embedding": values["embed/table", None],
        "decoder/decoder_norm/scale": values["final_norm/scale", None],
        "decoder/logits_dense/kernel": values["output/kernel", None].T,
    }
    for theirs, ours in leaves.items():
        layers = [values[f"layers/{ours}", i] for i in range(CONFIG.num_layers)]
        if axis is None:
            tree |= {f"decoder/layers_{i}/{theirs}": layer for i, layer in enumerate(layers)}
        else:
            tree[f"decoder/layers/{theirs}"] = np.stack(layers, axis)
    return nested(tree)


def nested(flat: dict) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *above, name = path.split("/")
        branch = tree
        for part in above:
            branch = branch.setdefault(part, {})
        branch[name] = value
    return tree


def valued(tree):
    """With a part `value` at the end of every path, as NNX state is saved."""
    return {k: valued(v) for k, v in tree.items()} if isinstance(tree, dict) else {"value": tree}


def save(path, tree) -> None:
    ocp.PyTreeCheckpointer().save(path, tree)


def check(contents, values, slot="params") -> None:
    assert set(contents.addresses(slot)) == set(values)
    for (path, layer), wanted in values.items():
        assert contents.shape(path, layer, slot) == wanted.shape
        assert np.array_equal(contents.read(path, layer, slot), wanted), (slot, path, layer)


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("base", [False, True])
def test_tunix(tmp_path, axis, base):
    """SFT, and DPO or RL under `base`: two items, the optimizer's state as NNX state."""
    values, mu, nu = tensors(), tensors(seed=1), tensors(seed=2)
    wrap = (lambda tree: {"base": tree}) if base else (lambda tree: tree)
    params = wrap(valued(llama_tree(values, axis)))
    params.setdefault("rngs", {"dropout": {"count": {"value": np.uint32(3)}}})
    save(tmp_path / "7" / "model_params", params)
    moments = {"mu": wrap(valued(llama_tree(mu, axis))), "nu": wrap(valued(llama_tree(nu, axis)))}
    state = {"0": {"count": {"value": np.int32(7)}, **moments}, "2": {"count": {"value": np.int32(7)}}}
    save(tmp_path / "7" / "optimizer_state", {"opt_state": state, "step": {"value": np.uint32(7)}})
    for path in (tmp_path, tmp_path / "7", tmp_path / "7" / "model_params"):
        contents = maxtext.open(path, CONFIG)
        assert (contents.format, contents.optimizer, contents.scan_layers) == ("tunix", "adamw", axis is not None)
        for slot, wanted in (("params", values), ("mu", mu), ("nu", nu)):
            check(contents, wanted, slot)
        assert {name: int(value) for name, value in contents.scalars.items()} == {"step": 7, "count": 7}
        assert list(contents.ignored_keys().values()) == ["state of random numbers"]
        assert contents.missing_keys() == contents.unused_keys() == []


@pytest.mark.parametrize("on", ["weights", "moments", "both", "neither"])
@pytest.mark.parametrize("numbered", [False, True])
def test_plain_nnx_state(tmp_path, on, numbered):
    """`model` and `optimizer`, as NNX holds them: a part `value` here, there or nowhere; layers by name or number."""
    values, mu = tensors(), tensors(seed=1)
    random = {"rngs": {"count": np.uint32(3), "key": np.zeros(2, np.uint32)}}

    def tree(values: dict) -> dict:
        found = llama_tree(values, None if numbered else 1)
        if numbered:
            layers = {str(i): found["decoder"].pop(f"layers_{i}") for i in range(CONFIG.num_layers)}
            found["decoder"]["layers"] = layers
        return found

    weights, moments = tree(values), {"mu": tree(mu), "nu": tree(mu)}
    weights = valued(weights) if on in ("weights", "both") else weights
    moments = valued(moments) if on in ("moments", "both") else moments
    state = {"0": {"count": np.int32(5), **moments}, "2": {"count": np.int32(5)}}
    item = {"model": {**weights, "dropout": random}, "optimizer": {"opt_state": state, "step": np.uint32(5)}}
    save(tmp_path / "5" / "items", item)
    contents = maxtext.open(tmp_path, CONFIG)
    assert (contents.format, contents.optimizer, contents.scan_layers) == ("maxtext-nnx", "adamw", not numbered)
    check(contents, values)
    check(contents, mu, "mu")
    assert {name: int(value) for name, value in contents.scalars.items()} == {"step": 5, "count": 5}
    assert contents.missing_keys() == contents.unused_keys() == []
    assert set(contents.ignored_keys().values()) == {"state of random numbers"}


@pytest.mark.parametrize("item", ["state", "default"])
def test_items_of_other_names(tmp_path, item):
    """Of the managers for emergencies, and of old releases."""
    values = tensors()
    save(tmp_path / "3" / item, {"params": {"params": llama_tree(values)}, "step": np.int32(3)})
    for path in (tmp_path, tmp_path / "3", tmp_path / "3" / item):
        check(maxtext.open(path, CONFIG), values)
        assert inspect.describe(path)["format"] == "maxtext-linen"


def test_diloco(tmp_path):
    """Inner state of two replicas with one more axis in front, and the outer model with its momentum."""
    outer, trace, inner = tensors(), tensors(seed=1), [tensors(seed=2), tensors(seed=3)]
    stack = lambda a, b: {k: stack(a[k], b[k]) if isinstance(a[k], dict) else np.stack([a[k], b[k]]) for k in a}  # noqa: E731
    replicas = stack(llama_tree(inner[0]), llama_tree(inner[1]))
    state = {
        "inner_state": {
            "params": {"params": replicas},
            "opt_state": [{"count": np.full(2, 5, np.int32), "mu": {"params": replicas}, "nu": {"params": replicas}}],
            "step": np.full(2, 5, np.int32),
        },
        "params": {"params": llama_tree(outer)},
        "outer_opt_state": [{"trace": {"params": llama_tree(trace)}}, None],
        "step": np.int32(4),
    }
    save(tmp_path / "4" / "items", state)
    contents = maxtext.open(tmp_path, CONFIG)
    assert (contents.format, contents.optimizer, contents.slots) == ("maxtext-diloco", "sgd", ("params", "trace"))
    check(contents, outer)
    check(contents, trace, "trace")
    assert set(contents.ignored_keys().values()) == {"DiLoCo's replicas; give replica=NUMBER to read one of them"}
    for number in (0, 1):
        contents = maxtext.open(tmp_path, CONFIG, replica=number)
        assert (contents.optimizer, int(contents.scalars["step"]), contents.unused_keys()) == ("adamw", 5, [])
        check(contents, inner[number])
        check(contents, inner[number], "nu")


@pytest.mark.parametrize("spelling", ["{}_kernel", "{}.kernel"])
def test_adapters_alone(tmp_path, spelling):
    """Of training (`kernel_lora_a`, with the run's metadata) and of serving (`lora_a.kernel`, single-nested)."""
    random, stacks, wanted = np.random.default_rng(0), {}, {}
    sizes = {"query": ((16,), (4, 4)), "value": ((16,), (2, 4)), "out": ((4, 4), (16,))}
    for name, (inputs, outputs) in sizes.items():
        for part, shape in (("lora_a", (*inputs, 3)), ("lora_b", (3, *outputs))):
            layers = [random.normal(size=shape).astype(np.float32) for _ in range(4)]
            key = f"kernel_{part}" if "_" in spelling else spelling.format(part)
            stacks[f"decoder/layers/self_attention/{name}/{key}"] = np.stack(layers, axis=1)
            wanted |= {(f"layers/attention/{name}/{part}", i): layer for i, layer in enumerate(layers)}
    tree = nested(stacks)
    save(tmp_path / "0" / "items", {"params": {"params": tree} if "_" in spelling else tree, "step": np.int32(1)})
    with pytest.raises(UserError, match="adapters of rank 3, but nothing says their lora_alpha"):
        maxtext.open(tmp_path, CONFIG)
    metadata = {"custom_metadata": {"scan_layers": True, "lora": {"lora_rank": 3, "lora_alpha": 6.0}}}
    (tmp_path / "0" / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    contents = maxtext.open(tmp_path, CONFIG)
    check(contents, wanted)
    assert (contents.lora.rank, contents.lora.alpha, contents.lora.targets) == (3, 6.0, ("query", "value", "out"))
    assert contents.facts["adapters"].startswith("only adapters")
    assert "decoder/layers/mlp/wo/kernel" in contents.missing_keys()


def test_quantised_weights_are_refused_with_advice(tmp_path):
    tree = llama_tree(tensors())
    aqt = {"decoder": {"layers": {"mlp": {"wo": {"AqtDotGeneral_0": {"qrhs": {"frozen": np.zeros(3, np.int8)}}}}}}}
    save(tmp_path / "linen", {"params": {"params": tree, "aqt": aqt}, "step": np.int32(0)})
    frozen = {"frozen": {"value": {"qvalue": np.zeros(3, np.int8)}}}
    tree["decoder"]["layers"]["mlp"]["wo"] = {"AqtDotGeneral_0": {"qrhs": frozen}}
    save(tmp_path / "nnx", tree)
    for name in ("linen", "nnx"):
        with pytest.raises(UserError, match=r"AQT .* are not read: convert the checkpoint that they were made from"):
            maxtext.open(tmp_path / name, CONFIG)


def test_optimizers_in_other_wrappings(tmp_path):
    """`adam_pax` flat; a trainable mask; skip-step-on-spikes around AdamW: moments by the same rows."""
    values, mu, nu = tensors(), tensors(seed=1), tensors(seed=2)
    moments = {"mu": llama_tree(mu), "nu": llama_tree(nu)}
    wrapped = {slot: {"params": tree} for slot, tree in moments.items()}
    chain = {"0": {"count": np.int32(3), **moments}, "2": {"count": np.int32(3)}}
    states = {
        "adam_pax": {"count": np.int32(3), **wrapped},
        "adamw": {"inner_states": {"trainable": {"inner_state": chain}}},
        "adamw spikes": {"inner_state": chain, "losses": np.zeros(4, np.float32), "count": np.int32(9)},
    }
    for name, state in states.items():
        params = {"params": {"params": llama_tree(values)}, "opt_state": state, "step": np.int32(3)}
        save(tmp_path / name / "3" / "items", params)
        contents = maxtext.open(tmp_path / name, CONFIG)
        assert (contents.optimizer, contents.slots) == (name.split()[0], ("params", "mu", "nu"))
        check(contents, mu, "mu")
        check(contents, nu, "nu")
        if "spikes" in name:
            assert contents.scalars["opt_state/losses"].shape == (4,)
            assert int(contents.scalars["opt_state/count"]) == 9
        else:
            assert int(contents.scalars["count"]) == 3


def test_everything_stored_is_used_ignored_or_unexpected(tmp_path):
    tree = llama_tree(tensors())
    tree["decoder"]["layers"]["mlp"]["strange"] = {"kernel": np.zeros(3, np.float32)}
    tree["vision_encoder"] = {"patch": np.zeros(3, np.float32)}
    state = {
        "params": {"params": tree},
        "step": np.int32(0),
        "nnx_aux": {"model": {"decoder": {"rngs": {"count": np.uint32(0)}, "statistic": np.zeros(2, np.float32)}}},
        "other": np.zeros(2, np.float32),
    }
    save(tmp_path / "0" / "items", state)
    contents = maxtext.open(tmp_path, CONFIG)
    assert contents.unused_keys() == [
        "nnx_aux/model/decoder/statistic",
        "other",
        "params/params/decoder/layers/mlp/strange/kernel",
    ]
    assert contents.ignored_keys() == {
        "nnx_aux/model/decoder/rngs/count": "state of random numbers",
        "params/params/vision_encoder/patch": "not part of the text model",
    }


def test_contradictions_are_listed_together(tmp_path):
    save(tmp_path / "0" / "items", {"params": {"params": llama_tree(tensors())}})
    with pytest.raises(UserError) as caught:
        maxtext.open(tmp_path, tiny(num_layers=4, attention_scale=1.0, mlp_dim=25, vocab_size=49))
    text = str(caught.value)
    assert "5 tensors contradict a ModelConfig" in text
    assert "params/params/decoder/layers/mlp/wi_0/kernel is [16, 4, 24], not [16, 4, 25]" in text
    with pytest.raises(UserError, match="no layers of a deepseek model"):
        mla = MlaConfig(q_rank=None, kv_rank=8, nope_head_dim=4, rope_head_dim=4, v_head_dim=4)
        moe = MoeConfig(num_experts=4, experts_per_token=2, mlp_dim=8, scoring="softmax")
        latent = tiny(
            family="deepseek_v2", num_kv_heads=4, head_dim=8, mla=mla, moe=moe, pattern=(BlockSpec(mlp="moe"),)
        )
        maxtext.open(tmp_path, latent)


def test_metadata_that_is_no_boolean_or_wrong_is_reported(tmp_path):
    save(tmp_path / "0" / "items", {"params": {"params": llama_tree(tensors(), None)}})
    for stored, words in (("true", "not a boolean"), (True, "metadata says True, the arrays are False")):
        text = json.dumps({"custom_metadata": {"scan_layers": stored}})
        (tmp_path / "0" / "_CHECKPOINT_METADATA").write_text(text)
        contents = maxtext.open(tmp_path, CONFIG)
        assert contents.scan_layers is False
        assert words in contents.facts["scan_layers"]


def test_as_many_layers_as_dimensions(tmp_path):
    """Then shapes do not decide the axis: the description does, and without one MaxText's default."""
    config = tiny(num_layers=16, attention_scale=1.0)
    values = tensors(config)
    for axis in (0, 1):
        source = {"decoder/layers/pre_self_attention_layer_norm/scale": "layers/attention_norm/scale"}
        stacks = {key: np.stack([values[path, i] for i in range(16)], axis) for key, path in source.items()}
        save(tmp_path / str(axis) / "0" / "items", {"params": {"params": nested(stacks)}})
    log = "decoder_block: llama2\nbase_emb_dim: 16\nbase_num_query_heads: 4\nbase_num_kv_heads: 2\nhead_dim: 4\n"
    log += "base_mlp_dim: 24\nbase_num_decoder_layers: 16\nvocab_size: 48\n"
    (tmp_path / "log.txt").write_text(log + "param_scan_axis: 0\n")
    for axis, given in ((0, tmp_path / "log.txt"), (1, config)):
        contents = maxtext.open(tmp_path / str(axis), given)
        assert contents.scan_axis == axis
        for layer in (0, 5):
            got = contents.read("layers/attention_norm/scale", layer)
            assert np.array_equal(got, values["layers/attention_norm/scale", layer])


def test_what_we_write_orbax_restores_as_the_tree_of_a_run(tmp_path):
    """With a target on devices, as MaxText restores, and without."""
    save(tmp_path / "0" / "items", {"params": {"params": llama_tree(tensors())}, "step": np.int32(3)})
    maxtext.write(tmp_path / "out", maxtext.open(tmp_path, CONFIG), scan_layers=False)
    item = tmp_path / "out" / "0" / "items"
    wanted = {"params": {"params": llama_tree(tensors(), None)}, "step": np.int32(3)}
    flat = ModelDefinition.flat
    found = ocp.PyTreeCheckpointer().restore(item)
    assert found.pop("opt_state") == {}
    assert all(np.array_equal(found, flat(wanted)[path]) for path, found in flat(found).items())
    manager = ocp.CheckpointManager(
        tmp_path / "out", item_names=("items",), item_handlers={"items": ocp.PyTreeCheckpointHandler()}
    )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), wanted)
    arguments = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(items=arguments))["items"]
    assert all(np.array_equal(x, flat(wanted)[path]) for path, x in flat(restored).items())
    assert flat(restored).keys() == flat(wanted).keys()
    assert manager.metadata(0).custom_metadata["scan_layers"] is False
