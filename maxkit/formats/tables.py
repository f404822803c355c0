# SPDX-License-Identifier: Apache-2.0
"""Where each tensor of a model lies in foreign files, one declarative table per family and format.

A `Leaf` row says: this canonical path is that key, and its axes are rearranged so (`axes.py` has the notation).

    {i}  in a key is the layer's number
    {e}  is the number of an expert: one foreign tensor for each, stacked on our axis E

Rows of one path are alternatives: a file is read by the first whose key it has, and written by the very first.
`when` names the conditions under which a row exists, all of which must hold, in the model or in the layer
("moe router_bias": in the layers that are mixtures, if their routers have biases).
A file may also hold keys that are no weights, or none of this model: `ignored` names them with the reason.

Not here: opening files. To add a family, add its rows to `TABLES`.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from maxkit.errors import UserError, nearest
from maxkit.formats.axes import Rearrangement, parse_axes
from maxkit.formats.contents import Address
from maxkit.models.config import BlockSpec, ModelConfig

# Conditions on the model.
_OF_MODEL: dict[str, Callable[[ModelConfig], object]] = {
    "untied": lambda config: not config.tie_embeddings,
    "head_bias": lambda config: config.head_bias,
    "norm_bias": lambda config: config.norm_bias,
    "two_norms": lambda config: config.parallel_branches != "one_norm",
    "attention_bias": lambda config: config.attention_bias,
    "attention_out_bias": lambda config: config.attention_out_bias,
    "attention_gate": lambda config: config.attention_gate,
    "attention_sinks": lambda config: config.attention_sinks,
    "head_norm": lambda config: config.qk_norm == "head",
    "projection_norm": lambda config: config.qk_norm == "projection",
    "mlp_gated": lambda config: config.mlp_gated,
    "mlp_bias": lambda config: config.mlp_bias,
    "query_rank": lambda config: config.mla and config.mla.q_rank,
    "no_query_rank": lambda config: config.mla and not config.mla.q_rank,
    "shared": lambda config: config.moe and config.moe.shared_mlp_dim,
    "shared_gate": lambda config: config.moe and config.moe.shared_mlp_dim and config.moe.shared_gate,
    "correction": lambda config: config.moe and config.moe.correction_bias,
    "router_bias": lambda config: config.moe and config.moe.router_bias,
    "expert_bias": lambda config: config.moe and config.moe.expert_bias,
}
# Conditions on a layer.
_OF_LAYER: dict[str, Callable[[BlockSpec], bool]] = {
    "attention": lambda block: block.mixer == "attention",
    "delta": lambda block: block.mixer == "gated_delta",
    "dense": lambda block: block.mlp == "dense",
    "moe": lambda block: block.mlp == "moe",
}


def letter_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of every letter that a table may use; lower-case ones are known only to the tables."""
    mla, moe, delta = config.mla, config.moe, config.gated_delta
    sizes = {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "S": config.max_seq_len,
        "G": config.num_heads // config.num_kv_heads,
        "c": 2,  # the halves of a head that RoPE turns
        "j": config.head_dim // 2,
    }
    if mla:  # n, r, v: the parts of a head without position, with it, and of values
        sizes |= {"Q": mla.q_rank or 0, "Z": mla.kv_rank}
        sizes |= {"n": mla.nope_head_dim, "r": mla.rope_head_dim, "v": mla.v_head_dim}
    if moe:  # f, s: hidden widths of an expert and of the shared one
        sizes |= {"E": moe.num_experts, "f": moe.mlp_dim, "s": moe.shared_mlp_dim}
    if delta:  # k key heads of width h, for each g value heads of width u; a convolution over w tokens
        sizes |= {"k": delta.num_key_heads, "h": delta.key_head_dim, "w": delta.conv_width}
        sizes |= {"g": delta.num_value_heads // delta.num_key_heads, "u": delta.value_head_dim}
    return sizes


@dataclass(frozen=True)
class Leaf:
    """One kind of tensor: our path, the foreign key, `foreign axes > our axes`, and where it exists."""

    path: str
    key: str
    axes: str
    when: str = ""

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor in each layer."""
        return "{i}" in self.key

    def exists(self, config: ModelConfig, block: BlockSpec | None) -> bool:
        """Whether a model, in a layer of this kind, has the tensor."""
        return all(
            _OF_LAYER[name](block) if name in _OF_LAYER and block else bool(_OF_MODEL[name](config))
            for name in self.when.split()
        )


Fetch = Callable[[str, int | None], np.ndarray]  # (foreign key, row of its first axis or None for all) -> array


@dataclass(frozen=True)
class Place:
    """Where a canonical tensor lies: in one foreign tensor, or its experts in `keys` of their own or in `rows` of one.

    `rearrangement` is of one foreign tensor or row. Experts are read one by one, so that beside the result no more
    than one is in memory.
    """

    keys: tuple[str, ...]
    rearrangement: Rearrangement
    experts: Literal["none", "keys", "rows"] = "none"

    @property
    def num_experts(self) -> int:
        """How many pieces there are."""
        return 1 if self.experts == "none" else self.rearrangement.sizes["E"]

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """The shape of the model's parameter."""
        front = () if self.experts == "none" else (self.num_experts,)
        return front + self.rearrangement.canonical_shape

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """The shape of each of the foreign tensors."""
        return ((self.num_experts,) if self.experts == "rows" else ()) + self.rearrangement.foreign_shape

    @property
    def is_whole(self) -> bool:
        """Whether the foreign tensors hold nothing else."""
        return self.rearrangement.is_whole

    def read(self, fetch: Fetch) -> np.ndarray:
        """The canonical tensor in its stored type, as an array of its own."""
        if self.experts == "none":
            return self.rearrangement.read(fetch(self.keys[0], None))
        result = np.empty(0)
        for expert in range(self.num_experts):
            piece = fetch(self.keys[0], expert) if self.experts == "rows" else fetch(self.keys[expert], None)
            if expert == 0:
                result = np.empty(self.canonical_shape, piece.dtype)
            self.rearrangement.read_into(result[expert], piece)
        return result

    def write_into(self, target: np.ndarray, array: np.ndarray, number: int) -> None:
        """Put canonical `array`, or what of it belongs there, into the foreign tensor `keys[number]`."""
        if self.experts == "none":
            self.rearrangement.write_into(target, array)
        elif self.experts == "keys":
            self.rearrangement.write_into(target, array[number])
        else:
            for expert in range(self.num_experts):
                self.rearrangement.write_into(target[expert], array[expert])


class Table:
    """The rows of a family and format for one config: address -> `Place`.

    `stored` are the keys of a file to be read, which decide between alternatives; None to write.
    """

    def __init__(
        self, rows: tuple[Leaf, ...], config: ModelConfig, stored: Collection[str] | None = None, spelling: int = 0
    ) -> None:
        self._sizes = letter_sizes(config)
        self.entries: dict[Address, Place] = {}
        for path, layer, row in self._in_order(rows, config):
            key = respell(row.key.replace("{i}", str(layer)), spelling)
            known = self.entries.get((path, layer))
            better = stored is not None and key.replace("{e}", "0") in stored
            if known is None or (better and known.keys[0] not in stored):
                self.entries[path, layer] = self._place(key, row.axes)

    def _place(self, key: str, axes: str) -> Place:
        foreign, _, canonical = axes.replace(" ", "").partition(">")
        if "{e}" in key:
            keys = tuple(key.replace("{e}", str(expert)) for expert in range(self._sizes["E"]))
            return Place(keys, parse_axes(f"{foreign}>{canonical[1:]}", self._sizes), "keys")
        if foreign[0] == "E" and canonical[:1] == "E" and len(canonical) > 1:
            return Place((key,), parse_axes(f"{foreign[1:]}>{canonical[1:]}", self._sizes), "rows")
        return Place((key,), parse_axes(axes, self._sizes))

    @staticmethod
    def _in_order(rows: tuple[Leaf, ...], config: ModelConfig) -> Iterator[tuple[str, int | None, Leaf]]:
        yield from ((row.path, None, row) for row in rows if not row.per_layer and row.exists(config, None))
        for layer, block in enumerate(config.blocks):
            yield from ((row.path, layer, row) for row in rows if row.per_layer and row.exists(config, block))

    def __getitem__(self, address: Address) -> Place:
        """The place of an address; a UserError for one the model does not have."""
        if address not in self.entries:
            path, layer = address
            layers = [number for known, number in self.entries if known == path]
            if layers:
                tail = f"layer {layer} is outside the model" if layer not in range(max(layers)) else "not in this layer"
            else:
                tail = nearest(path, {known for known, _ in self.entries})
            raise UserError(f"this model has no tensor {path!r} (layer {layer}): {tail}")
        return self.entries[address]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every foreign key, in order, with the shape of its tensor."""
        return {key: place.foreign_shape for place in self.entries.values() for key in place.keys}


# --- rows that several families share ---------------------------------------------------------

_LAYER = "model.layers.{i}."
_ENDS = (
    Leaf("embed/table", "model.embed_tokens.weight", "VD"),
    Leaf("final_norm/scale", "model.norm.weight", "D"),
    Leaf("final_norm/bias", "model.norm.bias", "D", "norm_bias"),
    Leaf("output/kernel", "lm_head.weight", "VD", "untied"),
    Leaf("output/bias", "lm_head.bias", "V", "head_bias"),
)
_PRE_NORMS = (
    Leaf("layers/attention_norm/scale", _LAYER + "input_layernorm.weight", "D"),
    Leaf("layers/attention_norm/bias", _LAYER + "input_layernorm.bias", "D", "norm_bias"),
    Leaf("layers/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight", "D", "two_norms"),
    Leaf("layers/mlp_norm/bias", _LAYER + "post_attention_layernorm.bias", "D", "two_norms norm_bias"),
)
_POST_NORMS = (
    Leaf("layers/attention_out_norm/scale", _LAYER + "post_attention_layernorm.weight", "D"),
    Leaf("layers/mlp_out_norm/scale", _LAYER + "post_feedforward_layernorm.weight", "D"),
)
_FOUR_NORMS = (
    Leaf("layers/attention_norm/scale", _LAYER + "input_layernorm.weight", "D"),
    *_POST_NORMS,
    Leaf("layers/mlp_norm/scale", _LAYER + "pre_feedforward_layernorm.weight", "D"),
)
_ATTENTION = _LAYER + "self_attn."
_OUT = (
    Leaf("layers/attention/out/kernel", _ATTENTION + "o_proj.weight", "D(NH) > NHD", "attention"),
    Leaf("layers/attention/out/bias", _ATTENTION + "o_proj.bias", "D", "attention attention_out_bias"),
)
_KEY_VALUE = (
    Leaf("layers/attention/key/kernel", _ATTENTION + "k_proj.weight", "(KH)D > DKH", "attention"),
    Leaf("layers/attention/key/bias", _ATTENTION + "k_proj.bias", "(KH) > KH", "attention attention_bias"),
    Leaf("layers/attention/value/kernel", _ATTENTION + "v_proj.weight", "(KH)D > DKH", "attention"),
    Leaf("layers/attention/value/bias", _ATTENTION + "v_proj.bias", "(KH) > KH", "attention attention_bias"),
)
_QK_NORMS = (
    Leaf("layers/attention/query_norm/scale", _ATTENTION + "q_norm.weight", "H", "attention head_norm"),
    Leaf("layers/attention/key_norm/scale", _ATTENTION + "k_norm.weight", "H", "attention head_norm"),
    Leaf("layers/attention/query_norm/scale", _ATTENTION + "q_norm.weight", "(NH) > NH", "attention projection_norm"),
    Leaf("layers/attention/key_norm/scale", _ATTENTION + "k_norm.weight", "(KH) > KH", "attention projection_norm"),
)
_GROUPED_QUERY = (
    Leaf("layers/attention/query/kernel", _ATTENTION + "q_proj.weight", "(NH)D > DNH", "attention"),
    Leaf("layers/attention/query/bias", _ATTENTION + "q_proj.bias", "(NH) > NH", "attention attention_bias"),
    *_KEY_VALUE,
    *_OUT,
    *_QK_NORMS,
    Leaf("layers/attention/sinks", _ATTENTION + "sinks", "N", "attention attention_sinks"),
)
_PHI3_ATTENTION = (
    Leaf("layers/attention/query/kernel", _ATTENTION + "qkv_proj.weight", "(*NH+KH+KH)D > DNH"),
    Leaf("layers/attention/key/kernel", _ATTENTION + "qkv_proj.weight", "(NH+*KH+KH)D > DKH"),
    Leaf("layers/attention/value/kernel", _ATTENTION + "qkv_proj.weight", "(NH+KH+*KH)D > DKH"),
    *_OUT,
)
_LATENT_ATTENTION = (
    Leaf("layers/attention/query/kernel", _ATTENTION + "q_proj.weight", "(NH)D > DNH", "no_query_rank"),
    Leaf("layers/attention/query_down/kernel", _ATTENTION + "q_a_proj.weight", "QD > DQ", "query_rank"),
    Leaf("layers/attention/query_norm/scale", _ATTENTION + "q_a_layernorm.weight", "Q", "query_rank"),
    Leaf("layers/attention/query_up/kernel", _ATTENTION + "q_b_proj.weight", "(NH)Q > QNH", "query_rank"),
    Leaf("layers/attention/kv_down/kernel", _ATTENTION + "kv_a_proj_with_mqa.weight", "(*Z+r)D > DZ"),
    Leaf("layers/attention/key_rope/kernel", _ATTENTION + "kv_a_proj_with_mqa.weight", "(Z+*r)D > Dr"),
    Leaf("layers/attention/kv_norm/scale", _ATTENTION + "kv_a_layernorm.weight", "Z"),
    Leaf("layers/attention/key_up/kernel", _ATTENTION + "kv_b_proj.weight", "(N(*n+v))Z > ZNn"),
    Leaf("layers/attention/value_up/kernel", _ATTENTION + "kv_b_proj.weight", "(N(n+*v))Z > ZNv"),
    Leaf("layers/attention/out/kernel", _ATTENTION + "o_proj.weight", "D(Nv) > NvD"),
)


def _mlp(path: str, key: str, width: str, when: str) -> tuple[Leaf, ...]:
    """The three matrices of a gated MLP; the gate's row is left out of an MLP that has none."""
    return (
        Leaf(f"{path}/gate/kernel", f"{key}gate_proj.weight", f"{width}D > D{width}", f"{when} mlp_gated"),
        Leaf(f"{path}/up/kernel", f"{key}up_proj.weight", f"{width}D > D{width}", when),
        Leaf(f"{path}/down/kernel", f"{key}down_proj.weight", f"D{width} > {width}D", when),
    )


def _mlp_biases(key: str) -> tuple[Leaf, ...]:
    return (
        Leaf("layers/mlp/gate/bias", f"{key}gate_proj.bias", "F", "dense mlp_gated mlp_bias"),
        Leaf("layers/mlp/up/bias", f"{key}up_proj.bias", "F", "dense mlp_bias"),
        Leaf("layers/mlp/down/bias", f"{key}down_proj.bias", "D", "dense mlp_bias"),
    )


def _experts(key: str, gate: str, up: str, down: str) -> tuple[Leaf, ...]:
    """One tensor per expert, as published; or all experts in two tensors, as transformers 5 holds them in memory."""
    return (
        Leaf("layers/mlp/experts/gate/kernel", f"{key}experts.{{e}}.{gate}.weight", "fD > EDf", "moe"),
        Leaf("layers/mlp/experts/up/kernel", f"{key}experts.{{e}}.{up}.weight", "fD > EDf", "moe"),
        Leaf("layers/mlp/experts/down/kernel", f"{key}experts.{{e}}.{down}.weight", "Df > EfD", "moe"),
        *(
            row
            for base in dict.fromkeys((key, _LAYER + "mlp."))
            for row in (
                Leaf("layers/mlp/experts/gate/kernel", f"{base}experts.gate_up_proj", "E(*f+f)D > EDf", "moe"),
                Leaf("layers/mlp/experts/up/kernel", f"{base}experts.gate_up_proj", "E(f+*f)D > EDf", "moe"),
                Leaf("layers/mlp/experts/down/kernel", f"{base}experts.down_proj", "EDf > EfD", "moe"),
            )
        ),
    )


_DENSE = (*_mlp("layers/mlp", _LAYER + "mlp.", "F", "dense"), *_mlp_biases(_LAYER + "mlp."))
_ROUTER = (Leaf("layers/mlp/router/kernel", _LAYER + "mlp.gate.weight", "ED > DE", "moe"),)
_PLAIN_EXPERTS = _experts(_LAYER + "mlp.", "gate_proj", "up_proj", "down_proj")
_QWEN_SHARED = (
    *_mlp("layers/mlp/shared", _LAYER + "mlp.shared_expert.", "s", "moe shared"),
    Leaf("layers/mlp/shared_gate/kernel", _LAYER + "mlp.shared_expert_gate.weight", "1D > D", "moe shared_gate"),
)

# --- the families -----------------------------------------------------------------------------

_LLAMA = (*_ENDS, *_PRE_NORMS, *_GROUPED_QUERY, *_DENSE)
_GEMMA2 = (*_ENDS, *_FOUR_NORMS, *_GROUPED_QUERY, *_DENSE)
_OLMO2 = (*_ENDS, *_POST_NORMS, *_GROUPED_QUERY, *_DENSE)
_QWEN_MOE = (*_LLAMA, *_ROUTER, *_PLAIN_EXPERTS, *_QWEN_SHARED)
_SPARSE = _LAYER + "block_sparse_moe."
_MIXTRAL = (
    *(*_ENDS, *_PRE_NORMS, *_GROUPED_QUERY),
    Leaf("layers/mlp/router/kernel", _SPARSE + "gate.weight", "ED > DE", "moe"),
    *_ROUTER,
    *_experts(_SPARSE, "w1", "w3", "w2"),
)
_DEEPSEEK = (
    *(*_ENDS, *_PRE_NORMS, *_LATENT_ATTENTION, *_DENSE, *_ROUTER),
    Leaf("layers/mlp/router/correction", _LAYER + "mlp.gate.e_score_correction_bias", "E", "moe correction"),
    *_PLAIN_EXPERTS,
    *_mlp("layers/mlp/shared", _LAYER + "mlp.shared_experts.", "s", "moe shared"),
)
_GLM4_MOE = (
    *(*_LLAMA, *_ROUTER),
    Leaf("layers/mlp/router/correction", _LAYER + "mlp.gate.e_score_correction_bias", "E", "moe correction"),
    *_PLAIN_EXPERTS,
    *_mlp("layers/mlp/shared", _LAYER + "mlp.shared_experts.", "s", "moe shared"),
)
_GPT_OSS_MOE = _LAYER + "mlp.experts."
_GPT_OSS = (
    *(*_ENDS, *_PRE_NORMS, *_GROUPED_QUERY),
    Leaf("layers/mlp/router/kernel", _LAYER + "mlp.router.weight", "ED > DE", "moe"),
    Leaf("layers/mlp/router/bias", _LAYER + "mlp.router.bias", "E", "moe router_bias"),
    Leaf("layers/mlp/experts/gate/kernel", _GPT_OSS_MOE + "gate_up_proj", "ED(f(*1+1)) > EDf", "moe"),
    Leaf("layers/mlp/experts/up/kernel", _GPT_OSS_MOE + "gate_up_proj", "ED(f(1+*1)) > EDf", "moe"),
    Leaf("layers/mlp/experts/down/kernel", _GPT_OSS_MOE + "down_proj", "EfD > EfD", "moe"),
    Leaf("layers/mlp/experts/gate/bias", _GPT_OSS_MOE + "gate_up_proj_bias", "E(f(*1+1)) > Ef", "moe expert_bias"),
    Leaf("layers/mlp/experts/up/bias", _GPT_OSS_MOE + "gate_up_proj_bias", "E(f(1+*1)) > Ef", "moe expert_bias"),
    Leaf("layers/mlp/experts/down/bias", _GPT_OSS_MOE + "down_proj_bias", "ED", "moe expert_bias"),
    # As published: MXFP4 blocks along what each row sums over (mxfp4.py).
    Leaf("layers/mlp/experts/gate/kernel", _GPT_OSS_MOE + "gate_up_proj_blocks", "E(f(*1+1))D > EDf", "moe"),
    Leaf("layers/mlp/experts/up/kernel", _GPT_OSS_MOE + "gate_up_proj_blocks", "E(f(1+*1))D > EDf", "moe"),
    Leaf("layers/mlp/experts/down/kernel", _GPT_OSS_MOE + "down_proj_blocks", "EDf > EfD", "moe"),
)
_FEED_FORWARD = _LAYER + "feed_forward."
_LLAMA4 = (
    *(*_ENDS, *_PRE_NORMS, *_GROUPED_QUERY),
    *_mlp("layers/mlp", _FEED_FORWARD, "F", "dense"),
    Leaf("layers/mlp/router/kernel", _FEED_FORWARD + "router.weight", "ED > DE", "moe"),
    Leaf("layers/mlp/experts/gate/kernel", _FEED_FORWARD + "experts.gate_up_proj", "ED(*f+f) > EDf", "moe"),
    Leaf("layers/mlp/experts/up/kernel", _FEED_FORWARD + "experts.gate_up_proj", "ED(f+*f) > EDf", "moe"),
    Leaf("layers/mlp/experts/down/kernel", _FEED_FORWARD + "experts.down_proj", "EfD > EfD", "moe"),
    *_mlp("layers/mlp/shared", _FEED_FORWARD + "shared_expert.", "s", "moe shared"),
)
_DELTA = _LAYER + "linear_attn."
_QWEN3_NEXT = (
    *(*_ENDS, *_PRE_NORMS, *_KEY_VALUE, *_OUT, *_QK_NORMS),
    Leaf("layers/attention/query/kernel", _ATTENTION + "q_proj.weight", "(N(*H+H))D > DNH", "attention attention_gate"),
    Leaf("layers/attention/gate/kernel", _ATTENTION + "q_proj.weight", "(N(H+*H))D > DNH", "attention attention_gate"),
    Leaf("layers/delta/query/kernel", _DELTA + "in_proj_qkvz.weight", "(k(*h+h+gu+gu))D > Dkh", "delta"),
    Leaf("layers/delta/key/kernel", _DELTA + "in_proj_qkvz.weight", "(k(h+*h+gu+gu))D > Dkh", "delta"),
    Leaf("layers/delta/value/kernel", _DELTA + "in_proj_qkvz.weight", "(k(h+h+*gu+gu))D > D(kg)u", "delta"),
    Leaf("layers/delta/gate/kernel", _DELTA + "in_proj_qkvz.weight", "(k(h+h+gu+*gu))D > D(kg)u", "delta"),
    Leaf("layers/delta/beta/kernel", _DELTA + "in_proj_ba.weight", "(k(*g+g))D > D(kg)", "delta"),
    Leaf("layers/delta/decay/kernel", _DELTA + "in_proj_ba.weight", "(k(g+*g))D > D(kg)", "delta"),
    Leaf("layers/delta/query_conv/kernel", _DELTA + "conv1d.weight", "(*kh+kh+kgu)1w > khw", "delta"),
    Leaf("layers/delta/key_conv/kernel", _DELTA + "conv1d.weight", "(kh+*kh+kgu)1w > khw", "delta"),
    Leaf("layers/delta/value_conv/kernel", _DELTA + "conv1d.weight", "(kh+kh+*kgu)1w > (kg)uw", "delta"),
    Leaf("layers/delta/dt_bias", _DELTA + "dt_bias", "(kg)", "delta"),
    Leaf("layers/delta/log_decay", _DELTA + "A_log", "(kg)", "delta"),
    Leaf("layers/delta/norm/scale", _DELTA + "norm.weight", "u", "delta"),
    Leaf("layers/delta/out/kernel", _DELTA + "out_proj.weight", "D(kgu) > (kg)uD", "delta"),
    *(*_DENSE, *_ROUTER, *_PLAIN_EXPERTS, *_QWEN_SHARED),
)
_FUSED_MLP = (
    Leaf("layers/mlp/gate/kernel", _LAYER + "mlp.gate_up_proj.weight", "(*F+F)D > DF"),
    Leaf("layers/mlp/up/kernel", _LAYER + "mlp.gate_up_proj.weight", "(F+*F)D > DF"),
    Leaf("layers/mlp/down/kernel", _LAYER + "mlp.down_proj.weight", "DF > FD"),
)
_PHI3 = (*_ENDS, *_PRE_NORMS, *_PHI3_ATTENTION, *_FUSED_MLP)
_GLM = (*_ENDS, *_PRE_NORMS, *_GROUPED_QUERY, *_FUSED_MLP)
_GLM4 = (
    *_GLM,
    Leaf("layers/attention_out_norm/scale", _LAYER + "post_self_attn_layernorm.weight", "D"),
    Leaf("layers/mlp_out_norm/scale", _LAYER + "post_mlp_layernorm.weight", "D"),
)
_STARCODER2 = (
    *(*_ENDS, *_PRE_NORMS, *_GROUPED_QUERY),
    Leaf("layers/mlp/up/kernel", _LAYER + "mlp.c_fc.weight", "FD > DF"),
    Leaf("layers/mlp/up/bias", _LAYER + "mlp.c_fc.bias", "F", "mlp_bias"),
    Leaf("layers/mlp/down/kernel", _LAYER + "mlp.c_proj.weight", "DF > FD"),
    Leaf("layers/mlp/down/bias", _LAYER + "mlp.c_proj.bias", "D", "mlp_bias"),
)
# GPT-2 stores matrices as [in, out].
_BLOCK = "transformer.h.{i}."
_GPT2 = (
    Leaf("embed/table", "transformer.wte.weight", "VD"),
    Leaf("positions/table", "transformer.wpe.weight", "SD"),
    Leaf("layers/attention_norm/scale", _BLOCK + "ln_1.weight", "D"),
    Leaf("layers/attention_norm/bias", _BLOCK + "ln_1.bias", "D", "norm_bias"),
    Leaf("layers/attention/query/kernel", _BLOCK + "attn.c_attn.weight", "D(*NH+KH+KH) > DNH"),
    Leaf("layers/attention/key/kernel", _BLOCK + "attn.c_attn.weight", "D(NH+*KH+KH) > DKH"),
    Leaf("layers/attention/value/kernel", _BLOCK + "attn.c_attn.weight", "D(NH+KH+*KH) > DKH"),
    Leaf("layers/attention/query/bias", _BLOCK + "attn.c_attn.bias", "(*NH+KH+KH) > NH", "attention_bias"),
    Leaf("layers/attention/key/bias", _BLOCK + "attn.c_attn.bias", "(NH+*KH+KH) > KH", "attention_bias"),
    Leaf("layers/attention/value/bias", _BLOCK + "attn.c_attn.bias", "(NH+KH+*KH) > KH", "attention_bias"),
    Leaf("layers/attention/out/kernel", _BLOCK + "attn.c_proj.weight", "(NH)D > NHD"),
    Leaf("layers/attention/out/bias", _BLOCK + "attn.c_proj.bias", "D", "attention_out_bias"),
    Leaf("layers/mlp_norm/scale", _BLOCK + "ln_2.weight", "D"),
    Leaf("layers/mlp_norm/bias", _BLOCK + "ln_2.bias", "D", "norm_bias"),
    Leaf("layers/mlp/up/kernel", _BLOCK + "mlp.c_fc.weight", "DF"),
    Leaf("layers/mlp/up/bias", _BLOCK + "mlp.c_fc.bias", "F", "mlp_bias"),
    Leaf("layers/mlp/down/kernel", _BLOCK + "mlp.c_proj.weight", "FD"),
    Leaf("layers/mlp/down/bias", _BLOCK + "mlp.c_proj.bias", "D", "mlp_bias"),
    Leaf("final_norm/scale", "transformer.ln_f.weight", "D"),
    Leaf("final_norm/bias", "transformer.ln_f.bias", "D", "norm_bias"),
    Leaf("output/kernel", "lm_head.weight", "VD", "untied"),
)

# GGUF files of this family (and only of this one) store the rows of query and key for a RoPE that turns neighbouring
# pairs: row order (head, pair, half) instead of our (head, half, pair).
_LLAMA_GGUF = (
    Leaf("embed/table", "token_embd.weight", "VD"),
    Leaf("final_norm/scale", "output_norm.weight", "D"),
    Leaf("output/kernel", "output.weight", "VD", "untied"),
    Leaf("layers/attention_norm/scale", "blk.{i}.attn_norm.weight", "D"),
    Leaf("layers/attention/query/kernel", "blk.{i}.attn_q.weight", "(Njc)D > DN(cj)"),
    Leaf("layers/attention/query/bias", "blk.{i}.attn_q.bias", "(Njc) > N(cj)", "attention_bias"),
    Leaf("layers/attention/key/kernel", "blk.{i}.attn_k.weight", "(Kjc)D > DK(cj)"),
    Leaf("layers/attention/key/bias", "blk.{i}.attn_k.bias", "(Kjc) > K(cj)", "attention_bias"),
    Leaf("layers/attention/value/kernel", "blk.{i}.attn_v.weight", "(KH)D > DKH"),
    Leaf("layers/attention/value/bias", "blk.{i}.attn_v.bias", "(KH) > KH", "attention_bias"),
    Leaf("layers/attention/out/kernel", "blk.{i}.attn_output.weight", "D(NH) > NHD"),
    Leaf("layers/attention/out/bias", "blk.{i}.attn_output.bias", "D", "attention_out_bias"),
    Leaf("layers/mlp_norm/scale", "blk.{i}.ffn_norm.weight", "D"),
    Leaf("layers/mlp/gate/kernel", "blk.{i}.ffn_gate.weight", "FD > DF"),
    Leaf("layers/mlp/gate/bias", "blk.{i}.ffn_gate.bias", "F", "mlp_bias"),
    Leaf("layers/mlp/up/kernel", "blk.{i}.ffn_up.weight", "FD > DF"),
    Leaf("layers/mlp/up/bias", "blk.{i}.ffn_up.bias", "F", "mlp_bias"),
    Leaf("layers/mlp/down/kernel", "blk.{i}.ffn_down.weight", "DF > FD"),
    Leaf("layers/mlp/down/bias", "blk.{i}.ffn_down.bias", "D", "mlp_bias"),
)

_LIKE_LLAMA = "arcee cohere cwm ernie4_5 granite helium ministral seed_oss smollm3 stablelm".split()
TABLES: dict[tuple[str, str], tuple[Leaf, ...]] = {
    **{(family, "hf"): _LLAMA for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", *_LIKE_LLAMA)},
    **{(family, "hf"): _GEMMA2 for family in ("gemma2", "gemma3")},
    **{(family, "hf"): _OLMO2 for family in ("olmo2", "olmo3")},
    **{(family, "hf"): _QWEN_MOE for family in ("qwen2_moe", "qwen3_moe", "olmoe")},
    **{(family, "hf"): _GLM4_MOE for family in ("glm4_moe", "dots1")},
    **{(family, "hf"): _DEEPSEEK for family in ("deepseek_v2", "deepseek_v3")},
    ("mixtral", "hf"): _MIXTRAL,
    ("gpt_oss", "hf"): _GPT_OSS,
    ("phi3", "hf"): _PHI3,
    ("llama4", "hf"): _LLAMA4,
    ("qwen3_next", "hf"): _QWEN3_NEXT,
    ("glm", "hf"): _GLM,
    ("glm4", "hf"): _GLM4,
    ("starcoder2", "hf"): _STARCODER2,
    ("gpt2", "hf"): _GPT2,
    ("llama", "gguf"): _LLAMA_GGUF,
}

# How files may spell the beginning of a key that the tables spell in the first way: a model without a head, and
# text models inside ones that also see, as different versions of transformers wrote them.
_SPELLINGS: tuple[dict[str, str], ...] = (
    {},
    {"model.": "", "transformer.": ""},
    {"model.": "model.language_model."},
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
)
_MULTIMODAL = 2  # this spelling and those behind it


def respell(key: str, spelling: int) -> str:
    """A key of the tables as a file of that spelling has it."""
    for ours, theirs in _SPELLINGS[spelling].items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


# Keys that carry nothing the forward pass needs: families ("": all), pattern, reason.
_MTP = "a layer that predicts further tokens, not part of the model's own forward pass"
_IGNORED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("",), r".*\.rotary_emb\.inv_freq", "computed from rope_theta"),
    (("gpt2",), r".*\.attn\.(masked_)?bias", "the causal mask"),
    (("qwen3_next",), r"mtp\..*", _MTP),
)


