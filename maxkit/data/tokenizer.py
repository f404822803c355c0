# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: one class around `tokenizers`, however the vocabulary was stored.

Here: Hugging Face files, GGUF metadata, a byte-level BPE trained in the run, and writing the Hugging Face
files. Not here: chat templates (`chat.py`). Special tokens are never added by `encode`, but their spelling in
the text is recognised.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from maxkit.errors import UserError

END_OF_TEXT = "<|endoftext|>"
ROLES = ("bos", "eos", "pad", "unk")

# Splits text before the byte-level merges; groups: contractions, letters, digits, punctuation, white space.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    `bos_id`, `eos_id`, `pad_id` are None where the source names no such token. pad may equal eos (SmolLM2):
    mask by position, never by id.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special: Mapping[str, str | None] | None = None,
        chat_template: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """`special`: bos, eos, pad, unk -> the token's text; `settings`: more of tokenizer_config.json."""
        self.backend = backend
        self.special = {role: text for role, text in (special or {}).items() if text is not None}
        self.chat_template = chat_template
        self.settings = dict(settings or {})
        for role, text in self.special.items():
            if role not in ROLES or backend.token_to_id(text) is None:
                raise UserError(f"tokenizer: the {role} token {text!r} is not in the vocabulary")
        self._exact: tokenizers.Tokenizer | None = None

    def _id(self, role: str) -> int | None:
        return self.backend.token_to_id(self.special[role]) if role in self.special else None

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._id("bos")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text or a turn."""
        return self._id("eos")

    @property
    def pad_id(self) -> int | None:
        """Id that fills unused places."""
        return self._id("pad")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with nothing added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text, on all cores."""
        return [row.ids for row in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and, for each, the characters [start, end) of the text it stands for."""
        if self._exact is None:
            # A byte-level post-processor trims white space off the offsets, so offsets are taken without it.
            self._exact = self.backend
            description = json.loads(self.backend.to_str())
            if description.get("post_processor") is not None:
                description["post_processor"] = None
                self._exact = tokenizers.Tokenizer.from_str(json.dumps(description))
        row = self._exact.encode(text, add_special_tokens=False)
        return row.ids, row.offsets

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Return the text of ids; broken UTF-8 becomes U+FFFD. `skip_special` leaves out special tokens."""
        return self.backend.decode([int(number) for number in ids], skip_special_tokens=skip_special)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        These are the files that transformers' `AutoTokenizer` and `Tokenizer.load` read.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        special = {f"{role}_token": text for role, text in self.special.items()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings |= self.settings | special
        self.backend.save(str(directory / "tokenizer.json"))
        _write_json(directory / "tokenizer_config.json", settings)
        _write_json(directory / "special_tokens_map.json", special)
        template = directory / "chat_template.jinja"
        if self.chat_template is not None:
            template.write_text(self.chat_template, encoding="utf-8")
        else:
            template.unlink(missing_ok=True)  # of an earlier save into the same folder

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read a folder with tokenizer.json and, where they are there, its companions. Raises UserError."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{directory}: no tokenizer.json (other tokenizer files are not read)")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer: {str(error)[:160]}") from None
        backend.no_padding()
        backend.no_truncation()  # both can be switched on in the file, and would change what encode returns
        settings = _read_json(directory / "tokenizer_config.json")
        named = _read_json(directory / "special_tokens_map.json") | settings
        special = {role: _text(named.get(f"{role}_token")) for role in ROLES}
        template = _template(directory, settings.get("chat_template"))
        handled = {"chat_template", *(f"{role}_token" for role in ROLES)}
        kept = {key: value for key, value in settings.items() if key not in handled}
        return cls(backend, special=special, chat_template=template, settings=kept)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Rebuild a byte-level BPE from GGUF metadata.

        `tokenizer.ggml.pre` decides how text is split before merging; an unknown one is refused by name.
        Raises UserError.
        """
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise UserError(f"GGUF metadata tokenizer.ggml.model={kind!r}: only 'gpt2' (byte-level BPE) is read")
        pre = metadata.get("tokenizer.ggml.pre", "default")
        if pre not in _PRE_TOKENIZERS:
            known = ", ".join(_PRE_TOKENIZERS)
            raise UserError(f"GGUF metadata tokenizer.ggml.pre={pre!r}: known are {known}")
        tokens, merges = (
            _strings(metadata, "tokenizer.ggml.tokens"),
            _strings(metadata, "tokenizer.ggml.merges"),
        )
        pairs = [tuple(merge.split(" ")) for merge in merges]
        vocabulary = {text: number for number, text in enumerate(tokens)}
        if len(vocabulary) != len(tokens):
            raise UserError("GGUF metadata tokenizer.ggml.tokens has the same token twice")
        try:
            backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"GGUF metadata tokenizer.ggml.merges: {str(error)[:160]}") from None
        backend.pre_tokenizer, backend.decoder = _PRE_TOKENIZERS[pre](), decoders.ByteLevel()
        backend.add_tokens(_added_tokens(metadata, tokens))
        special = {}
        for role, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
            number = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if number is not None:
                if not isinstance(number, int) or not 0 <= number < len(tokens):
                    raise UserError(f"GGUF metadata tokenizer.ggml.{key}_token_id={number!r} is not a token")
                special[role] = tokens[number]
        return cls(backend, special=special, chat_template=metadata.get("tokenizer.chat_template"))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on the texts; the same texts give the same vocabulary.

    Id 0 is `<|endoftext|>` (bos, eos and pad). The vocabulary is smaller than asked where the text has too
    few pairs. Raises UserError below 257 = every byte and the special token.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size}: at least 257 are needed (256 bytes and one special token)")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, special={"bos": END_OF_TEXT, "eos": END_OF_TEXT, "pad": END_OF_TEXT})


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_then_bytes() -> pre_tokenizers.PreTokenizer:
    # Without the digit split "x\n\n7" would merge its line breaks differently: [104, 198, 198, 39].
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS = {
    "smollm": _digits_then_bytes,
    "gpt-2": _byte_level,
    "llama-bpe": lambda: _split_then_bytes(_LLAMA3_SPLIT),
    "qwen2": lambda: _split_then_bytes(_QWEN2_SPLIT),
}


def _added_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> list[AddedToken]:
    """The tokens recognised whole: control tokens (type 3, special) and user-defined ones (type 4)."""
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return []
    if len(types) != len(tokens):
        raise UserError(f"GGUF metadata tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    return [
        AddedToken(text, special=int(kind) == 3, normalized=False)
        for text, kind in zip(tokens, types, strict=True)
        if kind in (3, 4)
    ]


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"GGUF metadata {key} is missing or not a list of strings")
    return value


def _text(token: Any) -> str | None:
    """The text of a token as tokenizer_config.json gives it: a string or a dict with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _template(directory: Path, configured: Any) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if isinstance(configured, list):  # several named templates: the one called default is the chat template
        configured = {entry["name"]: entry["template"] for entry in configured}.get("default")
    return configured


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
