# SPDX-License-Identifier: Apache-2.0
"""Where each tensor lies below a MaxText layer: one table for each decoder block, in the notation of `formats/axes.py`.

`{i}` in a key is the layer's container (`containers.py`: `decoder/layers_3`, or `decoder/layers` and a position on the
layer axis), `{part}` the suffix of one of two layers that a container merges (Gemma 2: `_local`, `_global`). Shapes are
those of one layer. Rows of one path are alternatives: read by the first whose key is stored, written by the very first.
The moments of an optimizer lie in the same places of a tree of their own.

Checked against checkpoints of MaxText 0.2.4 and 0.2.5 (llama2, deepseek, gemma3; tests/fixtures/maxtext); the others
after the names and shapes in its sources.
"""

from maxkit.formats.tables import Leaf

_ENDS = (
    Leaf("embed/table", "token_embedder/embedding", "VD"),
    Leaf("final_norm/scale", "decoder/decoder_norm/scale", "D"),
    Leaf("final_norm/bias", "decoder/decoder_norm/bias", "D", "norm_bias"),
    Leaf("output/kernel", "decoder/logits_dense/kernel", "DV > VD", "untied"),
)


def _norms(**names: str) -> tuple[Leaf, ...]:
    """{our norm: its name there}."""
    return tuple(Leaf(f"layers/{ours}/scale", f"{{i}}/{theirs}{{part}}/scale", "D") for ours, theirs in names.items())


def _attention(name: str) -> tuple[Leaf, ...]:
    """Grouped-query attention, its projections apart or in one (`fused_qkv`)."""
    at = f"{{i}}/{name}{{part}}/"
    return (
        Leaf("layers/attention/query/kernel", at + "query/kernel", "DNH"),
        Leaf("layers/attention/key/kernel", at + "key/kernel", "DKH"),
        Leaf("layers/attention/value/kernel", at + "value/kernel", "DKH"),
        Leaf("layers/attention/query/kernel", at + "qkv_proj/kernel", "D(*N+K+K)H > DNH"),
        Leaf("layers/attention/key/kernel", at + "qkv_proj/kernel", "D(N+*K+K)H > DKH"),
        Leaf("layers/attention/value/kernel", at + "qkv_proj/kernel", "D(N+K+*K)H > DKH"),
        Leaf("layers/attention/query/bias", at + "query/bias", "NH", "attention_bias"),
        Leaf("layers/attention/key/bias", at + "key/bias", "KH", "attention_bias"),
        Leaf("layers/attention/value/bias", at + "value/bias", "KH", "attention_bias"),
        Leaf("layers/attention/out/kernel", at + "out/kernel", "NHD"),
        Leaf("layers/attention/out/bias", at + "out/bias", "D", "attention_out_bias"),
        Leaf("layers/attention/query_norm/scale", at + "query_norm/scale", "H", "head_norm"),
        Leaf("layers/attention/key_norm/scale", at + "key_norm/scale", "H", "head_norm"),
        Leaf("layers/attention/query_norm/scale", at + "query_norm/scale", "(NH) > NH", "projection_norm"),
        Leaf("layers/attention/key_norm/scale", at + "key_norm/scale", "(KH) > KH", "projection_norm"),
        Leaf("layers/attention/sinks", at + "sinks", "N", "attention_sinks"),
    )


_LATENT = "{i}/self_attention/"
_LATENT_ATTENTION = (
    Leaf("layers/attention/query/kernel", _LATENT + "query/kernel", "DNH", "no_query_rank"),
    Leaf("layers/attention/query_down/kernel", _LATENT + "wq_a/kernel", "DQ", "query_rank"),
    Leaf("layers/attention/query_norm/scale", _LATENT + "q_norm/scale", "Q", "query_rank"),
    Leaf("layers/attention/query_up/kernel", _LATENT + "wq_b/kernel", "QNH", "query_rank"),
    Leaf("layers/attention/kv_down/kernel", _LATENT + "wkv_a/kernel", "D(*Z+r) > DZ"),
    Leaf("layers/attention/key_rope/kernel", _LATENT + "wkv_a/kernel", "D(Z+*r) > Dr"),
    Leaf("layers/attention/kv_norm/scale", _LATENT + "kv_norm/scale", "Z"),
    Leaf("layers/attention/key_up/kernel", _LATENT + "wkv_b/kernel", "ZN(*n+v) > ZNn"),
    Leaf("layers/attention/value_up/kernel", _LATENT + "wkv_b/kernel", "ZN(n+*v) > ZNv"),
    Leaf("layers/attention/out/kernel", _LATENT + "out/kernel", "NvD"),
)