def ignored(config: ModelConfig, key: str, spelling: int) -> str | None:
    """Why a key that no row names is no part of the model; None if nothing is known about it."""
    for families, pattern, reason in _IGNORED:
        if families in (("",), (config.family,)) and re.fullmatch(pattern, key):
            return reason
    layer = re.match(re.escape(respell("model.layers.", spelling)) + r"(\d{1,9})\.", key)
    if config.family in ("deepseek_v3", "glm4_moe") and layer and int(layer[1]) >= config.num_layers:
        return _MTP
    inside = tuple(respell(beginning, spelling) for beginning in ("model.", "lm_head."))
    if spelling >= _MULTIMODAL and not key.startswith(inside):
        return "not part of the text model"
    return None


def find_spelling(config: ModelConfig, stored: Collection[str]) -> int:
    """Which of the spellings a Hugging Face file of a family uses, told by its embedding table."""
    rows = TABLES.get((config.family, "hf"), ())
    key = next((row.key for row in rows if row.path == "embed/table"), "")
    return next((number for number in range(len(_SPELLINGS)) if respell(key, number) in stored), 0)


def find_table(config: ModelConfig, format: str, stored: Collection[str] | None = None, spelling: int = 0) -> Table:
    """The table of a config's family in a format ("hf" or "gguf"). Raises UserError if there is none."""
    families = [family for family, known in TABLES if known == format]
    if (config.family, format) not in TABLES:
        raise UserError(f"family {config.family!r} cannot be stored as {format}: known are {', '.join(families)}")
    return Table(TABLES[config.family, format], config, stored, spelling)
