# SPDX-License-Identifier: Apache-2.0
"""What is minimised. An objective is a frozen dataclass with two methods:

- `weights(batch) -> {term: denominator}`, from batch columns alone, over the whole update
- `__call__(model, batch, frozen, weights) -> LossOut` of one micro-batch, already divided by the weights

`next_token.NextToken`, `preference.Preference`, `policy.Policy` and `distill.Distill`; their modules also have each
formula as a function of log-probs, masks and rewards, usable without a model.
"""

from maxkit.objectives import distill, next_token, policy, preference
from maxkit.objectives.distill import Distill
from maxkit.objectives.next_token import NextToken
from maxkit.objectives.policy import Policy
from maxkit.objectives.preference import Preference

__all__ = ["Distill", "NextToken", "Policy", "Preference", "distill", "next_token", "policy", "preference"]
