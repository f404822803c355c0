# SPDX-License-Identifier: Apache-2.0
"""Text out of a model: sampling, the decode engine, scoring. Names are imported when first used."""

from maxkit.lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Engine": "maxkit.infer.engine:Engine",
        "Completions": "maxkit.infer.engine:Completions",
        "Controls": "maxkit.infer.sampling:Controls",
        "sample": "maxkit.infer.sampling:sample",
        "sequence_logps": "maxkit.infer.score:sequence_logps",
        "token_logps": "maxkit.infer.score:token_logps",
    },
)
