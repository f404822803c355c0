# SPDX-License-Identifier: Apache-2.0
"""What a MaxText model computes, from its settings, as a `ModelConfig`; and the settings of a `ModelConfig`.

What MaxText keeps in the weights is said as a fact of the config, so that reading changes no bit:

- llama2, mistral, mixtral, gemma, gemma2: attention has no factor on query . key, the queries' kernel contains it:
  `attention_scale=1`. The other blocks multiply queries at run time.
- Gemma: norms hold 1 + the published scale (`norm_scale_offset=0`), the embedding table its factor sqrt(embed_dim)
  (`embedding_scale=None`), and tied logits are divided by it (`logit_scale`, of any model with
  `normalize_embedding_logits`). gpt3 and qwen3_next hold the scale less one and add it (`norm_scale_offset=1`).
- RoPE pairs dimension i with i + half, but neighbours in the classes for Llama 3.1 and for YaRN with
  `rope_interleave` (`rope_interleaved`).
- Every sliding window of olmo3 (local, local, local, global) is of one width, so a model without windows (OLMo 2) has
  one that is as wide as the longest sequence.

One thing is no fact of the config: a tied table is rounded to bfloat16 before the head's product, whatever the settings
say. Logits of tied models therefore agree to 2e-2 of their spread only (5e-4 with the same rounding).

Checked against logits of MaxText 0.2.4 and 0.2.5 (llama2, deepseek, gemma3: tests/golden/test_maxtext.py).
"""

import math
from typing import Any

from maxkit.errors import UserError, nearest
from maxkit.formats.maxtext.containers import CYCLES, cycle_of
from maxkit.formats.maxtext.rows import ROWS
from maxkit.formats.maxtext.settings import DEFAULTS, EXCEPT, ONLY
from maxkit.models.config import BlockSpec, ModelConfig, RopeScaling, compress

Settings = dict[str, Any]

# Blocks whose attention has no factor at run time.
UNSCALED = ("llama2", "mistral", "mixtral", "gemma", "gemma2")
# Our families, the block that computes each, and the family that a block is read as.
BLOCKS = {
    "llama": "llama2",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gpt_oss": "gpt_oss",
    "olmo3": "olmo3",
    "olmo2": "olmo3",
    "llama4": "llama4",
    "qwen3_next": "qwen3_next",
    "gpt2": "gpt3",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu_tanh", "relu": "relu", "relu2": "relu2"}
# Blocks with sliding windows; blocks of mixtures of experts; blocks with biases where `attention_bias` says so.
_WINDOWED = ("gemma2", "gemma3", "gpt_oss", "olmo3")
_SPARSE = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek", "llama4", "qwen3_next")
_BIASED = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "olmo3")
# Names of models whose experts lie in groups and whose bias counts for the choice only.
_GROUPED = ("deepseek3", "kimi-k2")
_TEMPERATURE = {"floor_scale": 8192.0, "coefficient": 0.1}  # of llama4's `temperature_tuning`
_GEMMA3_BY_HEAD = ("gemma3-270m", "gemma3-1b", "gemma3-4b", "gemma3-12b")
_LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}


def decoder_block(settings: Settings) -> str:
    """The name of the settings' decoder block. Raises UserError for one that is not read."""
    name = str(settings["decoder_block"]).lower()
    if name not in ROWS:
        raise UserError(f"decoder_block={name!r} of MaxText is not supported: {nearest(name, ROWS)}")
    return name


def model_config(settings: Settings) -> ModelConfig:
    """The model that MaxText builds from its resolved settings.

    Raises:
        UserError: a setting that changes the maths in a way that is not supported, or that contradicts the block; all
            of them in one message.
    """
    block = decoder_block(settings)
    _refuse(settings, block)
    fields = _common(settings, block) | _attention(settings, block) | _rope(settings) | _blocks(settings, block)
    if block in _SPARSE:
        fields["moe"] = _moe(settings, block)
    try:
        return ModelConfig.model_validate(fields)
    except ValueError as error:
        reason = "; ".join(part.strip() for part in str(error).splitlines()[1:] if "further information" not in part)
        raise UserError(f"these MaxText settings describe no model: {reason}") from None


