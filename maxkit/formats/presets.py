# SPDX-License-Identifier: Apache-2.0
"""Architectures of published models by name, as the content of their config.json; no weights, no JAX.

`preset_config("llama3.1-8b")` is read by the same reader as a file. Dimensions are facts; each row says where they were
taken from and how many parameters are published, which a test compares with the exact count. To add one, add a row.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxkit.errors import UserError, nearest
from maxkit.formats.hf_config.reader import FAMILIES, read_config_dict
from maxkit.models.config import ModelConfig

MAXTEXT = "maxtext 0.2.5, checkpoint_conversion/utils/hf_model_configs.py"
MAXTEXT_YAML = "maxtext 0.2.5, configs/models/{}.yml"
MODEL_CARD = "the authors' config.json"
CLASS = "defaults of transformers' configuration class"


@dataclass(frozen=True)
class Preset:
    """One published size.

    published: the number of parameters as the authors or the model hub state it; `besides` says what else they count
    in. hub_ids: repositories of this architecture. source: where the dimensions are from.
    """

    family: str
    published: str
    hub_ids: tuple[str, ...]
    source: str
    raw: dict[str, Any]
    besides: str = ""


def preset_config(name: str) -> ModelConfig:
    """The architecture of a preset. Raises UserError, with the nearest name, for one that is not there."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is not known: {nearest(name, PRESETS)}")
    return read_config_dict(preset_json(name), f"preset {name}")


def is_preset(name: object) -> bool:
    """Whether `name` means a preset: a file or folder of that name goes before."""
    return str(name) in PRESETS and not Path(str(name)).exists()


def preset_json(name: str) -> dict[str, Any]:
    """The config.json of a preset."""
    preset = PRESETS[name]
    return {"architectures": [FAMILIES[preset.family].architecture], **preset.raw}


