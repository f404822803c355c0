# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is told. Composed by `maxkit/config.py`; imports no JAX."""

from pydantic import BaseModel, ConfigDict, Field, field_validator

from maxkit.eval.tasks import TASKS, unique_tasks

DEFAULT_TASKS = ("openbookqa", "piqa", "commonsenseqa", "sums", "pydoc")


class EvalConfig(BaseModel):
    """Which tasks, how much of each, and how many rows at a time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...] = Field(
        DEFAULT_TASKS,
        description=f"Tasks by name, or MEASURE:DATASET; names are {', '.join(TASKS)}; measures are choice, "
        "perplexity, exact, contains and last_number.",
    )
    limit: int = Field(100, ge=0, description="Items of each task, from its beginning; 0 takes all.")
    batch_size: int = Field(16, ge=1, description="Rows that are computed at a time; the results are the same.")
    seq_len: int = Field(
        128, ge=2, description="Tokens in a window of text, which is one item of a perplexity; at most max_seq_len."
    )

    @field_validator("tasks")
    @classmethod
    def _are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unique_tasks(value)
        return value
