# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts as array functions: choosing experts, and running them on the tokens that chose them.

Three ways to run them give the same function:

- `dense`: every expert on every token, then a weighted sum. Slow and simple: the oracle.
- `ragged`: the choices sorted by expert, products with one kernel per group of rows. No token is dropped.
- `capacity`: every expert takes a fixed number of each row's tokens (Lepikhin et al. 2020, GShard, arXiv 2006.16668,
  section 3.2). Shapes are those of plain batched products; what exceeds the capacity is dropped.

A choice is an expert's number, or any number that is not an expert's for "none" (padding, an expert of another device).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# The parameters of the experts: {name: letters}. gate is missing in an MLP without one, biases where there are none.
LETTERS = {
    "gate": "EDF",
    "up": "EDF",
    "down": "EFD",
    "gate_bias": "EF",
    "up_bias": "EF",
    "down_bias": "ED",
}

Parameters = dict[str, jax.Array]
Activation = Callable[[jax.Array | None, jax.Array], jax.Array]  # (gate or None, up) -> hidden layer


def choose_experts(
    scores: jax.Array, count: int, *, num_groups: int = 1, groups_per_token: int = 1, group_score: str = "max"
) -> jax.Array:
    """The `count` experts with the highest scores [..., E], best first, of equals the first: int32 [..., count].

    With groups (E / num_groups neighbours each) only those of the `groups_per_token` best groups are eligible: the
    others count as -inf, as in `transformers` 5.12 to 5.23. A group's score is its highest (DeepSeek-V2, arXiv
    2405.04434, section 2.2.2: device-limited routing) or the sum of its two highest (DeepSeek-V3, arXiv 2412.19437,
    section 2.1.2: node-limited routing).
    """
    if num_groups > 1:
        grouped = scores.reshape(*scores.shape[:-1], num_groups, scores.shape[-1] // num_groups)  # [..., groups, size]
        best, _ = jax.lax.top_k(grouped, min(1 if group_score == "max" else 2, grouped.shape[-1]))
        _, groups = jax.lax.top_k(jnp.sum(best, axis=-1), groups_per_token)
        eligible = jnp.any(groups[..., None] == jnp.arange(num_groups), axis=-2)  # [..., groups]
        scores = jnp.where(eligible[..., None], grouped, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, count)[1]


def expert_capacity(length: int, choices: int, num_experts: int, factor: float) -> int:
    """How many of a row's `length` tokens an expert takes: ceil(factor * choices * length / num_experts).

    Counted per row, so that what is dropped depends neither on the mesh nor on the split into micro-batches.
    """
    return min(length, math.ceil(factor * choices * length / num_experts))


def run_experts(
    x: jax.Array,
    choice: jax.Array,
    weights: jax.Array,
    parameters: Parameters,
    activation: Activation,
    *,
    dispatch: str = "ragged",
    grouping: str = "blocks",
    capacity: int | None = None,
    scale_inputs: bool = False,
) -> jax.Array:
    """sum_k weights_k * down(activation(gate(x), up(x))) over the chosen experts, [B, T, D] in the type of x.

    Args:
        x: [B, T, D].
        choice: [B, T, k] int32; a token chooses an expert at most once. Numbers outside [0, E) choose nothing.
        weights: [B, T, k] float32.
        parameters: as in `LETTERS`; cast to the type of x. Products of bfloat16 accumulate in float32.
        activation: of the two projections (gate is None where there is none).
        dispatch: `dense`, `ragged` or `capacity`.
        grouping: of dispatch=ragged: `groups` (`jax.lax.ragged_dot`, for TPUs: elsewhere XLA makes it a masked product
            of all rows for each expert) or `blocks` (batched products, fast everywhere else).
        capacity: of one expert for one row, for dispatch=capacity. First choices go before second ones, and among
            these earlier tokens before later ones. (So a token may be displaced by a later one: the model is no
            longer strictly causal. That is how bounded capacity works, in GShard too.)
        scale_inputs: the weights multiply what goes into the experts, not what comes out (Llama 4).

    All agree to float32 rounding, values and gradients (tests/unit/test_moe.py).
    """
    parameters = {name: value.astype(x.dtype) for name, value in parameters.items()}
    if dispatch == "capacity":
        return _capacity(capacity, x, choice, weights, parameters, activation, scale_inputs)
    if dispatch == "ragged":
        return _ragged(grouping, x, choice, weights, parameters, activation, scale_inputs)
    assert dispatch == "dense", dispatch
    return _dense(x, choice, weights, parameters, activation, scale_inputs)


def _mlp(x: jax.Array, product, bias, activation: Activation, has_gate: bool) -> jax.Array:
    """The experts' MLP; `product(x, name)` and `bias(name)` know how rows belong to experts."""

    def project(x: jax.Array, name: str) -> jax.Array:
        added = bias(f"{name}_bias")
        return product(x, name) if added is None else product(x, name) + added

    return project(activation(project(x, "gate") if has_gate else None, project(x, "up")), "down")


def _dense(x, choice, weights, parameters, activation, scale_inputs):
    def one(expert: jax.Array, own: Parameters) -> jax.Array:
        weight = jnp.sum(jnp.where(choice == expert, weights, 0.0), axis=-1, keepdims=True)  # [B, T, 1]
        chosen = jnp.any(choice == expert, axis=-1, keepdims=True)
        inputs = (x * weight.astype(x.dtype)) if scale_inputs else x
        y = _mlp(inputs, lambda x, name: x @ own[name], own.get, activation, "gate" in own).astype(jnp.float32)
        return jnp.where(chosen, y if scale_inputs else y * weight, 0.0)

    experts = jnp.arange(parameters["up"].shape[0])
    return jnp.sum(jax.vmap(one)(experts, parameters), axis=0).astype(x.dtype)


def _ragged(grouping, x, choice, weights, parameters, activation, scale_inputs):
    num, choices = parameters["up"].shape[0], choice.shape[-1]
    flat = choice.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < num), flat, num)  # those that choose nothing are sorted behind the others
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=num + 1)[:num].astype(jnp.int32)
    run = {"groups": _groups, "blocks": _blocks}[grouping]
    tokens = jnp.repeat(x.reshape(-1, x.shape[-1]), choices, axis=0)  # one row for each choice
    y = run(tokens, flat, order, sizes, weights.reshape(-1, 1), parameters, activation, scale_inputs)
    return jnp.sum(y.reshape(*choice.shape, -1), axis=-2).astype(x.dtype)


