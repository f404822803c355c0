# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family: what they are, and their weights, which nobody stores.

`CASES` are given to transformers by `make_families.py`, which commits config.json, the keys and shapes of the file that
`save_pretrained` wrote, tokens and logits. The weights are drawn here, from the key alone, when a test needs them.
"""

import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FIXTURES = Path(__file__).parent.parent / "fixtures" / "families"
NUM_TOKENS = 24
PROMPTS = (9, 5)  # what of the two rows is given at once before decoding goes on token by token
DOCUMENTS = (14, 10)  # a packed row: the first tokens of both rows
GREEDY = 18  # from here on each token is the most likely one
# Whose gradients are compared as well: dense, and mixtures of experts without and with latent attention.
GRADIENTS = ("gemma2-caps", "qwen3_moe-all", "deepseek_v3-groups")


class Case(NamedTuple):
    """One model: the class in transformers, arguments of its configuration."""

    model: str
    config: str
    options: dict[str, Any]
    dtype: str = "float32"
    # False where the function itself depends on the length of the sequence (dynamic RoPE).
    prefix_stable: bool = True


SIZES = dict(vocab_size=80, hidden_size=36, intermediate_size=44, num_hidden_layers=3, num_attention_heads=6)
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)


def case(name: str, model: str = "", dtype: str = "float32", prefix_stable: bool = True, **options: Any) -> Case:
    """A case of the family whose classes begin with `name`."""
    settings = SIZES | dict(num_key_value_heads=2, max_position_embeddings=64) | IDS | options
    return Case(model or f"{name}ForCausalLM", f"{name}Config", settings, dtype, prefix_stable)


MLA = dict(kv_lora_rank=14, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7, num_key_value_heads=6,
           moe_intermediate_size=14, n_routed_experts=8, num_experts_per_tok=3, first_k_dense_replace=1)  # fmt: skip
QWEN_MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=14)
# A larger epsilon: a first token whose query and key are almost orthogonal gives almost nothing, which the norm behind
# would blow up together with its rounding.
DELTA = dict(rms_norm_eps=1e-3, linear_key_head_dim=6, linear_value_head_dim=5, linear_conv_kernel_dim=4,
             head_dim=8, shared_expert_intermediate_size=20, **QWEN_MOE)  # fmt: skip
GPT2 = dict(vocab_size=80, n_embd=36, n_layer=3, n_head=6, n_positions=64, **IDS)

CASES: dict[str, Case] = {
    "llama-llama3": case("Llama", head_dim=10, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "llama-linear": case("Llama", num_key_value_heads=1, tie_word_embeddings=True, dtype="bfloat16",
                         rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    "llama-dynamic": case("Llama", num_key_value_heads=6, max_position_embeddings=16, prefix_stable=False,
                          rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)),
    "llama-yarn": case("Llama", head_dim=14, rope_parameters=YARN),
    "mistral-window": case("Mistral", head_dim=10, sliding_window=6),
    "mistral-full": case("Mistral", num_key_value_heads=1, sliding_window=None, tie_word_embeddings=True),
    "qwen2-full": case("Qwen2", tie_word_embeddings=True),
    "qwen2-window": case("Qwen2", num_hidden_layers=5, num_key_value_heads=6, use_sliding_window=True, sliding_window=5,
                         max_window_layers=2),
    "qwen3-full": case("Qwen3", head_dim=10),
    "qwen3-bias": case("Qwen3", head_dim=8, num_key_value_heads=1, attention_bias=True, tie_word_embeddings=True,
                       rope_parameters=YARN),
    "qwen3_moe-all": case("Qwen3Moe", head_dim=10, norm_topk_prob=True, **QWEN_MOE),
    "qwen3_moe-mixed": case("Qwen3Moe", head_dim=8, num_hidden_layers=5, num_key_value_heads=1, decoder_sparse_step=2,
                            mlp_only_layers=[3], norm_topk_prob=False, tie_word_embeddings=True, **QWEN_MOE),
    "qwen2_moe-all": case("Qwen2Moe", shared_expert_intermediate_size=20, **QWEN_MOE),
    "qwen2_moe-mixed": case("Qwen2Moe", num_key_value_heads=6, shared_expert_intermediate_size=20, norm_topk_prob=True,
                            decoder_sparse_step=2, tie_word_embeddings=True, **QWEN_MOE),
    "gemma-mqa": case("Gemma", head_dim=10, num_key_value_heads=1),
    "gemma-mha": case("Gemma", head_dim=8, num_key_value_heads=6, hidden_activation="gelu"),
    "gemma2-caps": case("Gemma2", num_hidden_layers=5, head_dim=10, sliding_window=6, query_pre_attn_scalar=13,
                        attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    "gemma2-plain": case("Gemma2", head_dim=8, num_key_value_heads=1, sliding_window=5, attn_logit_softcapping=None,
                         final_logit_softcapping=None, query_pre_attn_scalar=8),
    "gemma3-remainder": case("Gemma3", model="Gemma3ForCausalLM", num_hidden_layers=8, head_dim=10,
                             num_key_value_heads=1, sliding_window=6, query_pre_attn_scalar=12,
                             rope_parameters={
                                 "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                                 "sliding_attention": dict(rope_type="default", rope_theta=1e4),
                             }),
    "gemma3-mixed": case("Gemma3", model="Gemma3ForCausalLM", num_hidden_layers=4, head_dim=8, sliding_window=5,
                         layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
                         tie_word_embeddings=False, final_logit_softcapping=5.0),
    "mixtral-full": case("Mixtral", head_dim=10, num_local_experts=4),
    "mixtral-window": case("Mixtral", num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=3,
                           sliding_window=5, tie_word_embeddings=True),
    "deepseek_v2-lite": case("DeepseekV2", q_lora_rank=None, n_shared_experts=2, topk_method="greedy", **MLA),
    "deepseek_v2-groups": case("DeepseekV2", q_lora_rank=9, n_shared_experts=1, topk_method="group_limited_greedy",
                               n_group=4, topk_group=2, routed_scaling_factor=2.5, tie_word_embeddings=True, **MLA,
                               rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707)),
    "deepseek_v3-groups": case("DeepseekV3", q_lora_rank=9, n_shared_experts=1, n_group=4, topk_group=2,
                               routed_scaling_factor=2.5, norm_topk_prob=True, **MLA,
                               rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
    "deepseek_v3-kimi": case("DeepseekV3", num_hidden_layers=4, q_lora_rank=11, n_shared_experts=1, n_group=1,
                             topk_group=1, routed_scaling_factor=2.8, norm_topk_prob=True, **MLA),
    "deepseek_v3-plain": case("DeepseekV3", q_lora_rank=None, n_shared_experts=2, n_group=2, topk_group=1,
                              norm_topk_prob=False, rope_interleave=False, tie_word_embeddings=True, **MLA),
    "gpt_oss-yarn": case("GptOss", num_hidden_layers=4, head_dim=10, sliding_window=5, num_local_experts=4,
                         num_experts_per_tok=2,
                         rope_parameters=YARN | dict(beta_fast=32.0, beta_slow=1.0, truncate=False)),
    "gpt_oss-mixed": case("GptOss", num_hidden_layers=3, head_dim=8, num_key_value_heads=1, sliding_window=6,
                          num_local_experts=4, num_experts_per_tok=3, tie_word_embeddings=True,
                          layer_types=["full_attention", "sliding_attention", "sliding_attention"],
                          rope_parameters=dict(rope_type="default", rope_theta=1e4)),
    "olmo2-gqa": case("Olmo2"),
    "olmo2-bias": case("Olmo2", num_key_value_heads=1, attention_bias=True, tie_word_embeddings=True),
    "olmo3-remainder": case("Olmo3", num_hidden_layers=6, sliding_window=5),
    "olmo3-yarn": case("Olmo3", num_hidden_layers=4, num_key_value_heads=6, sliding_window=6, rope_parameters=dict(
                           full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=1e4))),
    "phi3-window": case("Phi3", sliding_window=7),
    "phi3-longrope": case("Phi3", num_key_value_heads=1, tie_word_embeddings=True, sliding_window=None,
                          hidden_size=48, max_position_embeddings=96, original_max_position_embeddings=32,
                          partial_rotary_factor=0.75,
                          rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.3, 2.0],
                                               long_factor=[1.0, 4.0, 9.0], partial_rotary_factor=0.75,
                                               original_max_position_embeddings=32)),
    "llama4-chunks": case("Llama4", num_hidden_layers=5, head_dim=10, intermediate_size_mlp=50, num_local_experts=4,
                          num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=7,
                          floor_scale=4, attn_scale=0.3),
    "llama4-all": case("Llama4", num_hidden_layers=4, head_dim=8, num_key_value_heads=1, intermediate_size_mlp=50,
                       num_local_experts=4, num_experts_per_tok=2, interleave_moe_layer_step=1, use_qk_norm=False,
                       attention_chunk_size=9, attn_temperature_tuning=False, no_rope_layers=[1, 0, 1, 1],
                       rope_parameters=LLAMA3),
    "qwen3_next-remainder": case("Qwen3Next", num_hidden_layers=6, linear_num_key_heads=2, linear_num_value_heads=6,
                                 partial_rotary_factor=0.25,
                                 rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25),
                                 **DELTA),
    "qwen3_next-dense": case("Qwen3Next", num_hidden_layers=4, linear_num_key_heads=3, linear_num_value_heads=3,
                             num_key_value_heads=1, mlp_only_layers=[0, 2], tie_word_embeddings=True,
                             rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0),
                             **DELTA),
    "gpt2-tied": Case("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-untied": Case("GPT2LMHeadModel", "GPT2Config", GPT2 | dict(
        n_inner=50, activation_function="relu", tie_word_embeddings=False)),
    # Relatives: one or two models each.
    "arcee-bias": case("Arcee", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "seed_oss-bias": case("SeedOss", head_dim=10, attention_out_bias=True, mlp_bias=True),
    "ministral-mixed": case("Ministral", head_dim=8, sliding_window=5,
                            layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "cwm-default": case("Cwm", head_dim=8, num_hidden_layers=5, sliding_window=6),
    "smollm3-nope": case("SmolLM3", num_hidden_layers=5, no_rope_layer_interval=2, use_sliding_window=True,
                         sliding_window=5),
    "granite-scales": case("Granite", attention_multiplier=0.3, embedding_multiplier=1.7, logits_scaling=0.8,
                           residual_multiplier=0.6, attention_bias=True),
    "helium-gqa": case("Helium", head_dim=6, attention_bias=True, mlp_bias=True),
    "ernie4_5-bias": case("Ernie4_5", head_dim=10, use_bias=True),
    "cohere-gqa": case("Cohere", logit_scale=0.7, tie_word_embeddings=False),
    "cohere-bias": case("Cohere", num_key_value_heads=1, attention_bias=True),
    "starcoder2-bias": case("Starcoder2", sliding_window=6),
    "starcoder2-plain": case("Starcoder2", use_bias=False, tie_word_embeddings=False),
    "stablelm-serial": case("StableLm", hidden_size=48, num_key_value_heads=6, use_qkv_bias=True),
    "stablelm-parallel": case("StableLm", hidden_size=48, use_parallel_residual=True, partial_rotary_factor=0.5),
    "glm-gqa": case("Glm", head_dim=8),
    "glm4-gqa": case("Glm4", head_dim=8, attention_bias=False),
    "olmoe-all": case("Olmoe", num_experts=6, num_experts_per_tok=2, norm_topk_prob=True),
    "glm4_moe-groups": case("Glm4Moe", head_dim=8, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=14,
                            n_group=4, topk_group=2, routed_scaling_factor=1.5, attention_bias=True, use_qk_norm=True),
    "glm4_moe-plain": case("Glm4Moe", head_dim=8, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=14,
                           first_k_dense_replace=2, n_shared_experts=2, norm_topk_prob=False),
    "dots1-window": case("Dots1", n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3,
                         moe_intermediate_size=14, first_k_dense_replace=1, sliding_window=5, max_window_layers=1,
                         norm_topk_prob=True, routed_scaling_factor=1.5),
}  # fmt: skip
# Gemma 3, Llama 4: the configuration of the text model alone.
CASES = {
    name: c._replace(config=c.config.replace("Gemma3C", "Gemma3TextC").replace("Llama4C", "Llama4TextC"))
    for name, c in CASES.items()
}


def weight(name: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of one tensor of a case: drawn from its key, at a scale that keeps signals near one."""
    family = name.split("-")[0]
    noise = np.random.default_rng(zlib.crc32(f"{name} {key}".encode())).standard_normal(shape, np.float32)
    last = key.rsplit(".", 2)[-2:]
    if re.search(r"norm|ln_", last[0]) and last[1] == "weight":
        stored_minus_one = family.startswith("gemma") or (family == "qwen3_next" and "linear_attn" not in key)
        value = noise * np.float32(0.2) + np.float32(0 if stored_minus_one else 1)
    elif len(shape) == 1 or key.endswith(("_bias", "wpe.weight")):
        value = noise * np.float32(0.3)
    elif re.search(r"embed_tokens|wte", key):
        value = noise
    elif re.search(r"(mlp|block_sparse_moe)\.gate\.weight|router\.weight", key):
        value = noise * np.float32(2 / np.sqrt(shape[-1]))
    elif "conv1d" in key:
        value = noise * np.float32(0.5)
    else:
        transposed = family == "gpt2" and "lm_head" not in key or key.endswith(("gate_up_proj", "down_proj"))
        value = noise * np.float32(1.2 / np.sqrt(shape[-2] if transposed else shape[-1]))
    return value.astype(ml_dtypes.bfloat16) if CASES[name].dtype == "bfloat16" else value


