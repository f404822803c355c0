# SPDX-License-Identifier: Apache-2.0
"""What is minimised. An objective is a frozen dataclass with two methods:

- `weights(batch) -> {term: denominator}`, from batch columns alone, over the whole update
- `__call__(model, batch, frozen, weights) -> LossOut` of one micro-batch, already divided by the weights
"""

from maxkit.objectives.next_token import NextToken
from maxkit.objectives.next_token import NextToken as next_token

__all__ = ["NextToken", "next_token"]