def _refuse(settings: Settings, block: str) -> None:
    """Raise for what cannot be computed."""
    problems = [
        f"{name}={settings[name]!r} ({why}; supported: {', '.join(map(repr, allowed))})"
        for name, (allowed, why) in ONLY.items()
        if name in settings and settings[name] not in allowed and name not in EXCEPT.get(block, ())
    ]
    has_four = bool(settings["use_post_attn_norm"]) and bool(settings["use_post_ffw_norm"])
    has_any = bool(settings["use_post_attn_norm"]) or bool(settings["use_post_ffw_norm"])
    of_block = {
        "use_qk_norm": not settings["use_qk_norm"]
        or block in ("qwen2", "qwen3", "qwen3_moe", "olmo3", "gemma3", "llama4"),
        "use_post_attn_norm, use_post_ffw_norm": has_four if block == "gemma3" else not has_any or block == "gemma2",
        "attn_logits_soft_cap": not settings["attn_logits_soft_cap"] or block in ("gemma2", "gemma3"),
        "attention_type": settings["attention_type"] == ("mla" if block == "deepseek" else "global"),
        "sliding_window_size": bool(settings["sliding_window_size"]) or block not in _WINDOWED,
        "attention_bias": not settings["attention_bias"] or block in _BIASED,
        "attention_sink": bool(settings["attention_sink"]) == (block == "gpt_oss"),
        "mlp_activations_limit": settings["mlp_activations_limit"] <= 0 or block == "gpt_oss",
        "num_experts": settings["num_experts"] > 1 or block not in _SPARSE,
        "num_experts_per_tok": settings["num_experts_per_tok"] == 1 or block != "llama4",
        "chunk_attn_window_size": settings["chunk_attn_window_size"] > 0 or block != "llama4",
        "inhomogeneous_layer_cycle_interval, nope_layer_interval, interleave_moe_layer_step": block != "llama4"
        or not settings["scan_layers"]
        or _whole_cycles(settings),
        "trainable_position_size": settings["trainable_position_size"] > 0 or block != "gpt3",
    }
    for names, fits in of_block.items():
        if not fits:
            values = ", ".join(f"{name}={settings.get(name)!r}" for name in names.split(", "))
            problems.append(f"{values} (not with decoder_block={block})")
    if settings["model_name"] not in ("gemma3-27b", *_GEMMA3_BY_HEAD) and block == "gemma3":
        problems.append(
            f"model_name={settings['model_name']!r} (the factor on queries depends on it in gemma3; supported: "
            f"{', '.join(_GEMMA3_BY_HEAD)}, gemma3-27b)"
        )
    if block == "deepseek" and settings["routed_score_func"] not in ("sigmoid", "softmax"):
        problems.append(f"routed_score_func={settings['routed_score_func']!r} (supported: 'sigmoid', 'softmax')")
    if problems:
        raise UserError(f"MaxText settings that are not supported: {'; '.join(problems)}")


def _whole_cycles(settings: Settings) -> bool:
    """Whether llama4's scanned layers repeat as its two intervals want it; MaxText counts within a cycle."""
    intervals = (settings["nope_layer_interval"] or 1, settings["interleave_moe_layer_step"] or 1)
    return all(settings["inhomogeneous_layer_cycle_interval"] % max(interval, 1) == 0 for interval in intervals)


def _size(settings: Settings, name: str) -> int:
    """A size as MaxText resolved it, or its base where the settings were not resolved."""
    if name in settings:
        return int(settings[name])
    if settings["global_parameter_scale"] != 1:
        raise UserError(f"global_parameter_scale={settings['global_parameter_scale']}: give resolved settings ({name})")
    return int(settings[f"base_{name}"])


