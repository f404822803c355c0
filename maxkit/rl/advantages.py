# SPDX-License-Identifier: Apache-2.0
"""Advantages from rewards: how much better an answer is than the others to its prompt.

All take rewards [N] with the `group_size` answers to one prompt side by side, and give float64 NumPy [N], on the host:
there are as many numbers as answers. Next to read: `objectives/policy.py`, `batches.py`.
"""

import numpy as np
from numpy.typing import ArrayLike

from maxkit.errors import UserError


def group_std(rewards: ArrayLike, group_size: int, epsilon: float = 1e-6) -> np.ndarray:
    """(r - mean of its group) / (standard deviation of its group + epsilon), the deviation with N - 1.

    GRPO: Shao et al. 2024, arXiv 2402.03300, section 4.1.2. Equal to Tunix 0.1.7 within 1e-6; TRL's epsilon is 1e-4.
    """
    groups = _groups(rewards, group_size)
    return _centred(groups) / (groups.std(axis=1, ddof=1) + epsilon).repeat(group_size)


def group_mean(rewards: ArrayLike, group_size: int) -> np.ndarray:
    """R - mean of its group. Dr.GRPO: Liu et al. 2025, arXiv 2503.20783, section 3.2. Equal to Tunix within 1e-6."""
    return _centred(_groups(rewards, group_size))


def leave_one_out(rewards: ArrayLike, group_size: int) -> np.ndarray:
    """R - mean of the others of its group. RLOO: Ahmadian et al. 2024, arXiv 2402.14740. Equal to Tunix within 1e-6."""
    return _centred(_groups(rewards, group_size)) * (group_size / (group_size - 1))


def zero_variance(rewards: ArrayLike, group_size: int) -> np.ndarray:
    """[N / group_size] bool: the groups whose answers all have one reward, from which nothing is learnt.

    Their mean is TRL's `frac_reward_zero_std`.
    """
    groups = _groups(rewards, group_size)
    return (groups == groups[:, :1]).all(axis=1)


def generalised(
    rewards: ArrayLike, values: ArrayLike, mask: ArrayLike, gamma: float = 1.0, lam: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns) [B, T] of tokens, from their rewards and a critic's values; for PPO, as Tunix has it.

        A_t = d_t + gamma lam A_{t+1},   d_t = r_t + gamma V_{t+1} - V_t,   returns = A + V

    Schulman et al. 2015 (GAE), arXiv 1506.02438, equation 16. Tokens of mask 0 are passed over; behind the last token
    of mask 1 the value is 0. Equal to Tunix 0.1.7 within 1e-6, before it whitens (`whiten`).
    """
    rewards, values, mask = (np.asarray(x, np.float64) for x in (rewards, values, mask))
    advantages = np.zeros_like(rewards)
    after, value_after = np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        found = rewards[:, t] + gamma * value_after - values[:, t] + gamma * lam * after
        there = mask[:, t] > 0
        advantages[:, t] = np.where(there, found, 0.0)
        after, value_after = np.where(there, found, after), np.where(there, values[:, t], value_after)
    return advantages, advantages + values


def whiten(advantages: ArrayLike, mask: ArrayLike, epsilon: float = 1e-8) -> np.ndarray:
    """(A - mean) / sqrt(variance + epsilon) over tokens of mask 1, the variance with N - 1; others are moved along."""
    values, counts = np.asarray(advantages, np.float64), np.asarray(mask) > 0
    return (values - values[counts].mean()) / np.sqrt(values[counts].var(ddof=1) + epsilon)


def _centred(groups: np.ndarray) -> np.ndarray:
    """[N]: exactly 0 where a group has one reward, whose mean may be rounded."""
    same = (groups == groups[:, :1]).all(axis=1, keepdims=True)
    return np.where(same, 0.0, groups - groups.mean(axis=1, keepdims=True)).ravel()


def _groups(rewards: ArrayLike, group_size: int) -> np.ndarray:
    """[groups, group_size] float64.

    Raises:
        UserError: fewer than two answers a group, a number of rewards that is no multiple, a reward that is no number.
    """
    values = np.asarray(rewards, np.float64)
    if group_size < 2:
        raise UserError(f"a group of {group_size} has nothing to compare: num_generations must be at least 2")
    if values.ndim != 1 or values.size % group_size:
        raise UserError(f"rewards of shape {values.shape} are not groups of {group_size} answers to each prompt")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UserError(f"the reward of answer {row} is {values[row]}: rewards must be finite numbers")
    return values.reshape(-1, group_size)
