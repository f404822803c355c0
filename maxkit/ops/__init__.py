# SPDX-License-Identifier: Apache-2.0
"""Array functions without parameters: attention, tiled functions of logits.

The functions carry the names of their files, so they are imported at once: a lazy name would be shadowed by its module.
"""

from maxkit.ops.attention import AttentionCall, KernelChoice, attention, choose_kernel, reference_attention
from maxkit.ops.cross_entropy import cross_entropy
from maxkit.ops.divergence import divergence, token_divergence, token_divergence_top_k
from maxkit.ops.token_logps import token_logps
from maxkit.ops.visibility import Span, Visibility

__all__ = [
    "AttentionCall",
    "KernelChoice",
    "Span",
    "Visibility",
    "attention",
    "choose_kernel",
    "cross_entropy",
    "divergence",
    "reference_attention",
    "token_divergence",
    "token_divergence_top_k",
    "token_logps",
]
