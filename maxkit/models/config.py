# SPDX-License-Identifier: Apache-2.0
"""What a model is: sizes, block patterns, layer groups. Pure data, no JAX.

Every family is one `ModelConfig`; there is no class per family. How a model runs (precision, scan, rematerialisation)
is `Execution`; it never changes the function computed beyond rounding. Next to read: `decoder.py`.
"""

import functools
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """Base of all configs: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RopeScaling(Frozen):
    """How rotary frequencies are stretched beyond the trained length; formulas in `models/rope.py`."""

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_max_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = Field((), description="longrope: one per pair, up to the original length")
    long_factor: tuple[float, ...] = Field((), description="longrope: one per pair, beyond the original length")


class BlockSpec(Frozen):
    """What may differ from block to block inside one pattern."""

    mixer: Literal["attention", "gated_delta"] = "attention"
    mlp: Literal["dense", "moe"] = "dense"
    sliding_window: int | None = Field(None, gt=0, description="keys further back than this many tokens are not seen")
    chunk_size: int | None = Field(None, gt=0, description="tokens see only their own chunk of this many positions")
    rope: bool = Field(True, description="whether queries and keys are turned; False means no position at all")
    rope_theta: float | None = Field(None, description="RoPE base of this block; None means the model's")
    rope_scaled: bool = Field(True, description="whether the model's rope_scaling applies to this block")


class MlaConfig(Frozen):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1): keys and values from a latent.

    A query or key head is [nope_head_dim | rope_head_dim]; only the second part is turned, and it is one for all heads.
    """

    q_rank: int | None = Field(None, gt=0, description="rank of the query's latent; None: a plain query projection")
    kv_rank: int = Field(gt=0)
    nope_head_dim: int = Field(gt=0)
    rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    norm_eps: float = Field(1e-6, description="of the norms of the two latents")


class MoeConfig(Frozen):
    """A mixture of experts: how tokens choose, and what the experts are. Maths in `models/moe.py`."""

    num_experts: int = Field(gt=0)
    experts_per_token: int = Field(gt=0)
    mlp_dim: int = Field(gt=0, description="hidden width of one expert")
    shared_mlp_dim: int = Field(0, ge=0, description="hidden width of the expert that every token uses; 0: none")
    shared_gate: bool = Field(False, description="the shared expert's output is multiplied by a learned sigmoid gate")
    scoring: Literal["softmax", "sigmoid", "topk_softmax", "topk_sigmoid"] = Field(
        "softmax", description="scores of all experts before choosing, or (topk_) of the chosen ones only"
    )
    normalize_weights: bool = Field(False, description="the chosen experts' weights are divided by their sum")
    weights_scale: float = Field(1.0, description="factor on the chosen experts' weights")
    num_groups: int = Field(1, gt=0, description="experts lie in this many groups, of which some are eligible")
    groups_per_token: int = Field(1, gt=0, description="how many groups a token may choose from")
    group_score: Literal["max", "top2_sum"] = "max"
    correction_bias: bool = Field(False, description="a bias per expert that counts for the choice, not the weight")
    correction_in_weights: bool = Field(
        False, description="it counts for both (MaxText's deepseek block unless the model's name begins with deepseek3)"
    )
    router_bias: bool = False
    expert_bias: bool = False
    scale_inputs: bool = Field(False, description="weights multiply what goes into the experts, not what comes out")

    @model_validator(mode="after")
    def _check(self) -> "MoeConfig":
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} exceeds num_experts={self.num_experts}")
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts={self.num_experts} must be a multiple of num_groups={self.num_groups}")
        if self.groups_per_token > self.num_groups:
            raise ValueError(f"groups_per_token={self.groups_per_token} exceeds num_groups={self.num_groups}")
        if self.groups_per_token * (self.num_experts // self.num_groups) < self.experts_per_token:
            raise ValueError(f"groups_per_token={self.groups_per_token} groups hold fewer experts than a token chooses")
        return self


class GatedDeltaConfig(Frozen):
    """Linear attention by the gated delta rule (Yang et al. 2024, arXiv 2412.06464). Maths in `ops/gated_delta.py`."""

    num_key_heads: int = Field(gt=0)
    num_value_heads: int = Field(gt=0)
    key_head_dim: int = Field(gt=0)
    value_head_dim: int = Field(gt=0)
    conv_width: int = Field(4, gt=0, description="tokens that the causal depthwise convolution sees")

    @model_validator(mode="after")
    def _check(self) -> "GatedDeltaConfig":
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"num_value_heads={self.num_value_heads} must be a multiple of num_key_heads={self.num_key_heads}"
            )
        return self


