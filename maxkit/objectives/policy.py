# SPDX-License-Identifier: Apache-2.0
"""Learning from rewards: one clipped policy gradient, of which GRPO, Dr.GRPO, DAPO, GSPO and RLOO are choices.

    aggregation  x  level of the ratio  x  clipping  x  advantage (`rl/advantages.py`)  x  KL

The formulas are functions of arrays [B, T], NumPy's or JAX's. A truncated answer is left out by a `loss_mask` of 0:
then it counts neither as tokens nor as a sequence.
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

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "sequence_scale"]
RatioLevel = Literal["token", "sequence"]
KlEstimator = Literal["k1", "k2", "k3"]
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "sequence_scale")
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
# exp(20) is 5e8: no ratio of a policy to its own recent past, but still a number that float32 can square.
MAX_LOG_RATIO = 20.0


def log_ratios(
    logps: jax.Array,
    old_logps: jax.Array | None,
    mask: jax.Array,
    segment_ids: jax.Array | None = None,
    level: RatioLevel = "token",
) -> jax.Array:
    """[B, T]: log of the policy over the policy that sampled; 0, with the gradient of `logps`, without `old_logps`.

    token: logps - old_logps (PPO, Schulman et al. 2017, arXiv 1707.06347).
    sequence: its mean over the sequence's tokens, at each of them, with each token's own gradient (GSPO-token, Zheng
    et al. 2025, arXiv 2507.18071, equations 13 to 15).

    Args:
        logps, old_logps, mask: [B, T]; 0 where the mask is 0.
        segment_ids: [B, T], None for one sequence a row.
        level: "token" or "sequence".
    """
    counts = mask > 0
    now = jax.lax.stop_gradient(logps)
    difference = jnp.where(counts, logps - (now if old_logps is None else old_logps), 0.0)
    if level == "sequence":
        mean = jax.lax.stop_gradient(_sequence_mean(difference, counts.astype(jnp.float32), segment_ids))
        difference = jnp.where(counts, mean + logps - now, 0.0)
    return jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    log_ratio: jax.Array,
    advantages: jax.Array,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
) -> jax.Array:
    """Loss of each token: -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), with r = exp(log_ratio).

    PPO, arXiv 1707.06347, equation 7; a larger epsilon_high is DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476,
    equation 10). dual_clip c bounds the loss of A < 0 by -c A (Ye et al. 2019, arXiv 1912.09729, equation 5); TRL's
    `delta` is the same bound. Equal to Tunix 0.1.7 and to TRL within 2e-5 (tests/unit/test_tunix_parity.py).
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    loss = jnp.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip is None:
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def clipped(
    log_ratio: jax.Array, advantages: jax.Array, epsilon_low: float = 0.2, epsilon_high: float = 0.2
) -> tuple[jax.Array, jax.Array]:
    """(low, high), bool: tokens whose ratio is clipped and whose gradient is therefore 0.

    low: A < 0 and the ratio below 1 - epsilon_low; high: A > 0 and the ratio above 1 + epsilon_high (as in TRL).
    """
    ratio = jnp.exp(log_ratio)
    return (ratio < 1 - epsilon_low) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)


def kl(logps: jax.Array, ref_logps: jax.Array, estimator: KlEstimator = "k3") -> jax.Array:
    """Estimates of KL(policy || reference) at sampled tokens, with d = logps - ref_logps (Schulman 2020).

    k1: d, whose gradient is 0 in expectation. k2: d^2 / 2. k3: exp(-d) - 1 + d (GRPO, Shao et al. 2024, arXiv
    2402.03300, equation 4). Equal to Tunix's `kl`, `mse_kl` and `low_var_kl` within 2e-5; the exponent is at most 20.
    """
    difference = logps - ref_logps
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return jnp.square(difference) / 2
    return jnp.expm1(jnp.clip(-difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)) + difference


def token_weights(mask: jax.Array, segment_ids: jax.Array | None = None, aggregation: Aggregation = "token_mean"):
    """[B, T]: what each token counts, before the division by `denominator`."""
    if aggregation != "sequence_mean":
        return mask
    if segment_ids is None:
        return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
    lengths = segments.spread(segments.sums(mask, segment_ids), segment_ids)
    return mask / jnp.maximum(lengths, 1.0)


def denominator(
    mask: jax.Array,
    segment_ids: jax.Array | None = None,
    aggregation: Aggregation = "token_mean",
    max_tokens: int | None = None,
) -> jax.Array:
    """The tokens, the sequences, or the sequences times `max_tokens`, over the whole update; at least 1.

    Only sequences with a token of mask 1 count.
    """
    if aggregation == "token_mean":
        return jnp.maximum(jnp.sum(mask), 1.0)
    lengths = jnp.sum(mask, axis=1) if segment_ids is None else segments.sums(mask, segment_ids)
    sequences = jnp.maximum(jnp.sum((lengths > 0).astype(jnp.float32)), 1.0)
    return sequences * max_tokens if aggregation == "sequence_scale" else sequences


