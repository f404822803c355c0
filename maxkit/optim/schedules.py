# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a function of the number of updates already done.

Differs from MaxText: the warmup of w steps rises as (step + 1) / (w + 1), so that the first update is not
wasted on a learning rate of 0, and beyond the end the rate stays at its final value instead of falling to 0.
"""

import jax
import optax

from maxkit.optim.config import OptimizerConfig


def make_schedule(cfg: OptimizerConfig, total_steps: int, peak: float | jax.Array | None = None) -> optax.Schedule:
    """A function from the step (0 is the first update) to the learning rate; works on traced steps.

    `peak` replaces `cfg.learning_rate` and may be traced.
    """
    peak = cfg.learning_rate if peak is None else peak
    warmup = int(cfg.warmup_steps_fraction * total_steps)
    rest = _after_warmup(cfg, peak, total_steps, warmup)
    if not warmup:
        return rest
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), rest], [warmup])


def learning_rate_at(cfg: OptimizerConfig, total_steps: int, step: int) -> float:
    """The learning rate of update number `step`, 0 being the first, in a run of `total_steps`."""
    return float(make_schedule(cfg, total_steps)(step))


def _after_warmup(cfg: OptimizerConfig, peak: float | jax.Array, total_steps: int, warmup: int) -> optax.Schedule:
    steps = max(total_steps - warmup, 1)
    final = cfg.learning_rate_final_fraction
    if cfg.learning_rate_schedule == "constant":
        return optax.constant_schedule(peak)
    if cfg.learning_rate_schedule == "linear":
        return optax.linear_schedule(peak, peak * final, steps)
    if cfg.learning_rate_schedule == "cosine":
        return optax.cosine_decay_schedule(peak, steps, final)
    falling = max(int(cfg.wsd_decay_steps_fraction * total_steps), 1)
    return optax.linear_schedule(peak, peak * final, falling, transition_begin=max(steps - falling, 0))
