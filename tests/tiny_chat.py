# SPDX-License-Identifier: Apache-2.0
"""A chat model of a few thousand weights whose tokens are bytes, with a chat template, in a folder."""

import functools
from pathlib import Path

from tiny_models import tiny, weights

from maxkit.checkpoint.load import Loaded
from maxkit.checkpoint.save import save
from maxkit.data.tokenizer import Tokenizer, train_bpe
from maxkit.models.definition import ModelDefinition

# A turn is its text between two signs, so that a row can be read and its tokens counted.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}>{{ m.content }}<|endoftext|>"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@functools.cache
def tokenizer() -> Tokenizer:
    """A token a byte; the end of a turn is also the padding."""
    plain = train_bpe(["abc"], 257)
    return Tokenizer(plain.backend, special=plain.special, chat_template=TEMPLATE)


def chat_model(folder: Path, seed: int = 0) -> Path:
    """The folder of a new model."""
    definition = ModelDefinition(tiny(vocab_size=257, max_seq_len=256))
    save(Loaded(definition, weights(definition, seed), tokenizer(), (), "test"), folder)
    return folder
