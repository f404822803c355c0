# SPDX-License-Identifier: Apache-2.0
"""What is minimised. An objective is a frozen dataclass with two methods:

- `weights(batch) -> {term: denominator}`, from batch columns alone, over the whole update
- `__call__(model, batch, frozen, weights) -> LossOut` of one micro-batch, already divided by the weights

`objectives.preference(loss="ipo")` makes one; `objectives.preference.ipo(...)` is its formula as a function of
log-probs, masks and rewards, usable without a model. The same for `next_token`, `policy` and `distill`.
"""

import types

from maxkit.objectives import distill, next_token, policy, preference
from maxkit.objectives.distill import Distill
from maxkit.objectives.next_token import NextToken
from maxkit.objectives.policy import Policy
from maxkit.objectives.preference import Preference

__all__ = ["Distill", "NextToken", "Policy", "Preference", "distill", "next_token", "policy", "preference"]


class _CallableModule(types.ModuleType):
    """A module of formulas that, called, makes the objective they belong to."""

    def __call__(self, *arguments, **named):
        return self.__objective__(*arguments, **named)


for _module, _objective in ((distill, Distill), (next_token, NextToken), (policy, Policy), (preference, Preference)):
    _module.__class__ = _CallableModule
    vars(_module)["__objective__"] = _objective
