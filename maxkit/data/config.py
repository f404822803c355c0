# SPDX-License-Identifier: Apache-2.0
"""What data a run reads and how it becomes rows. Read by `build.py`; imports no JAX."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DatasetConfig(BaseModel):
    """Where the examples come from, how long a row is, and what is held out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(
        "chatterbot",
        min_length=1,
        description="Packaged corpus (shakespeare, pydoc, chatterbot, chatterbot-all), file or folder; files are "
        ".jsonl, .parquet or .txt; also hf:OWNER/NAME[:SPLIT], or synthetic.",
    )
    seq_len: int = Field(256, ge=2, description="Tokens in a row; at most the model's max_seq_len.")
    holdout_fraction: float = Field(
        0.1,
        ge=0.0,
        lt=1.0,
        description="Share of the examples (chat) or of the text's tail kept for evaluation.",
    )
    deduplicate: bool = Field(True, description="Drop exact repeats of a conversation, so that none is also held out.")
    shuffle: bool = Field(True, description="Read the training rows in a new random order each epoch.")


class DataConfig(DatasetConfig):
    """The same for examples that share rows: conversations and pairs."""

    packing: bool = Field(True, description="Put several chat examples into one row; false gives one a row.")
    too_long: Literal["drop", "truncate"] = Field(
        "drop",
        description="What happens to a chat example longer than seq_len; both are counted and reported.",
    )
