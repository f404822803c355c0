# SPDX-License-Identifier: Apache-2.0
"""Compiles ahead of time with the real TPU compiler, on a machine without a TPU. Does not import JAX."""

from maxkit.lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Memory": "maxkit.plan.report:Memory",
        "Plan": "maxkit.plan.report:Plan",
        "main": "maxkit.plan.command:main",
        "plan": "maxkit.plan.command:plan",
    },
)
