# SPDX-License-Identifier: Apache-2.0
"""Learning from a teacher's next-token distributions, of a model beside the student or stored with the data.

The divergence itself is `divergence`, a function of log-probs [..., V] (`ops/divergence.py` also has it by tiles).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxkit import ops
from maxkit.errors import UserError
from maxkit.lazy import make_callable
from maxkit.objectives import routing
from maxkit.ops import divergence
from maxkit.ops.divergence import Divergence
from maxkit.types import Batch, LossOut

__all__ = ["DIVERGENCES", "Distill", "divergence"]

DIVERGENCES = ("forward", "reverse", "jensen_shannon")


@dataclasses.dataclass(frozen=True)
class Distill:
    """Mean over trained tokens of the divergence from the teacher, mixed with the data's own likelihood.

        loss = temperature^2 sum_t m_t D(teacher_t, student_t) / M + nll_weight sum_t m_t nll_t / M      M = sum_t m_t

    m is `batch.loss_mask`. temperature^2 keeps the gradient's size (Hinton et al. 2015, arXiv 1503.02531, section 2).

    teacher: the teacher's `ModelDefinition`, whose parameters are `frozen`; of any width, depth and layout, but with
        the student's vocabulary. None: the batch has the columns `teacher_ids` and `teacher_logps` [B, T, K], the K
        likeliest tokens and their log-probs at `temperature` (`ops.token_divergence_top_k` says what becomes of the
        rest).
    divergence: "forward" KL(teacher || student), "reverse" KL(student || teacher), or "jensen_shannon" of weight
        `mixture` for the teacher.
    num_tiles: tiles of the vocabulary projections of both.

    Metrics, means over trained tokens: `kl` (the divergence, not multiplied by temperature^2), `loss/nll`.
    Differs: Tunix 0.1.7 has no mask, its means run over prompts and padding.

    Raises:
        UserError: unknown divergence, values out of range, another vocabulary, no teacher.
    """

    teacher: Any = None
    divergence: Divergence = "forward"
    temperature: float = 1.0
    nll_weight: float = 0.0
    num_tiles: int = 4
    mixture: float = 0.5

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise UserError(f"divergence={self.divergence!r} is unknown; allowed: {', '.join(DIVERGENCES)}")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be a positive number")
        if not 0 < self.mixture < 1:
            raise UserError(f"mixture={self.mixture} must be between 0 and 1; for the ends use forward or reverse")
        if not 0 <= self.nll_weight < float("inf"):
            raise UserError(f"nll_weight={self.nll_weight} must be 0 or a positive number")

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """{"tokens": M}, at least 1."""
        return {"tokens": jnp.maximum(jnp.sum(batch.loss_mask), 1.0)}

    def __call__(self, model: Any, batch: Batch, frozen: Any, weights: dict[str, jax.Array]) -> LossOut:
        """The part of the loss that this micro-batch contributes."""
        hidden = model.hidden(batch.tokens, batch.positions, segment_ids=batch.segment_ids)
        x, table = model.head_operands(hidden.x)
        if self.teacher is None:
            function: Callable = ops.token_divergence_top_k
            teacher = self._stored(batch)
        else:
            function = functools.partial(ops.token_divergence, teacher_soft_cap=self.teacher.config.final_soft_cap)
            teacher = self._teacher_operands(model, batch, frozen)
        apart, logps = function(
            x,
            table,
            *teacher,
            batch.targets,
            batch.loss_mask,
            num_tiles=self.num_tiles,
            kind=self.divergence,
            mixture=self.mixture,
            temperature=self.temperature,
            soft_cap=model.config.final_soft_cap,
        )
        kl, nll = jnp.sum(batch.loss_mask * apart), -jnp.sum(batch.loss_mask * logps)
        total = self.temperature**2 * kl + self.nll_weight * nll
        tokens = weights["tokens"]
        return LossOut(
            total / tokens,
            {"tokens": total},
            {"kl": kl / tokens, "loss/nll": nll / tokens},
            statistics=routing.statistics(hidden.aux, batch),
        )

    def _teacher_operands(self, model: Any, batch: Batch, frozen: Any) -> tuple[jax.Array, jax.Array]:
        ours, theirs = model.config.vocab_size, self.teacher.config.vocab_size
        if ours != theirs:
            raise UserError(
                f"the teacher has a vocabulary of {theirs} and the student of {ours}: distillation compares token by "
                "token and needs one tokenizer"
            )
        if frozen is None:
            raise UserError("the teacher's parameters are missing: they are the step's `frozen` argument")
        teacher = self.teacher.merge(jax.lax.stop_gradient(frozen))
        x = teacher.hidden(batch.tokens, batch.positions, segment_ids=batch.segment_ids).x
        return jax.lax.stop_gradient(teacher.head_operands(x))

    @staticmethod
    def _stored(batch: Batch) -> tuple[jax.Array, jax.Array]:
        missing = {"teacher_ids", "teacher_logps"} - batch.columns.keys()
        if missing:
            raise UserError(
                f"without a teacher the batch needs the columns teacher_ids and teacher_logps; missing: "
                f"{', '.join(sorted(missing))}"
            )
        return batch.columns["teacher_ids"], batch.columns["teacher_logps"]


make_callable(__name__, Distill)
