# SPDX-License-Identifier: Apache-2.0
"""Which of several statements of one function to use: for a Hugging Face folder, and to compare two checkpoints.

What restating does to the weights is in `formats/restated.py`; here is only when. No JAX.
"""

import itertools
from typing import Any

import ml_dtypes
import numpy as np

from maxkit.errors import UserError
from maxkit.formats.contents import Contents
from maxkit.formats.huggingface import config_json
from maxkit.formats.restated import FIELDS, Restated
from maxkit.models.config import ModelConfig


def for_huggingface(contents: Any) -> Any:
    """`contents` stated as a config.json can say it: as it is if possible, else with the fewest fields rewritten.

    Raises:
        UserError: no statement of this function has a config.json; says what is in the way besides the statement.
    """
    errors: list[UserError] = []
    for config in _statements(contents.config):
        try:
            config_json(config, None, "float32")
            return contents if config == contents.config else Restated(contents, config)
        except UserError as error:
            errors.append(error)
    raise next((error for error in errors if not any(f" {name}=" in str(error) for name in FIELDS)), errors[0])


def alike(a: Contents, b: Contents) -> tuple[Any, list[str]]:
    """`b` stated as `a` is, with a line for each rewriting; `b` itself where they compute different functions."""
    differing = [name for name in FIELDS if getattr(a.config, name) != getattr(b.config, name)]
    if not differing:
        return b, []
    try:
        restated = Restated(b, b.config.model_copy(update={name: getattr(a.config, name) for name in differing}))
    except UserError as error:
        return b, [f"not rewritten to compare: {error}"]
    lines = {", ".join(names) for names in restated.rewritten.values()}
    return restated, [f"b is rewritten as a says it ({', '.join(differing)}): {line}" for line in sorted(lines)]


def _statements(config: ModelConfig) -> list[ModelConfig]:
    """Configs of the same function, those with fewer changes first."""
    root = config.embed_dim**0.5
    rounded = float(np.asarray(root, ml_dtypes.bfloat16))
    choices = (
        dict.fromkeys((config.attention_scale, None)),
        dict.fromkeys((config.norm_scale_offset, 0.0, 1.0)),
        dict.fromkeys((config.embedding_scale, None, root, rounded)),
        dict.fromkeys((config.rope_interleaved, False)),
    )
    found = []
    for attention, offset, embedding, interleaved in itertools.product(*choices):
        logits = config.logit_scale
        if config.tie_embeddings:
            logits *= (embedding or 1.0) / (config.embedding_scale or 1.0)
            logits = 1.0 if abs(logits - 1.0) < 1e-9 else logits
        changes = {
            "attention_scale": attention,
            "norm_scale_offset": offset,
            "embedding_scale": embedding,
            "logit_scale": logits,
            "rope_interleaved": interleaved,
        }
        found.append(config.model_copy(update=changes))
    return sorted(found, key=lambda other: sum(getattr(other, n) != getattr(config, n) for n in FIELDS))
