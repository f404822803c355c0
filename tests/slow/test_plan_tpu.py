# SPDX-License-Identifier: Apache-2.0
"""Plans by the real TPU compiler. Each compile takes 5 to 60 s on two cores."""

import json

import pytest

from maxkit.checkpoint.load import open_source
from maxkit.errors import UserError
from maxkit.plan import command, plan
from maxkit.plan.topology import KNOWN

SMALL = {"num_layers": 2, "embed_dim": 64, "mlp_dim": 128, "seq_len": 64, "batch_size": 32}


@pytest.fixture(scope="module", autouse=True)
def libtpu() -> None:
    try:
        command._python_with_libtpu()
    except UserError as error:
        pytest.skip(f"TPU compiler: {error}")


@pytest.mark.parametrize("topology", KNOWN)
def test_every_known_topology_compiles(topology):
    found = plan("pretrain", topology, SMALL)
    assert found.fits and found.available_bytes > 15 << 30
    assert found.memory.arguments >= found.memory.params + found.memory.optimizer + found.memory.batch
    assert bool(found.collectives) == (found.num_devices > 1)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("mesh", ["", "fsdp:2,tensor:2"])
def test_scanned_and_unrolled_communicate_the_same(scan, mesh):
    found = plan("pretrain", "v5e:2x2", SMALL | {"scan_layers": scan, "mesh": mesh})
    assert found.fits and found.scan_layers == scan
    assert any(one.opcode == "all-gather" for one in found.collectives)


@pytest.mark.parametrize(
    ("recipe", "given"),
    [
        ("sft", {"lora_rank": 8}),
        ("dpo", {}),
        ("grpo", {"beta": 0.1, "num_generations": 4, "max_new_tokens": 32}),
        ("distill", {"student_layers": 1}),
    ],
)
def test_every_objective_compiles(tmp_path, recipe, given):
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
    described = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(described | sizes | heads), encoding="utf-8")
    given = {"model": str(tmp_path), "batch_size": 8, "seq_len": 256} | given
    found = plan(recipe, "v5e:2x2", given | ({"teacher": str(tmp_path)} if recipe == "distill" else {}))
    memory = found.memory
    assert found.fits and any(one.opcode == "all-gather" for one in found.collectives)
    assert (memory.teacher > memory.params) == (recipe == "distill")  # the student has half its layers
    assert memory.arguments >= memory.params + memory.optimizer + memory.batch + memory.teacher
    if recipe in ("sft", "dpo"):  # adapters alone have moments
        assert memory.optimizer < memory.params / 2


def test_the_sft_recipe_fits_four_small_chips():
    try:
        open_source("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(f"SmolLM2: {error}")
    found = plan("sft", "v5e:2x2")
    assert found.fits and found.num_params == 134_515_008
    assert {"all-gather", "reduce-scatter"} <= {one.opcode for one in found.collectives}
    assert sum(found.seconds.values()) < 180
    crowded = plan("sft", "v5e:1x1", {"batch_size": 512, "seq_len": 2048})
    assert not crowded.fits and crowded.required_bytes > crowded.available_bytes > 15 << 30
    assert command.main("sft", "v5e:1x1", {"batch_size": 512, "seq_len": 2048}) == 1


def test_refusals_by_the_compiler_itself():
    with pytest.raises(UserError, match="is not known"):
        plan("pretrain", "v5e:3x3")
    with pytest.raises(UserError, match="needs 3 devices, here are 4"):
        plan("pretrain", "v5e:2x2", {"mesh": "fsdp:3"})
    with pytest.raises(UserError, match="gave up on topology"):
        plan("pretrain", "v5e:64x64", SMALL | {"mesh": "data:-1", "batch_size": 4096})
