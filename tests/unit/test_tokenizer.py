# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: the one in SmolLM2's GGUF, the files that transformers reads, and one trained here."""

import json
import pickle

import numpy as np
import pytest

from maxkit.checkpoint.sources import resolve
from maxkit.data.tokenizer import Tokenizer, train_bpe
from maxkit.errors import UserError
from maxkit.formats.gguf import GGUFFile

TEXTS = [
    "Hello, world! 12345 x\n\n7",
    "  leading and trailing  ",
    "tabs\tand\r\nlines\n\n\n",
    "caf\u00e9 \u4f60\u597d \U0001f642 \u200d",
    "don't I'll WE'VE",
    "",
]


@pytest.fixture(scope="module")
def metadata():
    return GGUFFile(resolve("smollm2-135m-instruct")).metadata


@pytest.fixture(scope="module")
def smollm2(metadata) -> Tokenizer:
    return Tokenizer.from_gguf(metadata)


def test_digits_are_split_before_line_breaks_merge(smollm2):
    assert smollm2.encode("x\n\n7") == [104, 1116, 39]
    assert smollm2.encode("x =  10") == [104, 446, 256, 33, 32]
    assert len(smollm2.encode("12345")) == 5


def test_special_tokens(smollm2):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.vocab_size) == (1, 2, 2, 49152)
    assert smollm2.encode("<|im_start|>user\nhi<|im_end|>\n") == [1, 4093, 198, 6004, 2, 198]
    assert smollm2.decode([1, 4093, 2]) == "<|im_start|>user<|im_end|>"
    assert smollm2.decode(np.array([1, 4093, 2]), skip_special=True) == "user"
    assert smollm2.encode("") == [] and smollm2.decode([]) == ""


@pytest.mark.parametrize("text", TEXTS)
def test_decode_is_the_inverse_of_encode(smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text
    assert smollm2.encode_batch([text, text]) == [smollm2.encode(text)] * 2


def test_saved_files_load_here_and_in_transformers(smollm2, tmp_path):
    from transformers import AutoTokenizer

    smollm2.save(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    for text in [*TEXTS, "<|im_start|>user\nx\n\n7<|im_end|>\n"]:
        assert ours.encode(text) == smollm2.encode(text) == theirs(text)["input_ids"]
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert ours.special == smollm2.special and ours.chat_template == smollm2.chat_template
    assert "SmolLM" in theirs.apply_chat_template(messages, tokenize=False)
    ours.save(tmp_path / "again")
    for path in tmp_path.glob("*.js*"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_tokenizer_travels_to_worker_processes(smollm2):
    copy = pickle.loads(pickle.dumps(smollm2))
    assert copy.encode("x\n\n7") == [104, 1116, 39] and copy.eos_id == 2


def test_settings_in_the_files_do_not_change_what_encode_returns(smollm2, tmp_path):
    smollm2.save(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    raw["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXTS[0]) == smollm2.encode(TEXTS[0])
    assert loaded.encode_with_offsets(" a  b") == smollm2.encode_with_offsets(" a  b")


def test_older_spellings_of_the_companion_files(smollm2, tmp_path):
    smollm2.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = {
        "eos_token": {"content": "<|im_end|>", "special": True},
        "bos_token": None,
        "chat_template": [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink()
    loaded = Tokenizer.load(tmp_path)
    assert loaded.chat_template == "A" and loaded.eos_id == 2 and loaded.bos_id is None and loaded.pad_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|none|>"}))
    with pytest.raises(UserError, match="eos token '<|none|>' is not in the vocabulary"):
        Tokenizer.load(tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model='llama'"),
        ({"tokenizer.ggml.pre": "poro-chat"}, "tokenizer.ggml.pre='poro-chat': known are smollm"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["never seen"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": 3}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "the same token twice"),
        ({"tokenizer.ggml.token_type": np.ones(3)}, "3 entries for 49152 tokens"),
        ({"tokenizer.ggml.eos_token_id": 60000}, "eos_token_id=60000 is not a token"),
    ],
)
def test_gguf_metadata_that_is_refused(metadata, change, words):
    with pytest.raises(UserError, match=words):
        Tokenizer.from_gguf(metadata | change)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["a", " b", " 12345", "  ", " don", "'t", "\n", "\n", "!?"]),
        ("llama-bpe", ["a", " b", " ", "123", "45", "  ", " don", "'t", "\n\n", "!?"]),
        ("qwen2", ["a", " b", " ", "1", "2", "3", "4", "5", "  ", " don", "'t", "\n\n", "!?"]),
        ("smollm", ["a", " b", " ", "1", "2", "3", "4", "5", "  ", " don", "'t", "\n", "\n", "!?"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(metadata, pre, pieces):
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": pre})
    text = "a b 12345   don't\n\n!?"
    found = [text[slice(*span)] for _, span in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
    assert found == pieces


def test_a_trained_vocabulary_is_reproducible(tmp_path):
    texts = [f"the cat sat on mat {i}, the dog did not. \u00e9" for i in range(200)]
    first, second = train_bpe(texts, 300), train_bpe(iter(texts), 300)
    assert first.backend.to_str() == second.backend.to_str()
    assert first.vocab_size == 300 and first.eos_id == first.bos_id == first.pad_id == 0
    text = texts[3] + " \U0001f642 unseen\x00"
    assert first.decode(first.encode(text)) == text
    assert first.encode("<|endoftext|>") == [0]
    assert len(first.encode(texts[3])) < len(texts[3])
    first.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(text) == first.encode(text)
    with pytest.raises(UserError, match="vocab_size=100"):
        train_bpe(texts, 100)
