# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer: a router, experts, and an optional expert that every token uses.

    scores = scoring(router(x))    chosen = top-k of (scores + correction), within the best groups
    y = sum over the chosen of weight * expert(x)  [+ gate * shared(x)]

All of the router's arithmetic is float32. Dispatch and the experts' products: `ops/moe.py`; experts on several devices:
`mesh.expert_parallel`; what becomes of the statistics: `objectives/routing.py`, `train/routing.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from maxkit import mesh
from maxkit.models.attention import Context
from maxkit.models.config import Execution, ModelConfig, MoeConfig
from maxkit.models.layers import Make, Matrix, Mlp, gated, normal, widened_again, zeros
from maxkit.ops import moe as ops

# Added to a sum of weights before dividing by it, as DeepSeek-V3's own code does. Only sigmoid scores can add up to so
# little that it matters: the weights of the families that divide by the bare sum are the same to the last bit.
TINY = 1e-20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router decided. choice [B, T, k] int32, weights [B, T, k], probabilities [B, T, E], logits [B, T, E].

    Probabilities are those of the balance loss: of all experts, adding up to 1, whatever the scoring.
    """

    choice: jax.Array
    weights: jax.Array
    probabilities: jax.Array
    logits: jax.Array


class Router(nnx.Module):
    """Scores experts and chooses.

    | scoring | chosen by | weights | families |
    | --- | --- | --- | --- |
    | softmax | softmax over all | the same | Mixtral, Qwen-MoE (normalised), DeepSeek V2 |
    | sigmoid | sigmoid + correction | sigmoid | DeepSeek V3, Kimi K2 |
    | topk_softmax | logits | softmax over the chosen | GPT-OSS |
    | topk_sigmoid | logits | sigmoid | Llama 4 |
    """

    def __init__(self, config: ModelConfig, make: Make):
        self.moe: MoeConfig = config.moe
        dim, num = config.embed_dim, self.moe.num_experts
        self.kernel = make("kernel", (dim, num), "DE", normal(dim**-0.5))
        self.bias = make("bias", (num,), "E", zeros) if self.moe.router_bias else None
        self.correction = make("correction", (num,), "E", zeros) if self.moe.correction_bias else None

    def __call__(self, x: jax.Array) -> Routing:
        """Route x [B, T, D]."""
        moe = self.moe
        # X: the experts, but whole on every device, because a choice needs all of a token's scores.
        logits = mesh.einsum("BTD,DX->BTX", x.astype(jnp.float32), self.kernel[...].astype(jnp.float32))
        if self.bias is not None:
            logits = logits + mesh.replicate(self.bias[...].astype(jnp.float32))
        sigmoid = jax.nn.sigmoid(logits)
        if "sigmoid" in moe.scoring:
            probabilities = sigmoid / (jnp.sum(sigmoid, axis=-1, keepdims=True) + TINY)
        else:
            probabilities = jax.nn.softmax(logits, axis=-1)
        scores = {"softmax": probabilities, "sigmoid": sigmoid}.get(moe.scoring, logits)
        wanted = jax.lax.stop_gradient(scores)
        if self.correction is not None:
            correction = mesh.replicate(self.correction[...].astype(jnp.float32))
            wanted = wanted + jax.lax.stop_gradient(correction)
            if moe.correction_in_weights:
                scores = scores + correction
        choice = ops.choose_experts(
            wanted,
            moe.experts_per_token,
            num_groups=moe.num_groups,
            groups_per_token=moe.groups_per_token,
            group_score=moe.group_score,
        )
        return Routing(choice, self._weights(_pick(scores, choice)), probabilities, logits)

    def _weights(self, chosen: jax.Array) -> jax.Array:
        """From the chosen experts' scores (or logits) [B, T, k] to their weights."""
        if self.moe.scoring == "topk_softmax":
            chosen = jax.nn.softmax(chosen, axis=-1)
        elif self.moe.scoring == "topk_sigmoid":
            chosen = jax.nn.sigmoid(chosen)
        if self.moe.normalize_weights:
            chosen = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + TINY)
        return chosen * self.moe.weights_scale


class ExpertKernel(Matrix):
    """One projection of all experts: kernel [E, ...] and bias."""

    def __init__(self, letters: str, sizes: dict[str, int], make: Make, *, bias: bool, scale: float = 1.0):
        super().__init__(letters, letters[2], sizes, make, bias=bias, scale=scale)


class Experts(nnx.Module):
    """The routed experts' weights, expert on axis 0."""

    def __init__(self, config: ModelConfig, make: Make):
        moe = config.moe
        sizes, bias = {"E": moe.num_experts, "D": config.embed_dim, "F": moe.mlp_dim}, moe.expert_bias
        self.gate = ExpertKernel("EDF", sizes, make.at("gate"), bias=bias) if config.mlp_gated else None
        self.up = ExpertKernel("EDF", sizes, make.at("up"), bias=bias)
        scale = (2 * config.num_layers) ** -0.5  # residual branches start small, as in layers.Mlp
        self.down = ExpertKernel("EFD", sizes, make.at("down"), bias=bias, scale=scale)

    def parameters(self, dtype: jnp.dtype) -> ops.Parameters:
        """As `ops.run_experts` takes them. Adapters are added to the kernels: tokens meet an expert only once."""
        found = {}
        for name in ("gate", "up", "down"):
            part = getattr(self, name)
            if part is not None:
                found[name] = part.matrix(dtype) if part.adapted or part.storage else part.kernel[...]
                if part.bias is not None:
                    found[f"{name}_bias"] = part.bias[...]
        return found


class Moe(nnx.Module):
    """A mixture of experts in the place of an MLP."""

    def __init__(self, config: ModelConfig, execution: Execution, make: Make):
        self.config, self.execution = config, execution
        moe = config.moe
        self.router = Router(config, make.at("router"))
        self.experts = Experts(config, make.at("experts"))
        self.shared = Mlp(config, make.at("shared"), moe.shared_mlp_dim) if moe.shared_mlp_dim else None
        self.shared_gate = SharedGate(config, make.at("shared_gate")) if moe.shared_gate else None

    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Map x [B, T, D] to [B, T, D], and the layer's statistics (`statistics`).

        Padding (`context.real` False) chooses no expert: it takes no capacity and counts in no statistic.
        """
        moe, execution, real = self.config.moe, self.execution, context.real
        routing = self.router(x)
        choice = routing.choice
        if real is not None:
            choice = jnp.where(real[..., None], choice, moe.num_experts)
        grouping = "groups" if mesh.devices_in_force().platform == "tpu" else "blocks"
        capacity = None
        if execution.moe_dispatch == "capacity":
            factor = execution.moe_capacity_factor
            capacity = ops.expert_capacity(x.shape[1], moe.experts_per_token, moe.num_experts, factor)

        def run(tokens: tuple[jax.Array, ...], parameters: ops.Parameters, first: jax.Array | int) -> jax.Array:
            x, choice, weights = tokens
            return ops.run_experts(
                x,
                choice - first,
                weights,
                parameters,
                lambda gate, up: gated(self.config, gate, up),
                dispatch=execution.moe_dispatch,
                grouping=grouping,
                capacity=capacity,
                scale_inputs=moe.scale_inputs,
            )

        tokens = (x, choice, routing.weights)

        def through(experts: Experts, *tokens: jax.Array) -> jax.Array:
            return mesh.expert_parallel(run, tokens, experts.parameters(x.dtype), ops.LETTERS)

        small = bool(self.experts.up.storage)
        y = widened_again(self.experts, through, *tokens) if small else through(self.experts, *tokens)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else shared * self.shared_gate(x))
        return y, statistics(routing, choice, real, capacity)


class SharedGate(nnx.Module):
    """sigmoid(x . kernel): how much of the shared expert a token takes (Qwen2-MoE, arXiv 2407.10671)."""

    def __init__(self, config: ModelConfig, make: Make):
        self.kernel = make("kernel", (config.embed_dim,), "D", normal(config.embed_dim**-0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, 1] from x [B, T, D]."""
        gate = mesh.einsum("BTD,D->BT", x, mesh.replicate(self.kernel[...].astype(x.dtype)))
        return jax.nn.sigmoid(gate)[..., None]


def statistics(
    routing: Routing, choice: jax.Array, real: jax.Array | None, capacity: int | None
) -> dict[str, jax.Array]:
    """What adds over rows and micro-batches, float32; padding counts nowhere.

    - `moe/balance` [B]: E * sum_e f_e P_e of each row, f_e being the fraction of the row's choices that fell on expert
      e and P_e its mean probability; 1 in perfect balance, at most E; 0 for a row of padding. Switch Transformers
      (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6) define it over a batch; per sequence, with f divided by k
      and sigmoid scores normalised, it is DeepSeek-V3's (arXiv 2412.19437, equations 17 to 20). Only P is
      differentiated. A row packed from several documents is one sequence.
    - `moe/z` []: sum over tokens of logsumexp(logits)^2 (Zoph et al. 2022, ST-MoE, arXiv 2202.08906, equation 5).
    - `moe/load` [E]: choices per expert, before any is dropped.
    - `moe/dropped` []: choices beyond the experts' capacity.
    """
    num = routing.probabilities.shape[-1]
    hits = (choice[..., None] == jnp.arange(num)).astype(jnp.float32)  # [B, T, k, E]; padding hits nothing
    counts = jnp.sum(hits, axis=(1, 2))  # [B, E]
    valid = jnp.ones(choice.shape[:2], jnp.float32) if real is None else real.astype(jnp.float32)
    valid = mesh.constrain(valid, "BT")
    tokens = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1.0)  # [B, 1]
    mean = jnp.sum(routing.probabilities * valid[..., None], axis=1) / tokens  # [B, E]
    z = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))
    over = jnp.zeros_like(counts) if capacity is None else jnp.maximum(counts - capacity, 0.0)
    return {
        "moe/balance": num * jnp.sum(counts / (choice.shape[-1] * tokens) * mean, axis=-1),
        "moe/z": jnp.sum(z * valid),
        "moe/load": jnp.sum(counts, axis=0),
        "moe/dropped": jnp.sum(over),
    }


def _pick(scores: jax.Array, choice: jax.Array) -> jax.Array:
    """What scores [B, T, E] hold at choice [B, T, k]."""
    # By comparison: a gather of sharded rows would have to be told its layout.
    hits = choice[..., None] == jnp.arange(scores.shape[-1])
    return jnp.sum(jnp.where(hits, scores[..., None, :], 0.0), axis=-1)