class AttentionTemperature(Frozen):
    """Queries without RoPE grow with position: 1 + coefficient * log(1 + floor((position + 1) / floor_scale))."""

    floor_scale: float = Field(gt=0)
    coefficient: float


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


Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]


class ModelConfig(Frozen):
    """An architecture. Two models with equal configs and equal weights compute the same function."""

    family: str = "llama"
    vocab_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    embed_dim: int = Field(gt=0)
    mlp_dim: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, description="of queries and keys; with `mla`, of its two parts together")
    max_seq_len: int = Field(gt=0, description="longest sequence the model allows")

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_scale_offset: float = Field(0.0, description="added to every norm's stored scale (Gemma stores scale - 1)")
    norm_bias: bool = Field(False, description="biases in layer norms")
    norm_placement: Literal["pre", "post", "both"] = Field("pre", description="before a branch, on its output, or both")
    parallel_branches: Literal["no", "two_norms", "one_norm"] = Field(
        "no", description="attention and MLP both read the block's input, with a norm each or with one"
    )
    residual_scale: float = Field(1.0, description="factor on what a branch adds to the residual stream")

    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_dim: int | None = Field(None, gt=0, description="how many dimensions of a head are turned; None: all")
    rope_interleaved: bool = Field(
        False, description="neighbouring dimensions form a pair, not dimension i and i + H/2"
    )

    tie_embeddings: bool = False
    embedding_scale: float | None = Field(None, description="factor on the embedded tokens")
    head_bias: bool = Field(False, description="a bias on the logits")
    logit_scale: float = Field(1.0, description="factor on the logits")
    final_soft_cap: float | None = Field(None, gt=0, description="logits become cap * tanh(logits / cap)")

    attention_bias: bool = Field(False, description="biases on the query, key and value projections")
    attention_out_bias: bool = False
    attention_scale: float | None = Field(None, description="factor on query . key; None: head_dim ** -0.5")
    attention_soft_cap: float | None = Field(None, gt=0, description="as final_soft_cap, of the attention logits")
    attention_sinks: bool = Field(False, description="a learned logit per head that takes weight and gives nothing")
    attention_gate: bool = Field(False, description="heads' outputs are multiplied by a sigmoid of a projected input")
    attention_temperature: AttentionTemperature | None = Field(None, description="of blocks without RoPE")
    qk_norm: Literal["none", "head", "projection", "unit"] = Field(
        "none",
        description="RMS norm of queries and keys: per head, over all heads together, or per head, after RoPE, "
        "without a scale and only in blocks with RoPE",
    )
    mla: MlaConfig | None = None
    gated_delta: GatedDeltaConfig | None = None

    mlp_gated: bool = Field(True, description="down(activation(gate(x)) * up(x)), else down(activation(up(x)))")
    mlp_bias: bool = False
    activation: Activation = "silu"
    activation_limit: float | None = Field(None, gt=0, description="of clamped_swiglu: where its inputs are clamped")
    moe: MoeConfig | None = None

    leading_blocks: tuple[BlockSpec, ...] = Field((), description="the first blocks, before the pattern begins")
    pattern: tuple[BlockSpec, ...] = Field((BlockSpec(),), description="repeated until num_layers blocks are there")

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.position == "rope" and self.rotated_dim % 2:
            raise ValueError(f"{self.rotated_dim} dimensions of a head are turned by RoPE, in pairs: must be even")
        if self.rotated_dim > self.head_dim:
            raise ValueError(f"rope_dim={self.rope_dim} exceeds head_dim={self.head_dim}")
        if not self.pattern:
            raise ValueError("pattern needs at least one block")
        if len(self.leading_blocks) > self.num_layers:
            raise ValueError(f"{len(self.leading_blocks)} leading_blocks exceed num_layers={self.num_layers}")
        if self.mla and self.head_dim != self.mla.nope_head_dim + self.mla.rope_head_dim:
            raise ValueError(f"head_dim={self.head_dim} must be mla.nope_head_dim + mla.rope_head_dim")
        for field, needed in (("moe", "mlp"), ("gated_delta", "mixer")):
            if getattr(self, field) is None and any(
                getattr(b, needed) == field for b in self.leading_blocks + self.pattern
            ):
                raise ValueError(f"the pattern has a block with {needed}={field!r}, but {field} is not given")
        return self

    @property
    def rotated_dim(self) -> int:
        """How many dimensions of a query or key head RoPE turns."""
        return self.mla.rope_head_dim if self.mla else self.rope_dim or self.head_dim

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """One entry per layer."""
        rest = self.num_layers - len(self.leading_blocks)
        repeats = -(-rest // len(self.pattern))
        return self.leading_blocks + (self.pattern * repeats)[:rest]

    def layer_groups(self, scan_layers: bool = True) -> tuple[LayerGroup, ...]:
        """The blocks as the fewest patterns that repeat: what is compiled, stacked and scanned.

        Not scanned, all blocks are one group. The group with most layers is `layers`; those before it are
        `first_layers`, those after it `last_layers`, numbered from the second on (`last_layers_2`).
        """
        pieces = _segments(self.blocks) if scan_layers else ((self.blocks, 1),)
        main = max(range(len(pieces)), key=lambda i: len(pieces[i][0]) * pieces[i][1])
        groups, first = [], 0
        for i, (pattern, repeats) in enumerate(pieces):
            place, nth = ("last_layers", i - main) if i > main else ("first_layers", i + 1)
            name = "layers" if i == main else place if nth == 1 else f"{place}_{nth}"
            groups.append(LayerGroup(name=name, pattern=pattern, repeats=repeats, first_layer=first))
            first += len(pattern) * repeats
        return tuple(groups)


def compress(blocks: tuple[BlockSpec, ...]) -> dict[str, tuple[BlockSpec, ...]]:
    """The shortest {"leading_blocks", "pattern"} that expand to `blocks`, one entry per layer."""
    count = len(blocks)
    choices = ((lead, size) for lead in range(count) for size in range(1, count - lead + 1))
    for lead, size in sorted(choices, key=lambda c: (c[0] + c[1], c[0])):
        if all(blocks[i] == blocks[i + size] for i in range(lead, count - size)):
            return {"leading_blocks": blocks[:lead], "pattern": blocks[lead : lead + size]}
    raise AssertionError("a pattern as long as the model always fits")


@functools.lru_cache(maxsize=64)
def _segments(blocks: tuple[BlockSpec, ...]) -> tuple[tuple[tuple[BlockSpec, ...], int], ...]:
    """`blocks` cut into (pattern, repeats) at the least cost: one for each block of a pattern, one for each piece."""
    best = [(0, 0, 0)]  # of the first i blocks: cost, minus the start of the last piece, its period
    for end in range(1, len(blocks) + 1):
        options = []
        for period in range(1, end + 1):
            start = end - period
            while start >= 0:
                options.append((best[start][0] + period + 1, -start, period))
                if start < period or blocks[start - period : start] != blocks[start : start + period]:
                    break
                start -= period
        best.append(min(options))
    pieces, end = [], len(blocks)
    while end:
        _, start, period = best[end]
        pieces.append((blocks[-start:end][:period], (end + start) // period))
        end = -start
    return tuple(pieces[::-1])


class Execution(Frozen):
    """How a model runs: none of this is part of what the model is."""

    scan_layers: bool = True
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of activations; weights keep their own")
    remat_policy: Literal["none", "full", "dots"] = "none"
    attention_kernel: Literal["auto", "reference", "cudnn", "splash"] = Field(
        "auto", description="how attention is computed; auto: the fastest that the platform and the model allow"
    )
    moe_dispatch: Literal["ragged", "capacity", "dense"] = Field(
        "ragged", description="ragged: no token is dropped; capacity: experts take a bounded number; dense: the oracle"
    )
    moe_capacity_factor: float = Field(1.25, gt=0, description="of moe_dispatch=capacity: 1 is a perfect balance")