_NUMBERS = re.compile(r"(?<=layers\.)\d+|(?<=\bh\.)\d+|(?<=experts\.)\d+")


def pack_keys(shapes: dict[str, tuple[int, ...]]) -> list[list[Any]]:
    """[key with # for the numbers of layer and expert, shape, the numbers], which is short and can be read."""
    rows: dict[tuple[str, tuple[int, ...]], list[list[int]]] = {}
    for key, shape in shapes.items():
        rows.setdefault((_NUMBERS.sub("#", key), shape), []).append([int(n) for n in _NUMBERS.findall(key)])
    return [[pattern, list(shape), numbers] for (pattern, shape), numbers in sorted(rows.items())]


def unpack_keys(rows: list[list[Any]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The inverse of `pack_keys`."""
    for pattern, shape, all_numbers in rows:
        for numbers in all_numbers:
            parts = pattern.split("#")
            yield "".join(a + str(b) for a, b in zip(parts, [*numbers, ""], strict=True)), tuple(shape)


def weights(name: str) -> dict[str, np.ndarray]:
    """Every tensor of a case, by its key in the file."""
    rows = json.loads((FIXTURES / name / "keys.json").read_text())
    return {key: weight(name, key, shape) for key, shape in unpack_keys(rows)}


def projections(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{key: (norm, product with a random tensor)}, which tells two tensors apart and fits in a fixture."""
    found = {}
    for key, value in tensors.items():
        direction = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(value.shape)
        value = value.astype(np.float64)
        found[key] = np.array([np.sqrt((value**2).sum()), (value * direction).sum()])
    return found


def checksum(tensors: dict[str, np.ndarray]) -> int:
    """A number that tells two sets of weights apart."""
    return sum(zlib.crc32(key.encode() + value.tobytes()) for key, value in tensors.items())


def write_folder(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Write the folder that transformers would have, with the weights of a case; returns these."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(FIXTURES / name / "config.json", folder)
    return tensors
