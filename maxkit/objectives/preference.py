# SPDX-License-Identifier: Apache-2.0
"""Learning from pairs of answers of which one is preferred: DPO and its relatives.

A pair lies in one row: chosen is an odd segment, rejected the even one after it (docs/design/011-post-training.md).
The formulas below are functions of arrays of any one shape, a number a pair, NumPy's or JAX's. They take

    margins = (chosen - reference of chosen) - (rejected - reference of rejected)

of log-probs of whole answers: sums over tokens, or means where the loss says so (`USES_MEANS`).

KTO (Ethayarajh et al. 2024, arXiv 2402.01306) is left out: it has no pairs, and its reference point is a mean over
mismatched answers of the whole update inside a sigmoid. That is not a sum over sequences, so it would be the one
objective whose update depends on how the batch is split.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from maxkit.errors import UserError
from maxkit.lazy import make_callable
from maxkit.objectives import routing, segments
from maxkit.objectives.forward import score
from maxkit.types import Batch, LossOut

Loss = Literal["sigmoid", "robust", "ipo", "hinge", "orpo", "simpo"]
LOSSES = ("sigmoid", "robust", "ipo", "hinge", "orpo", "simpo")
REFERENCE_FREE = ("orpo", "simpo")
USES_MEANS = ("ipo", "orpo", "simpo")
SMOOTHED = ("sigmoid", "robust", "orpo", "simpo")


def sigmoid(margins: jax.Array, beta: float = 0.1, label_smoothing: float = 0.0) -> jax.Array:
    """DPO on margins h, with label smoothing s.

        -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; s (Mitchell 2023, "cDPO") is the chance that a label is wrong.
    Equal to Tunix 0.1.7 within 2e-5 (tests/unit/test_tunix_parity.py).
    """
    scaled = beta * margins
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled) - label_smoothing * jax.nn.log_sigmoid(-scaled)


def robust(margins: jax.Array, beta: float = 0.1, label_smoothing: float = 0.0) -> jax.Array:
    """DPO whose mean over labels wrong with chance s is the loss of right labels; it can be negative.

        (-(1 - s) log sigmoid(beta h) + s log sigmoid(-beta h)) / (1 - 2 s),   s < 1/2

    Chowdhury et al. 2024, arXiv 2403.00409, equation 12. Equal to TRL's `robust` within 2e-5.
    """
    scaled, s = beta * margins, label_smoothing
    return (s * jax.nn.log_sigmoid(-scaled) - (1 - s) * jax.nn.log_sigmoid(scaled)) / (1 - 2 * s)


def ipo(margins: jax.Array, beta: float = 0.1) -> jax.Array:
    """IPO: (h - 1 / (2 beta))^2. Azar et al. 2023, arXiv 2310.12036, equation 17, whose tau is beta here.

    `Preference` gives it margins of means over tokens, as TRL does.
    """
    return jnp.square(margins - 1 / (2 * beta))


def hinge(margins: jax.Array, beta: float = 0.1) -> jax.Array:
    """max(0, 1 - beta h). Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425, with DPO's margins, as TRL does."""
    return jax.nn.relu(1 - beta * margins)


