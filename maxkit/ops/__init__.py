# SPDX-License-Identifier: Apache-2.0
"""Array functions without parameters: attention, tiled cross entropy.

The functions carry the names of their files, so they are imported at once: a lazy name would be shadowed by its module.
"""

from maxkit.ops.attention import Call, Choice, attention, choose, reference_attention
from maxkit.ops.cross_entropy import cross_entropy
from maxkit.ops.visibility import Span, Visibility

__all__ = [
    "Call",
    "Choice",
    "Span",
    "Visibility",
    "attention",
    "choose",
    "cross_entropy",
    "reference_attention",
]