def aggregate(
    values: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array | None = None,
    aggregation: Aggregation = "token_mean",
    max_tokens: int | None = None,
) -> jax.Array:
    """One number from values [B, T] of tokens.

        token_mean      sum of all tokens / number of tokens                 DAPO, arXiv 2503.14476, equation 8
        sequence_mean   mean over sequences of their tokens' mean            GRPO, arXiv 2402.03300, equation 3
        sequence_sum    mean over sequences of their tokens' sum             RLOO, arXiv 2402.14740
        sequence_scale  the same / max_tokens, a constant                    Dr.GRPO, arXiv 2503.20783, section 3.2

    Differs: Tunix's scale is the padded width of the batch, so its update depends on what was sampled.
    """
    weights = token_weights(mask, segment_ids, aggregation)
    return jnp.sum(weights * values) / denominator(mask, segment_ids, aggregation, max_tokens)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Aggregate over tokens of the clipped surrogate + beta KL to the reference.

    aggregation, max_tokens: how tokens are added up (`aggregate`); max_tokens only for sequence_scale.
    ratio_level: "token", or "sequence" for GSPO (`log_ratios`).
    epsilon_low, epsilon_high, dual_clip: the clip range (`clipped_surrogate`).
    beta, kl_estimator: weight and kind of the KL to the reference; 0 leaves it out.
    temperature: of the log-probs; that at which was sampled.
    num_tiles: tiles of the vocabulary projection.

    Batch columns, [B, T]: `advantages`; `old_logps` where more than one update is made of a rollout; `ref_logps` where
    beta is above 0.
    Metrics, means over tokens, named as in TRL: `entropy`; `kl` (k3, where there is `ref_logps`);
    `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean` (either).

    Raises:
        UserError: unknown names, values out of range, a column that is missing.
    """

    aggregation: Aggregation = "token_mean"
    ratio_level: RatioLevel = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    beta: float = 0.0
    kl_estimator: KlEstimator = "k3"
    temperature: float = 1.0
    num_tiles: int = 4
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("aggregation", AGGREGATIONS),
            ("ratio_level", RATIO_LEVELS),
            ("kl_estimator", KL_ESTIMATORS),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; allowed: {', '.join(allowed)}")
        if (self.aggregation == "sequence_scale") != (self.max_tokens is not None):
            raise UserError(
                f"max_tokens={self.max_tokens} with aggregation={self.aggregation!r}: sequence_scale divides by it and "
                "needs it, the others must leave it None"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.epsilon_low < 1:
            raise UserError(f"epsilon_low={self.epsilon_low} must be at least 0 and below 1")
        if not 0 <= self.epsilon_high < float("inf"):
            raise UserError(f"epsilon_high={self.epsilon_high} must be at least 0 and finite")
        if self.dual_clip is not None and not self.dual_clip >= 1 + self.epsilon_high:
            raise UserError(
                f"dual_clip={self.dual_clip} must be at least 1 + epsilon_high = {1 + self.epsilon_high}, or None"
            )
        if not 0 <= self.beta < float("inf"):
            raise UserError(f"beta={self.beta} must be 0 (no KL) or a positive number")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be a positive number")

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """{"tokens": trained tokens}, and {"sequences": the denominator} of the sequence aggregations."""
        mask = batch.loss_mask
        weights = {"tokens": denominator(mask)}
        if self.aggregation != "token_mean":
            weights["sequences"] = denominator(mask, batch.segment_ids, self.aggregation, self.max_tokens)
        return weights

    def __call__(self, model: Any, batch: Batch, frozen: Any, weights: dict[str, jax.Array]) -> LossOut:
        """The part of the loss that this micro-batch contributes; `terms` are its sums, by token if need be both."""
        scored = score(model, batch, num_tiles=self.num_tiles, temperature=self.temperature)
        mask, segment_ids = batch.loss_mask, batch.segment_ids
        advantages, reference = self._column(batch, "advantages", True), self._column(batch, "ref_logps", self.beta > 0)
        ratio = log_ratios(scored.logps, self._column(batch, "old_logps", False), mask, segment_ids, self.ratio_level)
        losses = clipped_surrogate(ratio, advantages, self.epsilon_low, self.epsilon_high, self.dual_clip)
        if self.beta:
            losses = losses + self.beta * kl(scored.logps, reference, self.kl_estimator)
        low, high = clipped(ratio, advantages, self.epsilon_low, self.epsilon_high)
        found = {
            "entropy": scored.entropy,
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low | high,
        }
        if reference is not None:
            found["kl"] = jax.lax.stop_gradient(kl(scored.logps, reference))
        metrics = {name: jnp.sum(mask * value) / weights["tokens"] for name, value in found.items()}
        per_token = token_weights(mask, segment_ids, self.aggregation)
        sums = {"tokens": mask, "sequences": per_token}
        terms = {name: jnp.sum(sums[name] * losses) for name in weights}
        name = "tokens" if self.aggregation == "token_mean" else "sequences"
        return LossOut(terms[name] / weights[name], terms, metrics, statistics=routing.statistics(scored.aux, batch))

    @staticmethod
    def _column(batch: Batch, name: str, needed: bool) -> jax.Array | None:
        """A batch column, 0 where the mask is 0."""
        if name in batch.columns:
            return jnp.where(batch.loss_mask > 0, batch.columns[name], 0.0)
        if needed:
            why = " where beta is above 0" if name == "ref_logps" else ""
            here = ", ".join(sorted(batch.columns)) or "none"
            raise UserError(f"the policy objective needs the batch column {name!r}{why}; here: {here}")
        return None


def _sequence_mean(values: jax.Array, mask: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """[B, T]: the mean over each sequence's tokens of mask 1, at all of its tokens."""
    if segment_ids is None:
        total, count = (jnp.sum(x, axis=1, keepdims=True) for x in (mask * values, mask))
    else:
        total, count = (segments.spread(segments.sums(x, segment_ids), segment_ids) for x in (mask * values, mask))
    return total / jnp.maximum(count, 1.0) + jnp.zeros_like(values)


make_callable(__name__, Policy)
