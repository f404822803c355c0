# SPDX-License-Identifier: Apache-2.0
"""Optimizers on pure trees of arrays, and learning-rate schedules."""

from maxkit.lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "OptimizerConfig": "maxkit.optim.config:OptimizerConfig",
        "adam_pax": "maxkit.optim.adam_pax:adam_pax",
        "decay_mask": "maxkit.optim.optimizers:decay_mask",
        "learning_rate_at": "maxkit.optim.schedules:learning_rate_at",
        "make_optimizer": "maxkit.optim.optimizers:make_optimizer",
        "make_schedule": "maxkit.optim.schedules:make_schedule",
        "read_learning_rate": "maxkit.optim.optimizers:read_learning_rate",
        "set_learning_rate": "maxkit.optim.optimizers:set_learning_rate",
    },
)
