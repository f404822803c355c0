# SPDX-License-Identifier: Apache-2.0
"""What a distillation shows besides its metrics: the teacher itself, and what each model expects next."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from maxkit.checkpoint.load import Loaded, read_params
from maxkit.config import Distill
from maxkit.infer.generate import HasWeights, encode

if TYPE_CHECKING:
    from maxkit.run.session import Run


def teacher(run: "Run") -> Loaded:
    """The teacher of a distillation, in the form that `maxkit.generate` takes; read again where the run let it go."""
    found = run.blueprint.teacher
    assert isinstance(run.cfg, Distill) and found is not None, run.cfg.recipe
    params = run.frozen
    if params is None:
        params = read_params(found.source, found.definition, run.mesh, report=run.report)
    return Loaded(found.definition, params, run.tokenizer, tuple(run.report), run.cfg.teacher, run.mesh)


def next_tokens(run: "Run", prompt: Any, count: int = 4) -> dict[str, dict[str, float]]:
    """What may come after `prompt` (text, or chat messages to answer), as `maxkit.nb.bars_figure` takes it.

    {token: {"teacher": p, "student before": p, "student after": p}} for the teacher's `count` likeliest tokens, and
    "any other" for the rest. Before is the student's start, which is read again; after is what it is now.
    """
    with jax.set_mesh(run.mesh):
        start = dataclasses.replace(run.loaded, params=run.initial_params())
    models = {"teacher": teacher(run), "student before": start, "student after": run.loaded}
    chances = {name: next_token_probabilities(model, prompt) for name, model in models.items()}
    likely = np.argsort(-chances["teacher"], kind="stable")[:count].tolist()
    assert run.tokenizer is not None
    table = {
        repr(run.tokenizer.decode([token])): {name: float(p[token]) for name, p in chances.items()} for token in likely
    }
    return table | {"any other": {name: float(1 - p[likely].sum()) for name, p in chances.items()}}


def next_token_probabilities(loaded: HasWeights, prompt: Any) -> np.ndarray:
    """[V] float64: the model's distribution over the token after `prompt`, at temperature 1."""
    assert loaded.tokenizer is not None
    ids: Sequence[int] = encode(loaded.tokenizer, prompt)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return loaded.definition.merge(params)(tokens)[0][0, -1].astype(jnp.float32)

    if loaded.mesh is None:
        found = jax.jit(logits)(loaded.params, jnp.asarray([ids], jnp.int32))
    else:
        with jax.set_mesh(loaded.mesh):
            found = jax.jit(logits)(loaded.params, jnp.asarray([ids], jnp.int32))
    values = np.asarray(found, np.float64)
    values = np.exp(values - values.max())
    return values / values.sum()