def _groups(tokens, expert, order, sizes, weights, parameters, activation, scale_inputs):
    """Weighted outputs [rows, D], float32, of rows that are sorted by expert and multiplied group by group."""
    expert, weights = expert[order], _permute(weights, order)
    here = (expert < sizes.shape[0])[:, None]
    # Rows behind the last group: what a kernel computes there is not defined, so nothing goes in and nothing comes out.
    inputs = jnp.where(here, _permute(tokens, order), 0)
    if scale_inputs:
        inputs = inputs * weights.astype(inputs.dtype)

    def bias(name: str) -> jax.Array | None:
        return parameters[name].at[expert].get(mode="clip") if name in parameters else None

    def product(x: jax.Array, name: str) -> jax.Array:
        return jax.lax.ragged_dot(x, parameters[name], sizes)

    y = _mlp(inputs, product, bias, activation, "gate" in parameters).astype(jnp.float32)
    return _permute(jnp.where(here, y if scale_inputs else y * weights, 0.0), jnp.argsort(order))


def _blocks(tokens, expert, order, sizes, weights, parameters, activation, scale_inputs):
    """The same from rows laid out in blocks that belong to one expert each: one batched product over the blocks.

    (Gale et al. 2022, MegaBlocks, arXiv 2211.15841.) Every expert's last block may be partly empty. With blocks of
    rows / experts there are at most twice as many blocks as experts, however the rows are spread.
    """
    num, rows = sizes.shape[0], expert.shape[0]
    size = -(-rows // num)
    count = rows // size + min(num, rows)
    filled = -(-sizes // size)  # blocks of each expert
    first, start = jnp.cumsum(filled) - filled, jnp.cumsum(sizes) - sizes
    ordered = expert[order]
    clipped = jnp.minimum(ordered, num - 1)
    place = first[clipped] * size + jnp.arange(rows) - start[clipped]
    place = jnp.where(ordered < num, place, count * size + jnp.arange(rows))  # no place, but none twice
    place = jnp.zeros_like(place).at[order].set(place, unique_indices=True)
    owner = jnp.minimum(jnp.searchsorted(jnp.cumsum(filled), jnp.arange(count), side="right"), num - 1)

    def lay_out(values: jax.Array) -> jax.Array:
        empty = jnp.zeros((count * size, values.shape[-1]), values.dtype)
        filled = empty.at[place].set(values, mode="drop", unique_indices=True)
        return filled.reshape(count, size, -1)

    inputs = lay_out(tokens)
    if scale_inputs:
        inputs = inputs * lay_out(weights).astype(inputs.dtype)

    def bias(name: str) -> jax.Array | None:
        return parameters[name][owner][:, None] if name in parameters else None

    def product(x: jax.Array, name: str) -> jax.Array:
        return jnp.einsum("nbd,ndf->nbf", x, parameters[name][owner])

    y = _mlp(inputs, product, bias, activation, "gate" in parameters).reshape(count * size, -1)
    y = y.at[place].get(mode="fill", fill_value=0).astype(jnp.float32)
    return y if scale_inputs else y * weights


def _permute(x: jax.Array, order: jax.Array) -> jax.Array:
    """Rows of x in another order; said to be a permutation, so that its gradient is one too and adds nothing up."""
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _capacity(capacity, x, choice, weights, parameters, activation, scale_inputs):
    num, length, dim = parameters["up"].shape[0], x.shape[1], x.shape[2]
    slot = jax.vmap(lambda row: _slots(row, num, capacity))(choice)  # [B, T, k], num * capacity: no slot

    def fill(slots, values, empty):
        """One row's slots [E * C, ...] from values [T, k, ...]; slots that nobody took hold `empty`."""
        taken = jnp.full((num * capacity, *values.shape[2:]), empty, values.dtype)
        return taken.at[slots.reshape(-1)].set(values.reshape(-1, *values.shape[2:]), mode="drop")

    token = jnp.broadcast_to(jnp.arange(length)[:, None], choice.shape[1:])
    source = jax.vmap(lambda slots: fill(slots, token, length))(slot)  # [B, E * C]
    inputs = jax.vmap(lambda x, source: x.at[source].get(mode="fill", fill_value=0))(x, source)
    if scale_inputs:
        inputs = inputs * jax.vmap(lambda s, w: fill(s, w, 0.0))(slot, weights)[..., None].astype(x.dtype)

    def bias(name: str) -> jax.Array | None:
        return parameters[name][:, None] if name in parameters else None

    def product(x: jax.Array, name: str) -> jax.Array:
        return jnp.einsum("becd,edf->becf", x, parameters[name])

    y = _mlp(inputs.reshape(-1, num, capacity, dim), product, bias, activation, "gate" in parameters)
    y = y.reshape(-1, num * capacity, dim)
    y = jax.vmap(lambda y, slots: y.at[slots].get(mode="fill", fill_value=0))(y, slot).astype(jnp.float32)  # [B,T,k,D]
    return jnp.sum(y if scale_inputs else y * weights[..., None], axis=-2).astype(x.dtype)


def _slots(choice: jax.Array, num: int, capacity: int) -> jax.Array:
    """For one row's choices [T, k]: expert * capacity + place in its queue; num * capacity where there is no room."""
    queue = choice.T.reshape(-1)  # all first choices, then all second ones
    hits = queue[:, None] == jnp.arange(num)  # [k * T, E]
    place = jnp.sum(jnp.where(hits, jnp.cumsum(hits, axis=0) - 1, 0), axis=-1)
    kept = jnp.any(hits, axis=-1) & (place < capacity)
    return jnp.where(kept, queue * capacity + place, num * capacity).reshape(choice.T.shape).T
