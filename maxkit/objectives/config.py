# SPDX-License-Identifier: Apache-2.0
"""What the post-training losses are told by a recipe. Read by `build.py`; imports no JAX."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PreferenceConfig(BaseModel):
    """Which preference loss, and how sharply it compares the two answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Literal["sigmoid", "robust", "ipo", "hinge", "orpo", "simpo"] = Field(
        "sigmoid",
        description="sigmoid is DPO; robust, ipo and hinge compare with a reference too; orpo and simpo need none.",
    )
    beta: float = Field(0.1, gt=0, description="How much a difference of log-probabilities counts.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of the labels taken to be swapped (sigmoid and robust)."
    )
    margin: float = Field(0.5, ge=0, description="By how much the chosen answer shall win (simpo: gamma).")
    nll_weight: float | None = Field(
        None, ge=0, description="Coefficient of the chosen answers' negative log-likelihood; none: 1 for orpo, else 0."
    )
    limit: int = Field(0, ge=0, description="Usable pairs to take, from the beginning of the data set; 0 takes all.")
    swap_labels: bool = Field(
        False, description="Train on the pairs the wrong way round: a control, which must make the held-out ones worse."
    )


class DistillConfig(BaseModel):
    """Which divergence between teacher and student is minimised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str = Field("", description="Model name or path of the teacher; it must have the student's vocabulary.")
    teacher_config: str | None = Field(None, description="How the teacher was made, where its files do not say.")
    divergence: Literal["forward", "reverse", "jensen_shannon"] = Field(
        "forward",
        description="Kullback-Leibler divergence from the teacher, from the student, or from both to a mixture.",
    )
    divergence_mixture: float = Field(
        0.5, gt=0, lt=1, description="The teacher's share of the mixture of jensen_shannon."
    )
    distill_temperature: float = Field(1.0, gt=0, description="Divides the logits of both before they are compared.")
    nll_weight: float = Field(0.0, ge=0, description="Coefficient of the ordinary loss on the data's own tokens.")
    teacher_top_k: int = Field(
        0, ge=0, description="Keep the teacher's so many likeliest tokens, computed once; 0 runs it in every update."
    )
    student_layers: int = Field(
        0, ge=0, description="Start the student from so many of the model's layers, evenly spaced; 0: all of them."
    )