def _common(settings: Settings, block: str) -> dict[str, Any]:
    dim, tied = _size(settings, "emb_dim"), bool(settings["logits_via_embedding"])
    acts = list(settings["mlp_activations"])
    allowed = ("sigmoid",) if block == "gpt_oss" else tuple(_ACTIVATIONS)
    if acts[0] not in allowed or acts[1:] not in ([], ["linear"]):
        raise UserError(f"mlp_activations={acts!r} is not supported: {', '.join(allowed)}, alone or with 'linear'")
    deepseek = "deepseek_v3" if settings["routed_score_func"] == "sigmoid" else "deepseek_v2"
    family = deepseek if block == "deepseek" else next(ours for ours, theirs in BLOCKS.items() if theirs == block)
    yarn = str(settings["rope_type"]).startswith("yarn")
    longest = "max_position_embeddings" if yarn else "max_target_length"
    fields: dict[str, Any] = {"mlp_gated": len(acts) > 1}
    if block == "gpt3":
        longest = "trainable_position_size"
        fields |= {"norm": "layer", "norm_bias": True, "position": "learned", "mlp_bias": True}
    return fields | {
        "family": family,
        "vocab_size": int(settings["vocab_size"]),
        "num_layers": _size(settings, "num_decoder_layers") * (2 if block == "gemma2" else 1),
        "embed_dim": dim,
        "mlp_dim": _size(settings, "mlp_dim"),
        "max_seq_len": int(settings[longest]),
        "norm_scale_offset": 1.0 if block in ("gpt3", "qwen3_next") else 0.0,
        "norm_eps": float(settings["normalization_layer_epsilon"]),
        "norm_placement": {"gemma2": "both", "gemma3": "both", "olmo3": "post"}.get(block, "pre"),
        "tie_embeddings": tied,
        "logit_scale": dim**-0.5 if tied and settings["normalize_embedding_logits"] else 1.0,
        "final_soft_cap": settings["final_logits_soft_cap"] or None,
        "activation": "clamped_swiglu" if block == "gpt_oss" else _ACTIVATIONS[acts[0]],
        "activation_limit": float(settings["mlp_activations_limit"]) if block == "gpt_oss" else None,
    }


