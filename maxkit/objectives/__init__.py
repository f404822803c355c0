# SPDX-License-Identifier: Apache-2.0
"""What is minimised. An objective is a frozen dataclass with two methods:

- `weights(batch) -> {term: denominator}`, from batch columns alone, over the whole update
- `__call__(model, batch, frozen, weights) -> LossOut` of one micro-batch, already divided by the weights

`objectives.preference(loss="ipo")` makes one; `objectives.preference.ipo(...)` is its formula as a function of
log-probs, masks and rewards, usable without a model. The same for `next_token`, `policy` and `distill`. Names are
imported when first used.
"""

from maxkit.lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Distill": "maxkit.objectives.distill:Distill",
        "NextToken": "maxkit.objectives.next_token:NextToken",
        "Policy": "maxkit.objectives.policy:Policy",
        "Preference": "maxkit.objectives.preference:Preference",
        **{name: f"maxkit.objectives.{name}" for name in ("distill", "next_token", "policy", "preference")},
    },
)