def odds_ratio(chosen: jax.Array, rejected: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """ORPO's second term: the sigmoid loss of log(odds of chosen / odds of rejected), odds p / (1 - p).

    Hong et al. 2024, arXiv 2403.07691, equations 4 to 7, with p = exp(mean log-prob of a token). `Preference` adds the
    chosen answers' negative log-likelihood. Equal to TRL's and, on its log-probs, to Tunix's term within 2e-5.
    """
    # Float32 cannot tell p from 1 above 1 - 1e-6; there the odds would be infinite and their gradient not a number.
    chosen, rejected = jnp.minimum(chosen, -1e-6), jnp.minimum(rejected, -1e-6)
    odds = (chosen - rejected) - (jnp.log(-jnp.expm1(chosen)) - jnp.log(-jnp.expm1(rejected)))
    return sigmoid(odds, 1.0, label_smoothing)


def simpo(
    chosen: jax.Array, rejected: jax.Array, beta: float = 2.0, margin: float = 0.5, label_smoothing: float = 0.0
) -> jax.Array:
    """SimPO: the sigmoid loss of beta (chosen - rejected) - margin, of mean log-probs, without a reference.

    Meng et al. 2024, arXiv 2405.14734, equation 6. Equal to TRL's within 2e-5.
    """
    return sigmoid(beta * (chosen - rejected) - margin, 1.0, label_smoothing)


@dataclasses.dataclass(frozen=True)
class Preference:
    """Mean preference loss over pairs, plus the chosen answers' likelihood where it is asked for.

        loss = scale sum_pairs l / P + nll_weight sum_{t of chosen} -logp_t / M

    P pairs both of whose sides have a trained token (others count nothing), M trained tokens of chosen answers; both
    counted over the whole update. scale is beta for ORPO (its lambda), else 1.

    loss: which formula. beta: its strength. label_smoothing: chance of a wrong label, of `SMOOTHED` losses.
    margin: SimPO's gamma. nll_weight: None is 1 for ORPO (part of it), 0 for all others.
    num_tiles: tiles of the vocabulary projection.

    Batch columns: `ref_logps` [B, T], unless the loss is reference-free.
    Metrics, means over pairs, named as in TRL: `rewards/chosen` and `rewards/rejected` (beta times log-prob over
    reference), `rewards/margins`, `rewards/accuracies` (share of pairs with a positive margin), `logps/chosen`,
    `logps/rejected` (sums over tokens, or means for `USES_MEANS`), and `loss/nll`. Not in TRL: `logps/accuracies`, the
    share of pairs whose chosen answer has the higher mean log-prob of a token. It needs no reference, so it can be
    compared before and after.

    Raises:
        UserError: unknown loss, values out of range, a smoothing that the loss does not know, no `ref_logps`.
    """

    loss: Loss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.5
    nll_weight: float | None = None
    num_tiles: int = 4

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"preference loss {self.loss!r} is unknown; allowed: {', '.join(LOSSES)}")
        if not 0 < self.beta < float("inf"):
            raise UserError(f"beta={self.beta} must be a positive number for preference losses")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise UserError(
                f"label_smoothing={self.label_smoothing} means nothing to loss {self.loss!r}: leave it at 0, or use "
                f"{', '.join(SMOOTHED)}"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the batch must have `ref_logps`."""
        return self.loss not in REFERENCE_FREE

    @property
    def likelihood(self) -> float:
        """The weight of the chosen answers' negative log-likelihood."""
        return float(self.loss == "orpo") if self.nll_weight is None else self.nll_weight

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """{"pairs": P, "tokens": M}, at least 1 each; tokens only where the likelihood is in the loss."""
        weights = {"pairs": jnp.maximum(jnp.sum(_complete(batch)), 1.0)}
        if self.likelihood:
            weights["tokens"] = jnp.maximum(jnp.sum(_chosen_mask(batch)), 1.0)
        return weights

    def __call__(self, model: Any, batch: Batch, frozen: Any, weights: dict[str, jax.Array]) -> LossOut:
        """The part of the loss that this micro-batch contributes."""
        scored = score(model, batch, num_tiles=self.num_tiles)
        mask, complete = batch.loss_mask, _complete(batch)
        logps, reference = mask * scored.logps, mask * self._reference(batch)
        chosen, rejected = self._answers(logps, batch)
        likelier, unlikelier = segments.pairs(_means(logps, batch))
        ref_chosen, ref_rejected = self._answers(reference, batch)
        losses = self.losses(chosen, rejected, ref_chosen, ref_rejected)
        total, pairs = jnp.sum(complete * losses), weights["pairs"]
        loss, terms = (self.beta if self.loss == "orpo" else 1.0) * total / pairs, {"pairs": total}
        won, lost = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
        found = {
            "rewards/chosen": won,
            "rewards/rejected": lost,
            "rewards/margins": won - lost,
            "rewards/accuracies": (won > lost).astype(jnp.float32),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "logps/accuracies": (likelier > unlikelier).astype(jnp.float32),
        }
        metrics = {name: jnp.sum(complete * value) / pairs for name, value in found.items()}
        if self.likelihood:
            terms["tokens"] = -jnp.sum(_chosen_mask(batch) * scored.logps)
            metrics["loss/nll"] = terms["tokens"] / weights["tokens"]
            loss = loss + self.likelihood * metrics["loss/nll"]
        return LossOut(loss, terms, metrics, statistics=routing.statistics(scored.aux, batch))

    def losses(
        self, chosen: jax.Array, rejected: jax.Array, ref_chosen: jax.Array, ref_rejected: jax.Array
    ) -> jax.Array:
        """The loss of each pair from its answers' log-probs (the references' are not read by reference-free losses)."""
        margins = (chosen - ref_chosen) - (rejected - ref_rejected)
        match self.loss:
            case "sigmoid":
                return sigmoid(margins, self.beta, self.label_smoothing)
            case "robust":
                return robust(margins, self.beta, self.label_smoothing)
            case "ipo":
                return ipo(margins, self.beta)
            case "hinge":
                return hinge(margins, self.beta)
            case "orpo":
                return odds_ratio(chosen, rejected, self.label_smoothing)
            case "simpo":
                return simpo(chosen, rejected, self.beta, self.margin, self.label_smoothing)

    def _reference(self, batch: Batch) -> jax.Array:
        if not self.needs_reference:
            return jnp.zeros_like(batch.loss_mask)
        if "ref_logps" not in batch.columns:
            raise UserError(
                f"loss {self.loss!r} compares with a reference: the batch needs the column 'ref_logps', or use one of "
                f"{', '.join(REFERENCE_FREE)}"
            )
        return batch.columns["ref_logps"]

    def _answers(self, logps: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """[B, P] each: the log-probs of chosen and rejected answers; 0 where a pair is not there."""
        of_answers = _means(logps, batch) if self.loss in USES_MEANS else segments.sums(logps, batch.segment_ids)
        return segments.pairs(of_answers)


def _means(logps: jax.Array, batch: Batch) -> jax.Array:
    """[B, T + 1] by segment: the mean of `logps`, which is 0 where nothing is trained, over the trained tokens."""
    return segments.sums(logps, batch.segment_ids) / jnp.maximum(segments.sums(batch.loss_mask, batch.segment_ids), 1.0)


def _complete_chosen(batch: Batch) -> jax.Array:
    """[B, T + 1] float32 by segment: 1 at odd ones where both sides of the pair have a trained token."""
    trained = segments.sums(batch.loss_mask, batch.segment_ids) > 0
    return (trained & jnp.roll(trained, -1, axis=1)).astype(jnp.float32) * (jnp.arange(trained.shape[1]) % 2)


def _complete(batch: Batch) -> jax.Array:
    """[B, P] float32: 1 where both sides of the pair have a trained token."""
    return segments.pairs(_complete_chosen(batch))[0]


def _chosen_mask(batch: Batch) -> jax.Array:
    """[B, T] float32: `loss_mask` at chosen answers whose pair is complete."""
    return batch.loss_mask * segments.spread(_complete_chosen(batch), batch.segment_ids)


make_callable(__name__, Preference)