def _sizes(width: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


_LLAMA2: dict[str, Any] = dict(vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5)
_LLAMA3: dict[str, Any] = dict(vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=5e5)


def _llama31(factor: float = 8.0, **more: Any) -> dict[str, Any]:
    scaling = dict(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return _LLAMA3 | {"max_position_embeddings": 131072, "rope_scaling": scaling} | more


_QWEN25: dict[str, Any] = dict(vocab_size=152064, max_position_embeddings=32768, rope_theta=1e6)
_QWEN3: dict[str, Any] = dict(vocab_size=151936, max_position_embeddings=40960, rope_theta=1e6)
_QWEN3_MOE = _QWEN3 | dict(norm_topk_prob=True, num_experts=128, num_experts_per_tok=8, head_dim=128)
_LONG: dict[str, Any] = dict(max_position_embeddings=262144, rope_theta=1e7)


def _gemma2(width: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return _sizes(width, mlp, layers, heads, kv_heads, vocab_size=256000, **more)


def _gemma3(width: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    long = dict(vocab_size=262208, sliding_window=1024, rope_scaling={"rope_type": "linear", "factor": 8.0})
    return _sizes(width, mlp, layers, heads, kv_heads, **(long | more))


def _deepseek(mscale: float, factor: float = 40.0, **more: Any) -> dict[str, Any]:
    scaling = dict(
        rope_type="yarn",
        factor=factor,
        beta_fast=32,
        beta_slow=1,
        mscale=mscale,
        mscale_all_dim=mscale,
        original_max_position_embeddings=4096,
    )
    return {"max_position_embeddings": 163840, "rope_theta": 1e4, "rope_scaling": scaling} | more


_DEEPSEEK_V3: dict[str, Any] = dict(
    moe_intermediate_size=2048, num_experts_per_tok=8, n_shared_experts=1, q_lora_rank=1536, norm_topk_prob=True
)
_KIMI_ROPE = _deepseek(1.0, factor=32.0, max_position_embeddings=131072, rope_theta=5e4)
_KIMI_ROPE["rope_scaling"] |= {"beta_fast": 1}
_OLMO3: dict[str, Any] = dict(
    vocab_size=100278,
    max_position_embeddings=65536,
    rms_norm_eps=1e-6,
    sliding_window=4096,
    rope_scaling=dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8192),
)
_OLMO2: dict[str, Any] = dict(vocab_size=100352, max_position_embeddings=4096, rms_norm_eps=1e-6, rope_theta=5e5)
_LLAMA4: dict[str, Any] = dict(
    vocab_size=202048, rope_theta=5e5, attention_chunk_size=8192, attn_temperature_tuning=True, floor_scale=8192
)


def _gpt2(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": layers, "n_head": heads, **more}


_P = Preset
PRESETS: dict[str, Preset] = {
    "llama2-7b": _P("llama", "6.74B", ("meta-llama/Llama-2-7b-hf",), MODEL_CARD,
                    _sizes(4096, 11008, 32, 32, 32, **_LLAMA2)),
    "llama2-13b": _P("llama", "13.0B", ("meta-llama/Llama-2-13b-hf",), MODEL_CARD,
                     _sizes(5120, 13824, 40, 40, 40, **_LLAMA2)),
    "llama2-70b": _P("llama", "69.0B", ("meta-llama/Llama-2-70b-hf",), MAXTEXT_YAML.format("llama2-70b"),
                     _sizes(8192, 28672, 80, 64, 8, **_LLAMA2)),
    "llama3-8b": _P("llama", "8.03B", ("meta-llama/Meta-Llama-3-8B",), MAXTEXT_YAML.format("llama3-8b"),
                    _sizes(4096, 14336, 32, 32, 8, **_LLAMA3)),
    "llama3-70b": _P("llama", "70.6B", ("meta-llama/Meta-Llama-3-70B",), MAXTEXT_YAML.format("llama3-70b"),
                     _sizes(8192, 28672, 80, 64, 8, **_LLAMA3)),
    "llama3.1-8b": _P("llama", "8.03B", ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"), MAXTEXT,
                      _sizes(4096, 14336, 32, 32, 8, **_llama31())),
    "llama3.1-70b": _P("llama", "70.6B", ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B-Instruct"), MAXTEXT,
                       _sizes(8192, 28672, 80, 64, 8, **_llama31())),
    "llama3.1-405b": _P("llama", "405B", ("meta-llama/Llama-3.1-405B",), MAXTEXT,
                        _sizes(16384, 53248, 126, 128, 8, **_llama31())),
    "llama3.2-1b": _P("llama", "1.24B", ("meta-llama/Llama-3.2-1B",), MODEL_CARD,
                      _sizes(2048, 8192, 16, 32, 8, **_llama31(32.0, tie_word_embeddings=True))),
    "llama3.2-3b": _P("llama", "3.21B", ("meta-llama/Llama-3.2-3B",), MODEL_CARD,
                      _sizes(3072, 8192, 28, 24, 8, **_llama31(32.0, tie_word_embeddings=True))),
    "llama3.3-70b": _P("llama", "70.6B", ("meta-llama/Llama-3.3-70B-Instruct",), MAXTEXT_YAML.format("llama3.3-70b"),
                       _sizes(8192, 28672, 80, 64, 8, **_llama31())),
    "smollm2-135m": _P("llama", "135M", ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"),
                       MODEL_CARD, _sizes(576, 1536, 30, 9, 3, vocab_size=49152, max_position_embeddings=8192,
                                          rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True)),
    "smollm2-360m": _P("llama", "362M", ("HuggingFaceTB/SmolLM2-360M",), MODEL_CARD,
                       _sizes(960, 2560, 32, 15, 5, vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5,
                              rope_theta=1e5, tie_word_embeddings=True)),
    "smollm2-1.7b": _P("llama", "1.71B", ("HuggingFaceTB/SmolLM2-1.7B",), MODEL_CARD,
                       _sizes(2048, 8192, 24, 32, 32, vocab_size=49152, max_position_embeddings=8192,
                              rms_norm_eps=1e-5, rope_theta=1.3e5, tie_word_embeddings=True)),
    "mistral-7b": _P("mistral", "7.24B", ("mistralai/Mistral-7B-v0.1",), MAXTEXT_YAML.format("mistral-7b"),
                     _sizes(4096, 14336, 32, 32, 8, vocab_size=32000, max_position_embeddings=32768,
                            rms_norm_eps=1e-5, sliding_window=4096)),
    "mistral-nemo-12b": _P("mistral", "12.2B", ("mistralai/Mistral-Nemo-Base-2407",), MODEL_CARD,
                           _sizes(5120, 14336, 40, 32, 8, head_dim=128, vocab_size=131072, rope_theta=1e6,
                                  max_position_embeddings=131072, rms_norm_eps=1e-5, sliding_window=None)),
    "mixtral-8x7b": _P("mixtral", "46.7B", ("mistralai/Mixtral-8x7B-Instruct-v0.1",), MAXTEXT,
                       _sizes(4096, 14336, 32, 32, 8, vocab_size=32000, max_position_embeddings=32768)),
    "mixtral-8x22b": _P("mixtral", "141B", ("mistralai/Mixtral-8x22B-Instruct-v0.1",), MAXTEXT,
                        _sizes(6144, 16384, 56, 48, 8, vocab_size=32768, max_position_embeddings=65536)),
    "qwen2.5-0.5b": _P("qwen2", "0.49B", ("Qwen/Qwen2.5-0.5B",), MODEL_CARD,
                       _sizes(896, 4864, 24, 14, 2, **_QWEN25 | {"vocab_size": 151936, "tie_word_embeddings": True})),
    "qwen2.5-1.5b": _P("qwen2", "1.54B", ("Qwen/Qwen2.5-1.5B-Instruct",), MAXTEXT,
                       _sizes(1536, 8960, 28, 12, 2, **_QWEN25 | {"vocab_size": 151936, "tie_word_embeddings": True})),
    "qwen2.5-7b": _P("qwen2", "7.61B", ("Qwen/Qwen2.5-7B-Instruct",), MAXTEXT,
                     _sizes(3584, 18944, 28, 28, 4, **_QWEN25)),
    "qwen2.5-14b": _P("qwen2", "14.7B", ("Qwen/Qwen2.5-14B-Instruct",), MAXTEXT,
                      _sizes(5120, 13824, 48, 40, 8, **_QWEN25)),
    "qwen1.5-moe-a2.7b": _P("qwen2_moe", "14.3B", ("Qwen/Qwen1.5-MoE-A2.7B",), CLASS,
                            dict(max_position_embeddings=8192, rope_theta=1e6)),
    "qwen3-0.6b": _P("qwen3", "0.6B", ("Qwen/Qwen3-0.6B",), MAXTEXT,
                     _sizes(1024, 3072, 28, 16, 8, tie_word_embeddings=True, **_QWEN3)),
    "qwen3-1.7b": _P("qwen3", "1.7B", ("Qwen/Qwen3-1.7B",), MAXTEXT,
                     _sizes(2048, 6144, 28, 16, 8, tie_word_embeddings=True, **_QWEN3)),
    "qwen3-4b": _P("qwen3", "4.0B", ("Qwen/Qwen3-4B",), MAXTEXT,
                   _sizes(2560, 9728, 36, 32, 8, tie_word_embeddings=True, **_QWEN3)),
    "qwen3-4b-thinking-2507": _P("qwen3", "4.0B", ("Qwen/Qwen3-4B-Thinking-2507",),
                                 MAXTEXT_YAML.format("qwen3-4b-thinking-2507"),
                                 _sizes(2560, 9728, 36, 32, 8, tie_word_embeddings=True,
                                        **_QWEN3 | {"max_position_embeddings": 262144, "rope_theta": 5e6})),
    "qwen3-8b": _P("qwen3", "8.2B", ("Qwen/Qwen3-8B",), MAXTEXT, _sizes(4096, 12288, 36, 32, 8, **_QWEN3)),
    "qwen3-14b": _P("qwen3", "14.8B", ("Qwen/Qwen3-14B",), MAXTEXT, _sizes(5120, 17408, 40, 40, 8, **_QWEN3)),
    "qwen3-32b": _P("qwen3", "32.8B", ("Qwen/Qwen3-32B",), MAXTEXT, _sizes(5120, 25600, 64, 64, 8, **_QWEN3)),
    "qwen3-30b-a3b": _P("qwen3_moe", "30.5B", ("Qwen/Qwen3-30B-A3B-Thinking-2507",), MAXTEXT,
                        _sizes(2048, 6144, 48, 32, 4, **_QWEN3_MOE | {"moe_intermediate_size": 768} | _LONG)),
    "qwen3-30b-a3b-base": _P("qwen3_moe", "30.5B", ("Qwen/Qwen3-30B-A3B-Base",), MAXTEXT,
                             _sizes(2048, 6144, 48, 32, 4, **_QWEN3_MOE | {"moe_intermediate_size": 768,
                                                                           "max_position_embeddings": 32768})),
    "qwen3-235b-a22b": _P("qwen3_moe", "235B", ("Qwen/Qwen3-235B-A22B-Thinking-2507",), MAXTEXT,
                          _sizes(4096, 12288, 94, 64, 4, **_QWEN3_MOE | {"moe_intermediate_size": 1536} | _LONG
                                 | {"rope_theta": 5e6})),
    "qwen3-480b-a35b": _P("qwen3_moe", "480B", ("Qwen/Qwen3-Coder-480B-A35B-Instruct",), MAXTEXT,
                          _sizes(6144, 8192, 62, 96, 8, **_QWEN3_MOE | {"moe_intermediate_size": 2560,
                                                                        "num_experts": 160} | _LONG)),
    "qwen3-next-80b-a3b": _P("qwen3_next", "80B", ("Qwen/Qwen3-Next-80B-A3B-Instruct",), MAXTEXT,
                             _sizes(2048, 5120, 48, 16, 2, **_LONG)),
    "gemma-2b": _P("gemma", "2.51B", ("google/gemma-2b",), MAXTEXT_YAML.format("gemma-2b"),
                   _sizes(2048, 16384, 18, 8, 1, vocab_size=256000)),
    "gemma-7b": _P("gemma", "8.54B", ("google/gemma-7b",), CLASS, {}),
    "gemma2-2b": _P("gemma2", "2.61B", ("google/gemma-2-2b",), MAXTEXT, _gemma2(2304, 9216, 26, 8, 4)),
    "gemma2-9b": _P("gemma2", "9.24B", ("google/gemma-2-9b",), MODEL_CARD,
                    _gemma2(3584, 14336, 42, 16, 8, query_pre_attn_scalar=256)),
    "gemma2-27b": _P("gemma2", "27.2B", ("google/gemma-2-27b",), MAXTEXT,
                     _gemma2(4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144)),
    "gemma3-1b": _P("gemma3", "1.00B", ("google/gemma-3-1b-it",), MODEL_CARD,
                    _gemma3(1152, 6912, 26, 4, 1, vocab_size=262144, max_position_embeddings=32768,
                            sliding_window=512, rope_scaling=None)),
    "gemma3-4b": _P("gemma3", "3.88B", ("google/gemma-3-4b-it",), MAXTEXT, _gemma3(2560, 10240, 34, 8, 4)),
    "gemma3-12b": _P("gemma3", "11.8B", ("google/gemma-3-12b-it",), MAXTEXT, _gemma3(3840, 15360, 48, 16, 8)),
    "gemma3-27b": _P("gemma3", "27.0B", ("google/gemma-3-27b-it",), MAXTEXT,
                     _gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168)),
    "deepseek2-16b": _P("deepseek_v2", "15.7B", ("deepseek-ai/DeepSeek-V2-Lite",), MAXTEXT,
                        _sizes(2048, 10944, 27, 16, 16, vocab_size=102400, first_k_dense_replace=1,
                               moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
                               num_experts_per_tok=6, q_lora_rank=None, **_deepseek(0.707))),
    "deepseek2-236b": _P("deepseek_v2", "236B", ("deepseek-ai/DeepSeek-V2",), MAXTEXT_YAML.format("deepseek2-236b"),
                         _sizes(5120, 12288, 60, 128, 128, vocab_size=102400, first_k_dense_replace=1,
                                moe_intermediate_size=1536, n_routed_experts=160, n_shared_experts=2,
                                num_experts_per_tok=6, q_lora_rank=1536, routed_scaling_factor=16.0,
                                topk_method="group_limited_greedy", n_group=8, topk_group=3, **_deepseek(0.707))),
    "deepseek3-671b": _P("deepseek_v3", "671B", ("deepseek-ai/DeepSeek-V3",), MAXTEXT,
                         _sizes(7168, 18432, 61, 128, 128, vocab_size=129280, first_k_dense_replace=3,
                                n_routed_experts=256, n_group=8, topk_group=4, routed_scaling_factor=2.5,
                                **_DEEPSEEK_V3, **_deepseek(1.0))),
    "kimi-k2-1t": _P("deepseek_v3", "1T", ("moonshotai/Kimi-K2-Instruct",), MAXTEXT_YAML.format("kimi-k2-1t"),
                     _sizes(7168, 18432, 61, 64, 64, vocab_size=163840, first_k_dense_replace=1, n_routed_experts=384,
                            n_group=1, topk_group=1, routed_scaling_factor=2.827, **_DEEPSEEK_V3, **_KIMI_ROPE)),
    "gpt-oss-20b": _P("gpt_oss", "20.9B", ("unsloth/gpt-oss-20b-BF16", "openai/gpt-oss-20b"), MAXTEXT,
                      dict(num_hidden_layers=24, num_local_experts=32)),
    "gpt-oss-120b": _P("gpt_oss", "116.8B", ("unsloth/gpt-oss-120b-BF16", "openai/gpt-oss-120b"), MAXTEXT,
                       dict(num_hidden_layers=36, num_local_experts=128)),
    "olmo2-7b": _P("olmo2", "7.30B", ("allenai/OLMo-2-1124-7B",), MODEL_CARD,
                   _sizes(4096, 11008, 32, 32, 32, **_OLMO2)),
    "olmo2-13b": _P("olmo2", "13.7B", ("allenai/OLMo-2-1124-13B",), MODEL_CARD,
                    _sizes(5120, 13824, 40, 40, 40, **_OLMO2)),
    "olmo2-32b": _P("olmo2", "32.2B", ("allenai/OLMo-2-0325-32B",), MODEL_CARD,
                    _sizes(5120, 27648, 64, 40, 8, **_OLMO2)),
    "olmo3-7b": _P("olmo3", "7.30B", ("allenai/Olmo-3-7B-Instruct",), MAXTEXT_YAML.format("olmo3-7b"),
                   _sizes(4096, 11008, 32, 32, 32, **_OLMO3)),
    "olmo3-7b-pt": _P("olmo3", "7.30B", ("allenai/Olmo-3-1025-7B",), MAXTEXT_YAML.format("olmo3-7b-pt"),
                      _sizes(4096, 11008, 32, 32, 32, **_OLMO3 | {"rope_scaling": None,
                                                                  "max_position_embeddings": 8192})),
    "olmo3-32b": _P("olmo3", "32.2B", ("allenai/Olmo-3-32B-Think",), MAXTEXT_YAML.format("olmo3-32b"),
                    _sizes(5120, 27648, 64, 40, 8, **_OLMO3)),
    "llama4-17b-16e": _P("llama4", "109B", ("meta-llama/Llama-4-Scout-17B-16E-Instruct",),
                         MAXTEXT_YAML.format("llama4-17b-16e"),
                         _sizes(5120, 8192, 48, 40, 8, max_position_embeddings=10485760, num_local_experts=16,
                                interleave_moe_layer_step=1, use_qk_norm=True,
                                rope_scaling=dict(rope_type="llama3", factor=16.0, low_freq_factor=1.0,
                                                  high_freq_factor=1.0, original_max_position_embeddings=8192),
                                **_LLAMA4), besides="an image encoder"),
    "llama4-17b-128e": _P("llama4", "400B", ("meta-llama/Llama-4-Maverick-17B-128E-Instruct",),
                          MAXTEXT_YAML.format("llama4-17b-128e"),
                          _sizes(5120, 8192, 48, 40, 8, max_position_embeddings=1048576, num_local_experts=128,
                                 interleave_moe_layer_step=2, use_qk_norm=False, **_LLAMA4)),
    "phi3-mini-4k": _P("phi3", "3.8B", ("microsoft/Phi-3-mini-4k-instruct",), CLASS, dict(sliding_window=2047)),
    "phi3-medium-4k": _P("phi3", "14B", ("microsoft/Phi-3-medium-4k-instruct",), MODEL_CARD,
                         _sizes(5120, 17920, 40, 40, 10, sliding_window=2047)),
    "phi4": _P("phi3", "14.7B", ("microsoft/phi-4",), MODEL_CARD,
               _sizes(5120, 17920, 40, 40, 10, vocab_size=100352, max_position_embeddings=16384,
                      original_max_position_embeddings=16384, rope_theta=250000)),
    "gpt2": _P("gpt2", "124M", ("openai-community/gpt2",), CLASS, {}),
    "gpt2-medium": _P("gpt2", "355M", ("openai-community/gpt2-medium",), MODEL_CARD, _gpt2(1024, 24, 16)),
    "gpt2-large": _P("gpt2", "774M", ("openai-community/gpt2-large",), MODEL_CARD, _gpt2(1280, 36, 20)),
    "gpt2-xl": _P("gpt2", "1.56B", ("openai-community/gpt2-xl",), MODEL_CARD, _gpt2(1600, 48, 25)),
    "gpt3-175b": _P("gpt2", "175B", (), "Brown et al. 2020 (arXiv 2005.14165), table 2.1",
                    _gpt2(12288, 96, 96, n_positions=2048)),
}  # fmt: skip

# Hub ids of MaxText (utils/globals.py of 0.2.5) that are no preset: what this decoder does not compute.
NOT_SUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        ("google/gemma-4-26b-a4b-it", "google/gemma-4-31b-it"),
        "gemma4: keys that are also values, a second head width in global layers, proportional RoPE",
    ),
    **dict.fromkeys(
        ("google/gemma-4-E2B-it", "google/gemma-4-E4B-it"),
        "gemma4: embeddings per layer, layers that share keys and values, proportional RoPE",
    ),
    **dict.fromkeys(
        (
            "Qwen/Qwen3-VL-2B-Instruct",
            "Qwen/Qwen3-VL-4B-Instruct",
            "Qwen/Qwen3-VL-8B-Instruct",
            "Qwen/Qwen3-VL-30B-A3B-Instruct",
        ),
        "qwen3_vl: image features enter several layers, positions in three axes",
    ),
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": "qwen3_omni_moe: audio and images, positions in three axes",
    **dict.fromkeys(
        ("Qwen/Qwen3.5-397B-A17B", "Qwen/Qwen3.5-397B-A17B-FP8", "Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.5-35B-A3B-FP8"),
        "qwen3_5_moe: a multimodal model, positions in three axes",
    ),
    "deepseek-ai/DeepSeek-V3.2": "deepseek_v32: attention over the keys that an indexer chooses",
    "deepseek-ai/DeepSeek-V4-Flash": "deepseek_v4: attention over compressed keys, several residual streams",
}