def _attention(settings: Settings, block: str) -> dict[str, Any]:
    heads = _size(settings, "num_query_heads")
    if block == "deepseek":
        return {"num_heads": heads, "num_kv_heads": heads} | _latent(settings)
    head_dim = int(settings["head_dim"])
    if block == "gemma3" and settings["model_name"] == "gemma3-27b":
        scale = (int(settings.get("base_emb_dim", settings.get("emb_dim"))) // heads) ** -0.5
    else:
        scale = 1.0 if block in UNSCALED else None
    normed = settings["use_qk_norm"] or block in ("gemma3", "qwen3_next")
    # Over all heads together only in models of that name, whatever the block.
    kind = "projection" if str(settings["model_name"]).startswith("olmo3") else "head"
    fields: dict[str, Any] = {}
    if block == "llama4" and settings["temperature_tuning"]:
        fields["attention_temperature"] = _TEMPERATURE
    if block == "qwen3_next":
        names = {"num_key_heads": "num_key_heads", "num_value_heads": "num_value_heads"}
        names |= {"key_head_dim": "key_head_dim", "value_head_dim": "value_head_dim", "conv_width": "conv_kernel_dim"}
        fields["gated_delta"] = {ours: int(settings[f"gdn_{theirs}"]) for ours, theirs in names.items()}
    return fields | {
        "num_heads": heads,
        "num_kv_heads": _size(settings, "num_kv_heads"),
        "head_dim": head_dim,
        "attention_scale": scale,
        "attention_soft_cap": settings["attn_logits_soft_cap"] or None,
        "attention_bias": bool(settings["attention_bias"]) or block == "gpt3",
        "attention_out_bias": (bool(settings["attention_bias"]) and block != "qwen2") or block == "gpt3",
        "attention_sinks": block == "gpt_oss",
        "attention_gate": block == "qwen3_next",
        "qk_norm": ("unit" if block == "llama4" else kind) if normed else "none",
    }


def _latent(settings: Settings) -> dict[str, Any]:
    nope, rope = int(settings["qk_nope_head_dim"]), int(settings["qk_rope_head_dim"])
    scale = None
    # Whatever the type of RoPE: positions beyond the original length sharpen attention (YaRN's mscale).
    if settings["max_position_embeddings"] > settings["original_max_position_embeddings"]:
        scale = (nope + rope) ** -0.5 * (0.1 * settings["mscale"] * math.log(settings["rope_factor"]) + 1.0) ** 2
    return {
        "head_dim": nope + rope,
        "attention_scale": scale,
        "mla": {
            "q_rank": int(settings["q_lora_rank"]) or None,
            "kv_rank": int(settings["kv_lora_rank"]),
            "nope_head_dim": nope,
            "rope_head_dim": rope,
            "v_head_dim": int(settings["v_head_dim"]),
            "norm_eps": float(settings["normalization_layer_epsilon"]),
        },
    }


def _rope(settings: Settings) -> dict[str, Any]:
    kind, theta = str(settings["rope_type"]).lower(), float(settings["rope_max_timescale"])
    fields: dict[str, Any] = {"rope_theta": theta}
    if settings["partial_rotary_factor"] != 1:  # of qwen3_next, or refused
        fields["rope_dim"] = int(settings["head_dim"] * settings["partial_rotary_factor"])
    if kind.startswith("llama3.1") or str(settings["model_name"]).startswith("llama3.1"):
        scaling = RopeScaling(kind="llama3", **_LLAMA31) if settings["rope_use_scale"] else None
        return fields | {"rope_interleaved": True, "rope_scaling": scaling}
    if kind.startswith("yarn"):
        scaling = RopeScaling(
            kind="yarn",
            factor=float(settings["rope_factor"]),
            original_max_seq_len=int(settings["original_max_position_embeddings"]),
            beta_fast=float(settings["beta_fast"]),
            beta_slow=float(settings["beta_slow"]),
            truncate=bool(settings["rope_truncate"]),
            attention_factor=None if settings["rope_attention_scaling"] else 1.0,
        )
        return fields | {"rope_interleaved": bool(settings["rope_interleave"]), "rope_scaling": scaling}
    if kind != "default":
        raise UserError(f"rope_type={kind!r} is not supported: default, llama3.1, yarn")
    factor = float(settings["rope_linear_scaling_factor"])
    return fields | {"rope_scaling": None if factor == 1.0 else RopeScaling(kind="linear", factor=factor)}


def _blocks(settings: Settings, block: str) -> dict[str, Any]:
    window = int(settings["sliding_window_size"]) or None
    if block == "deepseek":
        return {
            "leading_blocks": (BlockSpec(),) * int(settings["first_num_dense_layers"]),
            "pattern": (BlockSpec(mlp="moe"),),
        }
    if block in ("mixtral", "qwen3_moe"):
        return {"pattern": (BlockSpec(mlp="moe"),)}
    if block == "qwen3_next":
        linear = BlockSpec(mixer="gated_delta", mlp="moe")
        return {"pattern": (linear,) * (cycle_of(block, settings) - 1) + (BlockSpec(mlp="moe"),)}
    if block == "llama4":
        every, step = settings["nope_layer_interval"] or -1, settings["interleave_moe_layer_step"] or -1
        chunk = int(settings["chunk_attn_window_size"])
        kinds = (
            (every < 1 or (layer + 1) % every > 0, step > 0 and (layer + 1) % step == 0)
            for layer in range(_size(settings, "num_decoder_layers"))
        )
        return compress(
            tuple(
                BlockSpec(chunk_size=chunk if turned else None, rope=turned, mlp="moe" if sparse else "dense")
                for turned, sparse in kinds
            )
        )
    mlp = "moe" if block == "gpt_oss" else "dense"
    local_theta = float(settings["local_rope_max_timescale"])
    local = BlockSpec(
        sliding_window=window,
        mlp=mlp,
        rope_theta=local_theta if local_theta > 0 else None,
        rope_scaled=block != "gemma3",
    )
    if block == "gemma2":
        return {"pattern": (local, BlockSpec())}
    if block in _WINDOWED:
        return {"pattern": (local,) * (CYCLES[block] - 1) + (BlockSpec(mlp=mlp),)}
    return {}


def _moe(settings: Settings, block: str) -> dict[str, Any]:
    wide = block in ("mixtral", "gpt_oss")  # their experts are as wide as the dense MLP would be
    fields: dict[str, Any] = {
        "num_experts": int(settings["num_experts"]),
        "experts_per_token": int(settings["num_experts_per_tok"]),
        "mlp_dim": _size(settings, "mlp_dim" if wide else "moe_mlp_dim"),
    }
    if block == "gpt_oss":
        biases = {"router_bias": bool(settings["routed_bias"]), "expert_bias": bool(settings.get("mlp_bias", True))}
        return fields | {"scoring": "topk_softmax"} | biases
    if block == "llama4":
        shared = int(settings["shared_experts"]) * fields["mlp_dim"]
        return fields | {"scoring": "topk_sigmoid", "scale_inputs": True, "shared_mlp_dim": shared}
    if block == "qwen3_next" and settings["shared_experts"] > 0:  # one, however many
        fields |= {"shared_mlp_dim": fields["mlp_dim"], "shared_gate": True}
    if block != "deepseek":
        return fields | {"scoring": "softmax", "normalize_weights": True}  # = the softmax of the chosen
    fields |= {
        "scoring": settings["routed_score_func"],
        "normalize_weights": settings["routed_score_func"] == "sigmoid",
        "weights_scale": float(settings["routed_scaling_factor"]),
        "shared_mlp_dim": int(settings["shared_experts"]) * fields["mlp_dim"],
        "correction_bias": bool(settings["routed_bias"]),
    }
    if not str(settings["model_name"]).startswith(_GROUPED):
        # Groups are of the models with that name only, and without it the bias counts in the weights as well.
        return fields | {"correction_in_weights": bool(settings["routed_bias"])}
    if settings["n_routing_groups"] != -1:
        groups = {
            "num_groups": int(settings["n_routing_groups"]),
            "groups_per_token": int(settings["topk_routing_group"]),
        }
        fields |= groups | {"group_score": "top2_sum"}
    return fields


def block_of(config: ModelConfig) -> str:
    """The decoder block for a family: its own, or llama2 for any other dense one, which may turn out to be the same.

    Raises:
        UserError: a family with experts, latents or states that no block has.
    """
    if config.family in BLOCKS:
        return BLOCKS[config.family]
    if config.moe or config.mla or config.gated_delta:
        raise UserError(f"family {config.family!r} has no MaxText form: {nearest(config.family, BLOCKS)}")
    return "llama2"


def settings_of(config: ModelConfig) -> Settings:
    """The settings with which MaxText computes what `config` says, as far as it can: `model_config` is the judge.

    Raises:
        UserError: as `block_of`.
    """
    block = block_of(config)
    sizes = {
        "emb_dim": config.embed_dim,
        "mlp_dim": config.mlp_dim,
        "num_query_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "num_decoder_layers": config.num_layers // (2 if block == "gemma2" else 1),
    }
    activation = next((name for name, ours in _ACTIVATIONS.items() if ours == config.activation), config.activation)
    window = next((spec.sliding_window for spec in config.blocks if spec.sliding_window), None)
    if block == "olmo3":
        window = window or config.max_seq_len
    found: Settings = {
        "decoder_block": block,
        **{f"base_{name}": size for name, size in sizes.items()},
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_target_length": config.max_seq_len,
        "normalization_layer_epsilon": config.norm_eps,
        "mlp_activations": ["sigmoid" if block == "gpt_oss" else activation] + ["linear"] * config.mlp_gated,
        "logits_via_embedding": config.tie_embeddings,
        "normalize_embedding_logits": not math.isclose(config.logit_scale, 1.0),
        "final_logits_soft_cap": config.final_soft_cap,
        "attn_logits_soft_cap": config.attention_soft_cap,
        "attention_bias": config.attention_bias and block != "gpt3",
        "use_qk_norm": config.qk_norm != "none" and block != "qwen3_next",
        "use_post_attn_norm": config.norm_placement == "both",
        "use_post_ffw_norm": config.norm_placement == "both",
        "rope_max_timescale": _number(config.rope_theta),
    }
    if block in _WINDOWED:
        local = config.blocks[0].rope_theta
        found |= {"sliding_window_size": window or 0, "local_rope_max_timescale": _number(local) if local else -1}
    if block in ("gpt_oss", "olmo3"):
        found["inhomogeneous_layer_cycle_interval"] = CYCLES[block]
    if block == "gpt3":
        found["trainable_position_size"] = config.max_seq_len
    if config.qk_norm == "projection":
        found |= {"model_name": "olmo3-7b", "override_model_config": True}
    if block == "gpt_oss":
        found |= {"attention_sink": True, "mlp_activations_limit": config.activation_limit, "mlp_bias": True}
    if block == "gemma3":
        by_head = config.attention_scale is None or math.isclose(config.attention_scale, config.head_dim**-0.5)
        found |= {"model_name": "gemma3-4b" if by_head else "gemma3-27b", "override_model_config": True}
    parts = (_settings_of_rope, _settings_of_experts, _settings_of_latent, _settings_of_chunks, _settings_of_delta)
    for settings_of_part in parts:
        found |= settings_of_part(config)
    return found


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _settings_of_chunks(config: ModelConfig) -> Settings:
    """Llama 4's: which layers turn queries and keys, and see their own chunk only; which are mixtures."""
    if block_of(config) != "llama4":
        return {}
    plain = [layer + 1 for layer, spec in enumerate(config.blocks) if not spec.rope]
    sparse = [layer + 1 for layer, spec in enumerate(config.blocks) if spec.mlp == "moe"]
    every, step = (plain or [-1])[0], (sparse or [-1])[0]
    return {
        "chunk_attn_window_size": next((spec.chunk_size for spec in config.blocks if spec.chunk_size), 0),
        "nope_layer_interval": every,
        "interleave_moe_layer_step": step,
        "inhomogeneous_layer_cycle_interval": math.lcm(max(every, 1), max(step, 1)),
        "temperature_tuning": config.attention_temperature is not None,
    }


def _settings_of_delta(config: ModelConfig) -> Settings:
    """Qwen3-Next's: the linear attention, and how often softmax attention comes."""
    delta = config.gated_delta
    if delta is None:
        return {}
    full = [layer + 1 for layer, spec in enumerate(config.blocks) if spec.mixer == "attention"]
    return {
        "gdn_num_key_heads": delta.num_key_heads,
        "gdn_num_value_heads": delta.num_value_heads,
        "gdn_key_head_dim": delta.key_head_dim,
        "gdn_value_head_dim": delta.value_head_dim,
        "gdn_conv_kernel_dim": delta.conv_width,
        "inhomogeneous_layer_cycle_interval": (full or [CYCLES["qwen3_next"]])[0],
        "partial_rotary_factor": config.rotated_dim / config.head_dim,
    }


def _settings_of_rope(config: ModelConfig) -> Settings:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "llama3.1", "rope_use_scale": False} if config.rope_interleaved else {}
    if scaling.kind == "llama3":
        return {"rope_type": "llama3.1"}
    if scaling.kind == "linear":
        return {"rope_linear_scaling_factor": scaling.factor}
    magnitude = scaling.attention_factor
    if magnitude is None and scaling.mscale and scaling.mscale_all_dim:
        magnitude = 1.0 if math.isclose(scaling.mscale, scaling.mscale_all_dim) else None
    return {
        "rope_type": scaling.kind,
        "rope_factor": _number(scaling.factor),
        "original_max_position_embeddings": scaling.original_max_seq_len or config.max_seq_len,
        "max_position_embeddings": config.max_seq_len,
        "beta_fast": _number(scaling.beta_fast),
        "beta_slow": _number(scaling.beta_slow),
        "rope_truncate": scaling.truncate,
        "rope_interleave": config.rope_interleaved,
        "rope_attention_scaling": magnitude != 1.0,
    }


