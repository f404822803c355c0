# SPDX-License-Identifier: Apache-2.0
"""What a model is: sizes, block patterns, layer groups. Pure data, no JAX.

How it runs (precision, scan, rematerialisation) is `Execution`; it never changes the function computed beyond
rounding. Next to read: `decoder.py`.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """Base of all configs: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RopeScaling(Frozen):
    """How rotary frequencies are stretched beyond the trained length; formulas in `models/rope.py`."""

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    original_max_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class BlockSpec(Frozen):
    """What may differ from block to block inside one pattern."""

    sliding_window: int | None = Field(None, gt=0, description="keys further back than this many tokens are not seen")
    rope_theta: float | None = Field(None, description="RoPE base of this block; None means the model's")


class LayerGroup(Frozen):
    """`repeats` copies of a pattern of P blocks; the group's layer i, counted from `first_layer`, is block i % P."""

    name: str
    pattern: tuple[BlockSpec, ...]
    repeats: int
    first_layer: int

    @property
    def num_layers(self) -> int:
        """Layers in the group."""
        return len(self.pattern) * self.repeats

    def layer_numbers(self, block: int) -> tuple[int, ...]:
        """The model's layer numbers that run the pattern's block number `block`."""
        return tuple(self.first_layer + repeat * len(self.pattern) + block for repeat in range(self.repeats))


class ModelConfig(Frozen):
    """An architecture. Two models with equal configs and equal weights compute the same function."""

    family: str = "llama"
    vocab_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    embed_dim: int = Field(gt=0)
    mlp_dim: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_seq_len: int = Field(gt=0, description="longest sequence the model allows")
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = Field(False, description="biases on the query, key and value projections")
    attention_out_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    pattern: tuple[BlockSpec, ...] = (BlockSpec(),)

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        if not self.pattern:
            raise ValueError("pattern needs at least one block")
        return self

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The pattern as often as it fits, then what remains of it as a group of its own."""
        size = len(self.pattern)
        repeats, remainder = divmod(self.num_layers, size)
        groups = []
        if repeats:
            groups.append(LayerGroup(name="layers", pattern=self.pattern, repeats=repeats, first_layer=0))
        if remainder:
            groups.append(
                LayerGroup(name="last_layers", pattern=self.pattern[:remainder], repeats=1, first_layer=repeats * size)
            )
        return tuple(groups)


class Execution(Frozen):
    """How a model runs: none of this is part of what the model is."""

    scan_layers: bool = True
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of activations; weights keep their own")
    remat_policy: Literal["none", "full", "dots"] = "none"
