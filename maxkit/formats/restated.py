# SPDX-License-Identifier: Apache-2.0
"""The same function, stated by another config: what one format keeps in the weights and another in the config.

`Restated(contents, config)` gives the tensors of `contents` as a model with `config` needs them. The two configs may
differ in

| field | what happens to the weights | called |
| --- | --- | --- |
| `attention_scale` | the queries' kernel (or the scale of its norm) takes the quotient | query scale |
| `norm_scale_offset` | the norms' scales take the difference | norm offset |
| `embedding_scale`, with `logit_scale` | the embedding table takes the quotient | embedding scale |
| `rope_interleaved` | the turned dimensions of queries and keys are put in the other order | rope order |

Where w' = s w, the gradient with respect to w' is 1/s of the other, so means of gradients are divided by s, means of
their squares by s^2; the steps an optimizer takes from there are not those it would have taken. Only the order of
dimensions is exact; all others round, each once, in float32 (and then to the stored type).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from maxkit.errors import UserError
from maxkit.formats.contents import WEIGHTS
from maxkit.models.config import BlockSpec, ModelConfig, RopeScaling

_BY_BLOCK = ("family", "max_seq_len", "leading_blocks", "pattern")  # compared block by block, or without effect
FIELDS = ("attention_scale", "norm_scale_offset", "embedding_scale", "logit_scale", "rope_interleaved")


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """What happens to one kind of tensor: w' = order(scale * w + shift)."""

    names: tuple[str, ...]
    scale: float = 1.0
    shift: float = 0.0
    order: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def is_exact(self) -> bool:
        """Whether no bit of a value changes."""
        return self.scale == 1.0 and self.shift == 0.0

    def apply(self, array: np.ndarray, slot: str) -> np.ndarray:
        """The tensor, or statistic of it, restated, in its own type."""
        power = {WEIGHTS: 1, "nu": -2}.get(slot.rpartition("/")[2], -1)
        scale, shift = self.scale**power, self.shift if slot == WEIGHTS else 0.0
        if scale != 1.0 or shift != 0.0:
            wide = array.astype(np.float32 if array.dtype.itemsize <= 4 else array.dtype)
            array = (wide * wide.dtype.type(scale) + wide.dtype.type(shift)).astype(array.dtype)
        return np.ascontiguousarray(self.order(array)) if self.order else array


class Restated:
    """`contents` for a model with `config`. `rewritten` names what was done to which path; the rest is as it was.

    Raises:
        UserError: the configs differ in what no rewriting of weights can make up for.
    """

    def __init__(self, contents: Any, config: ModelConfig) -> None:
        self.contents, self.config = contents, config
        self._rewrites = rewrites(contents.config, config, {path for path, _ in contents.addresses()})
        self.rewritten: dict[str, tuple[str, ...]] = {path: rewrite.names for path, rewrite in self._rewrites.items()}
        self.facts: dict[str, str] = dict(contents.facts) | _facts(self._rewrites)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.contents, name)

    def read(self, path: str, layer: int | None = None, slot: str = WEIGHTS) -> np.ndarray:
        """One tensor, restated."""
        array = self.contents.read(path, layer, slot)
        return self._rewrites[path].apply(array, slot) if path in self._rewrites else array


def _facts(found: dict[str, Rewrite]) -> dict[str, str]:
    names = sorted({name for rewrite in found.values() for name in rewrite.names})
    return {name: f"rewritten: {', '.join(p for p, r in found.items() if name in r.names)}" for name in names}


def rewrites(source: ModelConfig, target: ModelConfig, paths: Iterable[str]) -> dict[str, Rewrite]:
    """{path: what to do with it} for the paths of a model that need it."""
    paths = set(paths)
    _check(source, target)
    found: dict[str, Rewrite] = {}

    def add(path: str, name: str, scale: float = 1.0, shift: float = 0.0, order=None) -> None:
        old = found.get(path, Rewrite(()))
        if path in paths:
            found[path] = Rewrite((*old.names, name), old.scale * scale, old.shift * scale + shift, order or old.order)

    quotient = _attention_scale(source) / _attention_scale(target)
    scaled = () if math.isclose(quotient, 1.0, rel_tol=1e-6) else _query_factors(source)
    for path in sorted(paths):
        # scale' + offset' = quotient (scale + offset)
        shift = source.norm_scale_offset - target.norm_scale_offset / (quotient if path in scaled else 1.0)
        if path.endswith("norm/scale") and shift:
            add(path, "norm offset", shift=shift)
    for path in scaled:
        add(path, "query scale", scale=quotient)
    embedding = (source.embedding_scale or 1.0) / (target.embedding_scale or 1.0)
    if not math.isclose(embedding, 1.0, rel_tol=1e-6):
        add("embed/table", "embedding scale", scale=embedding)
    if source.rope_interleaved != target.rope_interleaved:
        for path in _turned(source):
            add(path, "rope order", order=_reorder(source, path, target.rope_interleaved))
    return found


def _attention_scale(config: ModelConfig) -> float:
    return config.attention_scale or config.head_dim**-0.5


