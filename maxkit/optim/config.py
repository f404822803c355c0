# SPDX-License-Identifier: Apache-2.0
"""What the optimizer is told. Composed by `maxkit/config.py`; imports no JAX."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class OptimizerConfig(BaseModel):
    """The update rule, its learning rate over the run, clipping and weight decay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: Literal["adamw", "adam_pax", "sgd"] = Field(
        "adamw",
        description="adamw (Adam with decoupled weight decay), adam_pax or sgd; adam_pax is the same update from"
        " moments that are stored bias-corrected, as Paxml does; sgd takes the gradient itself.",
    )
    learning_rate: float = Field(1e-4, ge=0, description="The highest learning rate of the run.")
    learning_rate_schedule: Literal["constant", "cosine", "linear", "wsd"] = Field(
        "cosine",
        description="Shape after the warmup: constant, cosine, linear or wsd; cosine and linear go down to the final"
        " fraction; wsd stays at the top and falls linearly in the last wsd_decay_steps_fraction of the run.",
    )
    warmup_steps_fraction: float = Field(
        0.1, ge=0, le=1, description="Part of the run in which the learning rate rises linearly."
    )
    learning_rate_final_fraction: float = Field(
        0.1, ge=0, le=1, description="Learning rate at the end of the run, as a fraction of the highest."
    )
    wsd_decay_steps_fraction: float = Field(
        0.1, gt=0, le=1, description="Part of the run in which wsd falls to the final fraction."
    )
    adam_b1: float = Field(0.9, ge=0, lt=1, description="Decay of Adam's mean of gradients, per step.")
    adam_b2: float = Field(0.95, ge=0, lt=1, description="Decay of Adam's mean of squares, per step.")
    adam_eps: float = Field(1e-8, gt=0, description="Added to the root of Adam's mean of squares.")
    weight_decay: float = Field(
        0.1,
        ge=0,
        description="Decoupled weight decay, times the learning rate; matrices only, never norms or biases.",
    )
    gradient_clipping_threshold: float = Field(
        1.0, ge=0, description="Largest norm of all gradients together, longer ones are shortened; 0: off."
    )

    @model_validator(mode="after")
    def _warmup_and_decay_fit(self) -> "OptimizerConfig":
        both = self.warmup_steps_fraction + self.wsd_decay_steps_fraction
        if self.learning_rate_schedule == "wsd" and both > 1:
            raise ValueError(
                f"warmup_steps_fraction={self.warmup_steps_fraction} and wsd_decay_steps_fraction="
                f"{self.wsd_decay_steps_fraction} together exceed the run"
            )
        return self
