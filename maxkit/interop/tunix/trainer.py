# SPDX-License-Identifier: Apache-2.0
"""maxkit's batches and objectives for Tunix's PeftTrainer, and pairs for its DPOTrainer. Imports no Tunix.

trainer = PeftTrainer(model, optimizer, TrainingConfig(..., gradient_accumulation_steps=4))
trainer.with_gen_model_input_fn(model_inputs).with_loss_fn(loss_fn(objective))
trainer.train(micro_batches(objective, batches, 4))
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from maxkit.data.preferences import Side
from maxkit.errors import UserError
from maxkit.types import Batch, Tree

FIELDS = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
WEIGHT = "weight/"  # in front of the denominators' names
COLUMN = "column/"


def micro_batches(
    objective: Any, batches: Iterable[Batch], gradient_accumulation_steps: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """What PeftTrainer iterates over: every update's batch in parts, each with the denominators of the whole.

    Tunix 0.1.7 averages over the parts. The denominators are divided by their number, so that the average is the loss
    of the whole batch: a token counts the same in a short part and in a long one.

    Every array has the rows in front, also the denominators, so that Tunix can cut all of them over a mesh alike.

    Raises:
        UserError: the rows are no multiple of `gradient_accumulation_steps`.
    """
    count = gradient_accumulation_steps
    for batch in batches:
        rows = batch.tokens.shape[0]
        if count < 1 or rows % count:
            raise UserError(f"gradient_accumulation_steps={count} must divide the {rows} rows of a batch")
        arrays = {name: np.asarray(getattr(batch, name)) for name in FIELDS}
        arrays |= {COLUMN + name: np.asarray(value) for name, value in batch.columns.items()}
        for name, value in objective.weights(batch).items():
            arrays[WEIGHT + name] = np.full(rows, np.float32(value) / count)
        for part in range(count):
            yield {name: value[part::count] for name, value in arrays.items()}


def model_inputs(example: Mapping[str, jax.Array]) -> dict[str, Any]:
    """For `with_gen_model_input_fn`: the arguments of `loss_fn` from what `micro_batches` yields."""
    columns, weights = ({k.removeprefix(p): v for k, v in example.items() if k.startswith(p)} for p in (COLUMN, WEIGHT))
    fields: dict[str, Any] = {name: example[name] for name in FIELDS}
    return {
        "batch": Batch(**fields, columns=columns),
        "weights": {name: value[0] for name, value in weights.items()},
    }


def loss_fn(objective: Any, frozen: Tree | None = None) -> Callable[[Any, Batch, dict[str, jax.Array]], jax.Array]:
    """For `with_loss_fn`: any maxkit objective. `frozen` is what it reads besides the model, such as a teacher.

    Nothing of size [B, T, V] is made, which Tunix's own losses do twice.
    """

    def maxkit_loss(model: Any, batch: Batch, weights: dict[str, jax.Array]) -> jax.Array:
        return objective(model, batch, frozen, weights).loss

    return maxkit_loss


def plain_trees(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, which knows the parameters as `ModelDefinition` names them, for Tunix, which has them as nnx.State.

    So the optimizers of `maxkit.optim`, with their choice of what is decayed, work under Tunix.
    """

    def plain(tree: Any) -> Any:
        found = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
        return found.get("decoder", found)  # of a model with dropout

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(plain(gradients), state, None if params is None else plain(params))
        return jax.tree.unflatten(jax.tree.structure(gradients), jax.tree.leaves(updates)), state

    return optax.GradientTransformation(lambda params: optimizer.init(plain(params)), update)


@dataclasses.dataclass(frozen=True)
class _Padded:
    ids: np.ndarray
    mask: np.ndarray


def preference_inputs(
    pairs: Sequence[tuple[Side, Side]], *, pad_id: int, max_prompt_length: int, max_response_length: int
) -> dict[str, np.ndarray]:
    """One batch of pairs (chosen, rejected) of `data.preferences.encode_side` for DPOTrainer, as token ids.

    Prompts are padded on the left, answers on the right. Given as ids, because from texts Tunix would put a BOS token
    in front of answers and none behind them that ends them.

    Raises:
        UserError: a side with other prompt tokens, an empty or too long prompt or answer, a pad token among the ids
            (Tunix takes every such token for padding); names the pair.
    """
    split = [[_split(side, number) for side in pair] for number, pair in enumerate(pairs)]
    for number, ((chosen_prompt, _), (rejected_prompt, _)) in enumerate(split):
        if not np.array_equal(chosen_prompt, rejected_prompt):
            raise UserError(f"pair {number}: chosen and rejected do not begin with the same prompt tokens")
    columns = {
        "prompt": ([chosen[0] for chosen, _ in split], max_prompt_length, True),
        "chosen": ([chosen[1] for chosen, _ in split], max_response_length, False),
        "rejected": ([rejected[1] for _, rejected in split], max_response_length, False),
    }
    found = {}
    for name, (rows, length, left) in columns.items():
        padded = _padded(rows, length, left, pad_id, name)
        found |= {f"{name}_ids": padded.ids, f"{name}_mask": padded.mask}
    return found


def _split(side: Side, number: int) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = side
    trained = np.flatnonzero(mask)
    if not len(trained) or trained[0] == 0:
        raise UserError(f"pair {number}: a side needs a prompt and an answer")
    return ids[: trained[0]], ids[trained[0] : trained[-1] + 1]


def _padded(rows: Sequence[np.ndarray], length: int, left: bool, pad_id: int, name: str) -> _Padded:
    ids, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        if len(row) > length:
            raise UserError(f"pair {number}: its {name} has {len(row)} tokens, at most {length} are allowed")
        if pad_id in row:
            raise UserError(f"pair {number}: its {name} holds the pad token {pad_id}: choose a pad that no text has")
        place = slice(length - len(row), None) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = row, True
    return _Padded(ids, mask)
