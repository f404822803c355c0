# SPDX-License-Identifier: Apache-2.0
"""maxkit: train language models in JAX, from notebooks. Names are imported when first used."""

from maxkit.lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__ = attach(
    __name__,
    {
        "load": "maxkit.checkpoint.load:load",
        "save": "maxkit.checkpoint.save:save",
        "generate": "maxkit.infer.generate:generate",
        "bind": "maxkit.nb.bind:bind",
        "run": "maxkit.run",
        "nb": "maxkit.nb",
        "plan": "maxkit.plan",
        "objectives": "maxkit.objectives",
        "ops": "maxkit.ops",
        "optim": "maxkit.optim",
        "infer": "maxkit.infer",
        "eval": "maxkit.eval",
        "interop": "maxkit.interop",
        "UserError": "maxkit.errors:UserError",
    },
)
