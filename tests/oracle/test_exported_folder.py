# SPDX-License-Identifier: Apache-2.0
"""A SmolLM2-shaped model exported after training, taken as it is by transformers and by llama.cpp's converter.

Two layers of random weights with the real tokenizer and its chat template. The converter and its library are those that
the source distribution of llama-cpp-python carries (the Makefile has the version); nothing of it is built.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import weights

import maxkit
from maxkit.checkpoint.compare import compare
from maxkit.checkpoint.convert import convert
from maxkit.checkpoint.load import Loaded
from maxkit.checkpoint.open import open_contents
from maxkit.infer.generate import encode
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition

torch = pytest.importorskip("torch")
NAME = "smollm2-135m-instruct"
CONVERTER = Path(sys.prefix) / "llama.cpp"
CHAT = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    whole = open_contents(NAME)  # reads no tensor
    sizes = {"num_layers": 2, "embed_dim": 48, "mlp_dim": 96, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8}
    definition = ModelDefinition(whole.config.model_copy(update=sizes), Execution())
    return Loaded(definition, weights(definition), whole.tokenizer(), (), NAME)


@pytest.fixture(scope="module")
def exported(loaded, tmp_path_factory) -> Path:
    """By way of a checkpoint of ours, as `maxkit convert RUN DST --to hf` does."""
    folder = tmp_path_factory.mktemp("exported")
    maxkit.save(loaded, folder / "ours")
    return Path(convert(folder / "ours", folder / "hf", to="hf").path)


def test_saved_and_converted_are_one(loaded, exported, tmp_path):
    maxkit.save(loaded, tmp_path / "hf", format="hf")
    ours, theirs = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tmp_path / "hf", exported))
    assert ours == theirs
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= ours.keys()


def test_transformers_generates_from_the_folder(loaded, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    model, info = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert rendered["input_ids"][0].tolist() == encode(loaded.tokenizer, CHAT)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == loaded.tokenizer.eos_id
    with torch.no_grad():
        tokens = model.generate(**rendered, do_sample=False, max_new_tokens=8)
    said = tokenizer.decode(tokens[0, rendered["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == maxkit.generate(loaded, [CHAT], max_new_tokens=8)[0]


@pytest.mark.skipif(not CONVERTER.is_dir(), reason="llama.cpp's converter is not here: make oracle fetches it")
def test_llama_cpp_converts_the_folder(exported, tmp_path):
    target = tmp_path / "model.gguf"
    command = [sys.executable, CONVERTER / "convert_hf_to_gguf.py", exported, "--outtype", "f32", "--outfile", target]
    library = {"PYTHONPATH": str(CONVERTER / "gguf-py")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | library, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = compare(exported, target, values=True, atol=0, rtol=0)
    assert found.equal, list(found.lines())
    assert found.compared == 20
    assert maxkit.load(target).tokenizer.encode("Name a colour.") == maxkit.load(exported).tokenizer.encode(
        "Name a colour."
    )