def _settings_of_latent(config: ModelConfig) -> Settings:
    mla = config.mla
    if mla is None:
        return {}
    found: Settings = {
        "attention_type": "mla",
        "q_lora_rank": mla.q_rank or 0,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_head_dim,
        "qk_rope_head_dim": mla.rope_head_dim,
        "v_head_dim": mla.v_head_dim,
    }
    sharpened = (config.attention_scale or config.head_dim**-0.5) / config.head_dim**-0.5
    if math.isclose(sharpened, 1.0):
        # Off only where the two lengths are equal.
        original = _settings_of_rope(config).get("original_max_position_embeddings", config.max_seq_len)
        return found | {"original_max_position_embeddings": original, "max_position_embeddings": original}
    factor = config.rope_scaling.factor if config.rope_scaling else DEFAULTS["rope_factor"]
    mscale = round((math.sqrt(sharpened) - 1.0) / (0.1 * math.log(factor)), 9) if factor > 1 else 1.0
    lengths = {} if config.rope_scaling else {"original_max_position_embeddings": 1, "max_position_embeddings": 2}
    return found | {"mscale": mscale, "rope_factor": _number(factor)} | lengths


def _settings_of_experts(config: ModelConfig) -> Settings:
    moe = config.moe
    if moe is None:
        return {}
    found: Settings = {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "base_moe_mlp_dim": moe.mlp_dim,
        "routed_bias": moe.correction_bias or moe.router_bias,
    }
    block = block_of(config)
    if block in ("mixtral", "gpt_oss"):
        return found | {"base_mlp_dim": moe.mlp_dim}
    if block == "llama4":
        return found | {"shared_experts": moe.shared_mlp_dim // moe.mlp_dim}
    if block != "deepseek":
        return found | {"norm_topk_prob": moe.normalize_weights, "shared_experts": int(moe.shared_mlp_dim > 0)}
    grouped = moe.num_groups > 1
    named = grouped or (moe.correction_bias and not moe.correction_in_weights)
    return found | {
        "model_name": "deepseek3-671b" if named else "default",
        "override_model_config": named,
        "first_num_dense_layers": len(config.leading_blocks),
        "shared_experts": moe.shared_mlp_dim // moe.mlp_dim,
        "routed_score_func": moe.scoring,
        "routed_scaling_factor": moe.weights_scale,
        "n_routing_groups": moe.num_groups if grouped else -1,
        "topk_routing_group": moe.groups_per_token if grouped else -1,
    }
