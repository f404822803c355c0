# SPDX-License-Identifier: Apache-2.0
"""One tiny model for each thing that a family may do differently, named after the family that does it."""

from tiny_models import tiny

from maxkit.models.config import (
    AttentionTemperature,
    BlockSpec,
    GatedDeltaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeScaling,
)

MOE = BlockSpec(mlp="moe")
DELTA = BlockSpec(mixer="gated_delta", mlp="moe")

FAMILIES: dict[str, ModelConfig] = {
    "gemma3": tiny(
        num_layers=5,
        norm_placement="both",
        norm_scale_offset=1.0,
        embedding_scale=4.0,
        attention_soft_cap=5.0,
        final_soft_cap=3.0,
        qk_norm="head",
        tie_embeddings=True,
        activation="gelu_tanh",
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
        pattern=(BlockSpec(sliding_window=3, rope_theta=100.0, rope_scaled=False), BlockSpec()),
    ),
    "deepseek": tiny(
        num_layers=4,
        num_kv_heads=4,
        head_dim=12,
        rope_interleaved=True,
        mla=MlaConfig(q_rank=6, kv_rank=10, nope_head_dim=8, rope_head_dim=4, v_head_dim=6),
        moe=MoeConfig(
            num_experts=8,
            experts_per_token=3,
            mlp_dim=12,
            shared_mlp_dim=8,
            scoring="sigmoid",
            normalize_weights=True,
            weights_scale=2.5,
            num_groups=4,
            groups_per_token=2,
            group_score="top2_sum",
            correction_bias=True,
        ),
        leading_blocks=(BlockSpec(),),
        pattern=(MOE,),
    ),
    "llama4": tiny(
        num_layers=3,
        head_dim=8,
        qk_norm="unit",
        rope_interleaved=True,
        attention_temperature=AttentionTemperature(floor_scale=4.0, coefficient=0.1),
        moe=MoeConfig(
            num_experts=4, experts_per_token=1, mlp_dim=12, shared_mlp_dim=12, scoring="topk_sigmoid", scale_inputs=True
        ),
        pattern=(BlockSpec(chunk_size=4), BlockSpec(rope=False, mlp="moe")),
    ),
    "gpt_oss": tiny(
        num_layers=3,
        head_dim=8,
        attention_sinks=True,
        attention_bias=True,
        attention_out_bias=True,
        activation="clamped_swiglu",
        activation_limit=7.0,
        moe=MoeConfig(
            num_experts=4,
            experts_per_token=2,
            mlp_dim=12,
            scoring="topk_softmax",
            router_bias=True,
            expert_bias=True,
        ),
        pattern=(BlockSpec(sliding_window=5, mlp="moe"), MOE),
    ),
    "qwen3_next": tiny(
        num_layers=3,
        head_dim=8,
        norm_scale_offset=1.0,
        attention_gate=True,
        qk_norm="head",
        rope_dim=4,
        gated_delta=GatedDeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=6, value_head_dim=8),
        moe=MoeConfig(num_experts=4, experts_per_token=2, mlp_dim=12, shared_mlp_dim=12, shared_gate=True),
        pattern=(DELTA, MOE),
    ),
    "gpt2": tiny(
        norm="layer",
        norm_bias=True,
        position="learned",
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        mlp_gated=False,
        activation="gelu_tanh",
        tie_embeddings=True,
    ),
    "olmo2": tiny(norm_placement="post", qk_norm="projection"),
    "phi": tiny(
        parallel_branches="one_norm", norm="layer", norm_bias=True, head_bias=True, rope_dim=2, mlp_gated=False
    ),
}
