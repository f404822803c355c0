# SPDX-License-Identifier: Apache-2.0
"""Two descriptions of one function made the same: what one format keeps in the weights, another has in its config.

    attention_scale     s           query kernel and bias times s * sqrt(head_dim), then no scale
    norm_scale_offset   o           norm scales + o, then no offset
    embedding_scale     e           the table times e and, where the head is tied, logits divided by e
    rope_interleaved    pairs       the two halves of each rotated head, then no pairs

Only fields in which two configs differ are rewritten, on the side that has them, in float32; tensors that no rewriting
touches stay bit for bit what is stored. For comparing, never for writing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from maxkit.formats.contents import WEIGHTS, Contents
from maxkit.models.config import ModelConfig

Rewrite = Callable[[str, np.ndarray], np.ndarray]
_QUERIES = ("attention/query/kernel", "attention/query/bias", "attention/query_up/kernel")
_TURNED = (*_QUERIES, "attention/key/kernel", "attention/key/bias", "attention/key_rope/kernel")


class Rewritten:
    """The weights of `contents` as another config says them; statistics of the optimizer as they are."""

    def __init__(self, contents: Contents, config: ModelConfig, rewrites: list[Rewrite]):
        self._contents: Any = contents
        self.config, self._rewrites = config, rewrites

    def __getattr__(self, name: str) -> Any:
        return getattr(self._contents, name)

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor, rewritten."""
        value = self._contents.read(path, layer, slot)
        if slot == WEIGHTS:
            for rewrite in self._rewrites:
                value = rewrite(path, value)
        return value


def normal_form(a: Contents, b: Contents) -> tuple[tuple[Any, Any], list[str]]:
    """Both with the fields of this module's head equal where they can be made so, and a line for each rewriting."""
    notes: list[str] = []
    for field, undo in _UNDO.items():
        if getattr(a.config, field) != getattr(b.config, field):
            a, first = undo(a)
            b, second = undo(b)
            notes += [f"rewritten to compare: {line}" for line in dict.fromkeys(first + second)]
    return (a, b), notes


def _changed(contents: Contents, rewrite: Rewrite, **fields: Any) -> Rewritten:
    return Rewritten(contents, contents.config.model_copy(update=fields), [rewrite])


def _undo_attention_scale(contents: Contents) -> tuple[Any, list[str]]:
    config = contents.config
    if config.attention_scale is None or config.qk_norm != "none":
        return contents, []
    factor = np.float32(config.attention_scale * config.head_dim**0.5)

    def rewrite(path: str, value: np.ndarray) -> np.ndarray:
        return value.astype(np.float32) * factor if path.endswith(_QUERIES) else value

    changed = _changed(contents, rewrite, attention_scale=None)
    return changed, [f"attention_scale={config.attention_scale:g} multiplied into the queries' kernels"]


def _undo_norm_offset(contents: Contents) -> tuple[Any, list[str]]:
    offset = contents.config.norm_scale_offset
    if not offset:
        return contents, []

    def rewrite(path: str, value: np.ndarray) -> np.ndarray:
        is_norm = path.endswith("norm/scale") and not path.endswith("delta/norm/scale")
        return value.astype(np.float32) + np.float32(offset) if is_norm else value

    changed = _changed(contents, rewrite, norm_scale_offset=0.0)
    return changed, [f"norm_scale_offset={offset:g} added to the norms' scales"]


def _undo_embedding_scale(contents: Contents) -> tuple[Any, list[str]]:
    config = contents.config
    if config.embedding_scale is None:
        return contents, []
    factor = np.float32(config.embedding_scale)

    def rewrite(path: str, value: np.ndarray) -> np.ndarray:
        return value.astype(np.float32) * factor if path == "embed/table" else value

    logits = config.logit_scale / config.embedding_scale if config.tie_embeddings else config.logit_scale
    changed = _changed(contents, rewrite, embedding_scale=None, logit_scale=logits)
    return changed, [f"embedding_scale={config.embedding_scale:g} multiplied into the embedding table"]


def _undo_interleaving(contents: Contents) -> tuple[Any, list[str]]:
    config = contents.config
    if not config.rope_interleaved:
        return contents, []
    turned = config.rotated_dim

    def rewrite(path: str, value: np.ndarray) -> np.ndarray:
        if not path.endswith(_TURNED):
            return value
        # In MLA the part that is turned comes last, elsewhere first.
        start = value.shape[-1] - turned if config.mla else 0
        order = np.arange(value.shape[-1])
        order[start : start + turned] = start + np.r_[0:turned:2, 1:turned:2]
        return value[..., order]

    return _changed(contents, rewrite, rope_interleaved=False), ["rope_interleaved: neighbours moved into halves"]


_UNDO = {
    "attention_scale": _undo_attention_scale,
    "norm_scale_offset": _undo_norm_offset,
    "embedding_scale": _undo_embedding_scale,
    "rope_interleaved": _undo_interleaving,
}