def _mlp(path: str, key: str, width: str, when: str) -> tuple[Leaf, ...]:
    """Gate and up are `wi_0` and `wi_1`, or the two columns of `wi` (`fused_mlp`); without a gate `wi` is up."""
    return (
        Leaf(f"{path}/gate/kernel", f"{key}/wi_0/kernel", f"D{width}", f"{when} mlp_gated"),
        Leaf(f"{path}/up/kernel", f"{key}/wi_1/kernel", f"D{width}", f"{when} mlp_gated"),
        Leaf(f"{path}/gate/kernel", f"{key}/wi/kernel", f"D(*1+1){width} > D{width}", f"{when} mlp_gated"),
        Leaf(f"{path}/up/kernel", f"{key}/wi/kernel", f"D(1+*1){width} > D{width}", f"{when} mlp_gated"),
        Leaf(f"{path}/up/kernel", f"{key}/wi/kernel", f"D{width}", when),
        Leaf(f"{path}/down/kernel", f"{key}/wo/kernel", f"{width}D", when),
    )


def _experts(name: str) -> tuple[Leaf, ...]:
    """Router and experts; the experts' weights have no `kernel` part."""
    at = "{i}/" + name + "/"
    return (
        Leaf("layers/mlp/router/kernel", at + "gate/kernel", "DE", "moe"),
        Leaf("layers/mlp/router/correction", at + "gate/bias", "E", "moe correction"),
        Leaf("layers/mlp/router/bias", at + "gate/bias", "E", "moe router_bias"),
        Leaf("layers/mlp/experts/gate/kernel", at + "wi_0", "EDf", "moe"),
        Leaf("layers/mlp/experts/up/kernel", at + "wi_1", "EDf", "moe"),
        Leaf("layers/mlp/experts/down/kernel", at + "wo", "EfD", "moe"),
        Leaf("layers/mlp/experts/gate/bias", at + "wi_0_bias", "Ef", "moe expert_bias"),
        Leaf("layers/mlp/experts/up/bias", at + "wi_1_bias", "Ef", "moe expert_bias"),
        Leaf("layers/mlp/experts/down/bias", at + "wo_bias", "ED", "moe expert_bias"),
    )


_DENSE = _mlp("layers/mlp", "{i}/mlp{part}", "F", "dense")
_PRE = _norms(attention_norm="pre_self_attention_layer_norm", mlp_norm="post_self_attention_layer_norm")
_FOUR = _norms(
    attention_norm="pre_self_attention_norm",
    attention_out_norm="post_self_attention_norm",
    mlp_norm="pre_ffw_norm",
    mlp_out_norm="post_ffw_norm",
)
_LLAMA = (*_ENDS, *_PRE, *_attention("self_attention"), *_DENSE)
_DEEPSEEK = (
    *(*_ENDS, *_PRE, *_LATENT_ATTENTION, *_DENSE),
    *_experts("DeepSeekMoeBlock_0/MoeBlock_0"),
    *_mlp("layers/mlp/shared", "{i}/DeepSeekMoeBlock_0/shared_experts", "s", "moe shared"),
)
_OLMO3 = (
    *_ENDS,
    *_norms(attention_out_norm="post_self_attention_layer_norm", mlp_out_norm="post_mlp_layer_norm"),
    *(*_attention("attention"), *_DENSE),
)

_LLAMA4 = (
    *(*_ENDS, *_PRE, *_attention("self_attention"), *_DENSE),
    *_experts("Llama4MoEBlock_0/MoeBlock_0"),
    *_mlp("layers/mlp/shared", "{i}/Llama4MoEBlock_0/shared_experts", "s", "moe shared"),
)

