# SPDX-License-Identifier: Apache-2.0
"""MaxText's settings out of a file: the log of resolved settings, or a YAML. What they mean: `facts.py`.

- The log: one `name: value` a line, as MaxText prints all its settings (with or without `Config param` in front), the
  values being Python literals, names of enumerations (`DecoderBlockType.LLAMA2`) or bare text.
- A YAML: the settings that differ from MaxText's `base.yml`, whose values are then the defaults (`DEFAULTS`).
"""

import ast
import re
from pathlib import Path
from typing import Any

import yaml

from maxkit.errors import UserError

# Of MaxText 0.2.5's base.yml: the settings that decide a model's numbers, and their defaults.
DEFAULTS: dict[str, Any] = {
    "decoder_block": "llama2",
    "global_parameter_scale": 1,
    "base_emb_dim": 2048,
    "base_num_query_heads": 16,
    "base_num_kv_heads": 16,
    "base_mlp_dim": 7168,
    "base_moe_mlp_dim": -1,
    "base_num_decoder_layers": 16,
    "head_dim": 128,
    "vocab_size": 32000,
    "mlp_activations": ["silu", "linear"],
    "mlp_activations_limit": -1.0,
    "max_target_length": 2048,
    "max_position_embeddings": 163840,
    "original_max_position_embeddings": 4096,
    "normalization_layer_epsilon": 1e-5,
    "rope_type": "default",
    "rope_min_timescale": 1,
    "rope_max_timescale": 10000,
    "local_rope_max_timescale": -1,
    "rope_linear_scaling_factor": 1.0,
    "rope_use_scale": True,
    "rope_factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "rope_interleave": True,
    "rope_truncate": True,
    "rope_attention_scaling": False,
    "partial_rotary_factor": 1.0,
    "logits_via_embedding": False,
    "normalize_embedding_logits": True,
    "final_logits_soft_cap": None,
    "attn_logits_soft_cap": None,
    "attention_bias": False,
    "attention_sink": False,
    "attention_type": "global",
    "sliding_window_size": 0,
    "use_qk_norm": False,
    "use_post_attn_norm": False,
    "use_post_ffw_norm": False,
    "inhomogeneous_layer_cycle_interval": 1,
    "chunk_attn_window_size": 0,
    "nope_layer_interval": -1,
    "interleave_moe_layer_step": 1,
    "temperature_tuning": False,
    "trainable_position_size": -1,
    "gdn_conv_kernel_dim": 4,
    "gdn_key_head_dim": 128,
    "gdn_value_head_dim": 128,
    "gdn_num_key_heads": 16,
    "gdn_num_value_heads": 32,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "shared_experts": 0,
    "first_num_dense_layers": 0,
    "routed_scaling_factor": 1.0,
    "routed_score_func": "",
    "routed_bias": False,
    "norm_topk_prob": False,
    "n_routing_groups": -1,
    "topk_routing_group": -1,
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "fused_qkv": False,
    "fused_mlp": False,
    "scan_layers": True,
    "param_scan_axis": 1,
    "model_name": "default",
    "weight_dtype": "float32",
}

# Settings that change what a model computes in ways that are not supported: what they must be, and what they do.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization": (("", None, "none"), "weights or products are quantised"),
    "weight_sparsity_n": ((None, 0), "weights are sparse"),
    "moba": ((False,), "tokens see blocks chosen by score"),
    "use_indexer": ((False,), "tokens see what an indexer chooses"),
    "share_kv_projections": ((False,), "keys are values"),
    "mhc_expansion_rate": ((1,), "several residual streams"),
    "engram_layers": (([], None), "layers with memory of n-grams"),
    "first_num_hash_layers": ((0,), "experts chosen by hash"),
    "use_random_routing": ((False,), "experts chosen at random"),
    "rope_min_timescale": ((1,), "another smallest RoPE timescale"),
    "rope_pairwise": ((False,), "RoPE in pairs of another order"),
    "qk_norm_with_scale": ((True,), "norms of queries and keys without a scale"),
    "use_qk_norm_in_gdn": ((True,), "linear attention without normalised queries and keys"),
    "partial_rotary_factor": ((1, 1.0), "part of a head is turned"),
    "nope_layer_interval": ((-1, None), "layers without RoPE"),
    "num_kv_shared_layers": ((0,), "layers share keys and values"),
    "hidden_size_per_layer_input": ((0,), "embeddings for every layer"),
    "attention_output_dim": ((-1,), "attention of another output width"),
    "global_head_dim": ((0,), "global layers with heads of another width"),
    "global_num_kv_heads": ((0,), "global layers with another number of heads"),
    "trainable_position_size": ((-1, 0), "learned positions"),
    "use_untrainable_positional_embedding": ((False,), "sinusoidal positions"),
    "interleave_moe_layer_step": ((1,), "dense layers between mixtures of experts"),
    "training_objective": (("causal_lm",), "not a causal language model"),
    "moe_expert_input_dim": ((-1,), "experts of another input width"),
    "padded_base_moe_mlp_dim": ((None,), "experts padded with zeros"),
    "norm_scale_plus_one": ((False,), "norms that store their scale less one"),
    "compress_ratios": (([], None), "compressed attention"),
    "o_groups": ((0,), "a grouped output projection"),
}

# Of these, what one block computes nevertheless.
EXCEPT = {
    "llama4": ("nope_layer_interval", "interleave_moe_layer_step"),
    "qwen3_next": ("partial_rotary_factor",),
    "gpt3": ("trainable_position_size",),
}

# How the writer was built, not what it wrote; `pure_nnx` and the others make no difference to the weights.
WRITER = ("scan_layers", "param_scan_axis", "pure_nnx", "enable_nnx", "pure_nnx_decoder", "opt_type", "model_name")


def read_settings(path: Path) -> dict[str, Any]:
    """{name: value} of a file of either form; enumerations become the lower-case name of their member.

    Raises UserError for a file that cannot be read or is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config={path} cannot be read: {error}") from error
    if path.suffix in (".yml", ".yaml"):
        return _from_yaml(path, text)
    found = _from_log(text)
    if "decoder_block" not in found:
        raise UserError(
            f"config={path} is no description of a MaxText model: give the log of its settings (`name: value` lines "
            "with decoder_block), its YAML, a config.json, or the name of a preset"
        )
    return DEFAULTS | found


def _from_yaml(path: Path, text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"config={path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"config={path} is no description of a MaxText model: expected `name: value` lines")
    return {key: _plain(value) for key, value in found.items()}


_LINE = re.compile(r"(?:^|.*Config param )([A-Za-z_][A-Za-z0-9_]*): ?(.*)$")


def _from_log(text: str) -> dict[str, Any]:
    lines = (_LINE.match(line) for line in text.splitlines())
    return {line[1]: _plain(_literal(line[2].strip())) for line in lines if line}


def _literal(text: str) -> Any:
    if re.fullmatch(r"[A-Z]\w*\.[A-Z0-9_]+", text):  # DecoderBlockType.LLAMA2
        return text.partition(".")[2].lower()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        # YAML 1.1 takes 1e-6 for text.
        return float(value) if re.fullmatch(r"-?\d+(\.\d+)?e[-+]?\d+", value) else value
    return value