def _check(source: ModelConfig, target: ModelConfig) -> None:
    """Refuse differences that are no matter of stating."""
    problems = differences(source, target, apart_from=FIELDS)
    ends = (source.embedding_scale or 1.0) / (target.embedding_scale or 1.0)
    wanted = source.logit_scale / ends if source.tie_embeddings else source.logit_scale
    if not math.isclose(wanted, target.logit_scale, rel_tol=1e-6):
        problems.append(f"logit_scale: {wanted} is needed, {target.logit_scale} is given")
    if problems:
        raise UserError(f"two models that compute different functions: they differ in {'; '.join(problems)}")


def differences(one: ModelConfig, other: ModelConfig, apart_from: tuple[str, ...] = ()) -> list[str]:
    """Fields in which two configs differ in meaning: "norm_eps: 1e-05, and 1e-06"."""
    names = [name for name in ModelConfig.model_fields if name not in (*apart_from, *_BY_BLOCK)]
    found = [
        f"{name}: {getattr(one, name)!r}, and {getattr(other, name)!r}"
        for name in names
        if not same_meaning(one, other, name)
    ]
    if effective_blocks(one) != effective_blocks(other):
        found.append("the kinds of their layers")
    return found


def effective_blocks(config: ModelConfig) -> list[BlockSpec]:
    """The blocks, without what has no effect in them: a window as wide as the longest sequence, an unused scaling."""
    found = []
    for block in config.blocks:
        changes: dict[str, Any] = {} if config.rope_scaling else {"rope_scaled": True}
        if block.sliding_window and block.sliding_window >= config.max_seq_len:
            changes["sliding_window"] = None
        found.append(block.model_copy(update=changes))
    return found


def same_meaning(one: ModelConfig, other: ModelConfig, name: str) -> bool:
    """Whether a field has the same effect in both, however it is written."""
    ours, theirs = getattr(one, name), getattr(other, name)
    if ours == theirs:
        return True
    if name == "attention_scale":
        return math.isclose(_attention_scale(one), _attention_scale(other), rel_tol=1e-6)
    if name == "rope_scaling" and ours is not None and theirs is not None:
        return _same_scaling(one, other)
    if name == "moe" and ours is not None and theirs is not None:
        # The score of a group matters only where there are groups.
        without = {"group_score"} if ours.num_groups == theirs.num_groups == 1 else set()
        return ours.model_dump(exclude=without) == theirs.model_dump(exclude=without)
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return False


def _same_scaling(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two length scalings turn alike, whatever they are written with."""
    assert one.rope_scaling and other.rope_scaling
    ours, theirs = one.rope_scaling, other.rope_scaling
    plain = {"attention_factor", "mscale", "mscale_all_dim", "original_max_seq_len"}
    if ours.model_dump(exclude=plain) != theirs.model_dump(exclude=plain):
        return False
    if ours.kind == "linear":
        return True
    lengths = [c.rope_scaling.original_max_seq_len or one.max_seq_len for c in (one, other) if c.rope_scaling]
    return lengths[0] == lengths[1] and math.isclose(_magnitude(ours), _magnitude(theirs), rel_tol=1e-6)


def _magnitude(scaling: RopeScaling) -> float:
    """YaRN's factor on cos and sin, as in `models/rope.py`."""
    if scaling.attention_factor is not None or scaling.kind != "yarn":
        return scaling.attention_factor or 1.0
    weights = (scaling.mscale, scaling.mscale_all_dim) if scaling.mscale and scaling.mscale_all_dim else (1.0, 0.0)
    above, below = (0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0 for weight in weights)
    return above / below


def _query_factors(config: ModelConfig) -> tuple[str, ...]:
    """What a factor on the queries can be moved into."""
    if config.mla:
        return ("layers/attention/query_up/kernel" if config.mla.q_rank else "layers/attention/query/kernel",)
    if config.qk_norm in ("head", "projection"):
        return ("layers/attention/query_norm/scale",)
    if config.qk_norm == "unit":
        raise UserError("a factor on queries cannot be moved into weights in front of a norm without a scale")
    return ("layers/attention/query/kernel", "layers/attention/query/bias")


def _turned(config: ModelConfig) -> tuple[str, ...]:
    if config.mla:
        return (*_query_factors(config), "layers/attention/key_rope/kernel")
    names = ["query/kernel", "key/kernel", "query/bias", "key/bias"]
    if config.qk_norm in ("head", "projection"):
        names += ["query_norm/scale", "key_norm/scale"]
    return tuple(f"layers/attention/{name}" for name in names)


def _reorder(config: ModelConfig, path: str, interleaved: bool) -> Callable[[np.ndarray], np.ndarray]:
    """The last axis with its turned dimensions in pairs of neighbours, or in halves."""
    size, half = config.rotated_dim, config.rotated_dim // 2
    start = config.mla.nope_head_dim if config.mla and not path.endswith("key_rope/kernel") else 0
    pairs = np.arange(size).reshape(2, half).T.reshape(-1)  # interleaved position -> position in halves
    order = pairs if interleaved else np.argsort(pairs)

    def apply(array: np.ndarray) -> np.ndarray:
        turned = array[..., start : start + size][..., order]
        return np.concatenate([array[..., :start], turned, array[..., start + size :]], axis=-1)

    return apply