_FULL, _DELTA = "{i}/attention/attention/", "{i}/attention/"
_QWEN3_NEXT = (
    *(*_ENDS, *_norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")),
    Leaf("layers/attention/query/kernel", _FULL + "query/kernel", "DN(*H+H) > DNH", "attention"),
    Leaf("layers/attention/gate/kernel", _FULL + "query/kernel", "DN(H+*H) > DNH", "attention"),
    Leaf("layers/attention/key/kernel", _FULL + "key/kernel", "DKH", "attention"),
    Leaf("layers/attention/value/kernel", _FULL + "value/kernel", "DKH", "attention"),
    Leaf("layers/attention/out/kernel", _FULL + "out/kernel", "(NH)D > NHD", "attention"),
    Leaf("layers/attention/query_norm/scale", _FULL + "query_norm/scale", "H", "attention"),
    Leaf("layers/attention/key_norm/scale", _FULL + "key_norm/scale", "H", "attention"),
    Leaf("layers/delta/query/kernel", _DELTA + "in_proj_qkvz/kernel", "D(k(*h+h+gu+gu)) > Dkh", "delta"),
    Leaf("layers/delta/key/kernel", _DELTA + "in_proj_qkvz/kernel", "D(k(h+*h+gu+gu)) > Dkh", "delta"),
    Leaf("layers/delta/value/kernel", _DELTA + "in_proj_qkvz/kernel", "D(k(h+h+*gu+gu)) > D(kg)u", "delta"),
    Leaf("layers/delta/gate/kernel", _DELTA + "in_proj_qkvz/kernel", "D(k(h+h+gu+*gu)) > D(kg)u", "delta"),
    Leaf("layers/delta/beta/kernel", _DELTA + "in_proj_ba/kernel", "D(k(*g+g)) > D(kg)", "delta"),
    Leaf("layers/delta/decay/kernel", _DELTA + "in_proj_ba/kernel", "D(k(g+*g)) > D(kg)", "delta"),
    Leaf("layers/delta/query_conv/kernel", _DELTA + "conv1d/kernel", "w1(*kh+kh+kgu) > khw", "delta"),
    Leaf("layers/delta/key_conv/kernel", _DELTA + "conv1d/kernel", "w1(kh+*kh+kgu) > khw", "delta"),
    Leaf("layers/delta/value_conv/kernel", _DELTA + "conv1d/kernel", "w1(kh+kh+*kgu) > (kg)uw", "delta"),
    Leaf("layers/delta/dt_bias", _DELTA + "dt_bias", "(kg)", "delta"),
    Leaf("layers/delta/log_decay", _DELTA + "A_log", "(kg)", "delta"),
    Leaf("layers/delta/norm/scale", _DELTA + "norm/rms_norm/scale", "u", "delta"),
    Leaf("layers/delta/out/kernel", _DELTA + "out_proj/kernel", "(kgu)D > (kg)uD", "delta"),
    *_experts("mlp/routed_experts"),
    *_mlp("layers/mlp/shared", "{i}/mlp/shared_expert", "s", "moe shared"),
    Leaf("layers/mlp/shared_gate/kernel", "{i}/mlp/shared_expert_gate/kernel", "D1 > D", "moe shared_gate"),
)

_FUSED = "{i}/self_attention/qkv_proj/"
_GPT3 = (
    *(*_ENDS, Leaf("positions/table", "decoder/position_embedder/embedding", "SD")),
    Leaf("layers/attention_norm/scale", "{i}/pre_self_attention_norm/scale", "D"),
    Leaf("layers/attention_norm/bias", "{i}/pre_self_attention_norm/bias", "D", "norm_bias"),
    Leaf("layers/mlp_norm/scale", "{i}/mlp/mlp_layer_norm/scale", "D"),
    Leaf("layers/mlp_norm/bias", "{i}/mlp/mlp_layer_norm/bias", "D", "norm_bias"),
    *(row for row in _attention("self_attention") if "qkv_proj" not in row.key),
    *(  # fused, the three lie side by side on an axis of their own
        Leaf(f"layers/attention/{name}/{part}", _FUSED + part, axes, when)
        for part, left, heads, when in (("kernel", "D", "{}H", ""), ("bias", "", "{}H", "attention_bias"))
        for name, three, letter in (("query", "(*1+1+1)", "N"), ("key", "(1+*1+1)", "K"), ("value", "(1+1+*1)", "K"))
        for axes in [f"{left}{three}{heads.format(letter)} > {left}{heads.format(letter)}"]
    ),
    *_DENSE,
    Leaf("layers/mlp/up/bias", "{i}/mlp/wi/bias", "F", "mlp_bias"),
    Leaf("layers/mlp/down/bias", "{i}/mlp/wo/bias", "D", "mlp_bias"),
)

ROWS: dict[str, tuple[Leaf, ...]] = {
    "llama2": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": (*_ENDS, *_PRE, *_attention("self_attention"), *_experts("MoeBlock_0")),
    "qwen3_moe": (*_ENDS, *_PRE, *_attention("self_attention"), *_experts("moe_block")),
    "gpt_oss": (*_ENDS, *_PRE, *_attention("GptOssAttention"), *_experts("GptOssMlp")),
    "gemma": (
        *(*_ENDS, *_attention("self_attention"), *_DENSE),
        *_norms(attention_norm="pre_self_attention_norm", mlp_norm="pre_ffw_norm"),
    ),
    "gemma2": (*_ENDS, *_FOUR, *_attention("self_attention"), *_DENSE),
    "gemma3": (*_ENDS, *_FOUR, *_attention("self_attention"), *_DENSE),
    "deepseek": _DEEPSEEK,
    "olmo3": _OLMO3,
    "llama4": _LLAMA4,
    "qwen3_next": _QWEN3_NEXT,
    "gpt3": _GPT3,
}
