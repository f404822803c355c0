# SPDX-License-Identifier: Apache-2.0
"""Adapters: beside every matrix of every family, the same function merged, dropout that no layout changes."""

import fnmatch
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_families import FAMILIES
from tiny_models import TINY, random_batch, weights

from maxkit import build, config
from maxkit.errors import UserError
from maxkit.models.config import Execution
from maxkit.models.definition import Dropout, ModelDefinition
from maxkit.models.lora import LoraConfig
from maxkit.objectives import NextToken
from maxkit.train.step import eval_step, train_step
from maxkit.types import TrainState

OBJECTIVE = NextToken(num_tiles=2)
SGD = optax.sgd(1.0)
DROPPED = LoraConfig(rank=2, dropout=0.4, targets=("query", "out", "up", "down"))
# What of a family's kernels is no projection: tables, heads, routers, gates of one column, convolutions.
NO_PROJECTION = ("embed/*", "positions/*", "output/*", "*/router/*", "*/shared_gate/*", "*_conv/*")


def adapters(definition):
    """{(address, layer)} of matrices with an adapter; every lora_a has its lora_b."""
    found = {name: set() for name in ("lora_a", "lora_b")}
    for parameter in definition.parameters.values():
        stem, _, name = parameter.address.rpartition("/")
        if parameter.trainable_adapter:
            found[name] |= {(stem, layer) for layer in parameter.layers}
    assert found["lora_a"] == found["lora_b"]
    return found["lora_a"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_of_a_layer_gets_an_adapter(name):
    scanned, unrolled = (ModelDefinition(FAMILIES[name], Execution(scan_layers=s), LoraConfig(rank=2)) for s in (1, 0))
    wanted = set()
    for p in scanned.parameters.values():
        stem, _, leaf = p.address.rpartition("/")
        if leaf == "kernel" and not any(fnmatch.fnmatch(p.address, other) for other in NO_PROJECTION):
            wanted |= {(stem, layer) for layer in p.layers}
    assert wanted and adapters(scanned) == wanted == adapters(unrolled)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("query_up",), 4), (("attention/*",), 4 * 7), (("experts/*",), 3 * 3), (("*_up", "shared/down"), 4 * 3 + 3)],
)
def test_targets_are_names_or_patterns(targets, count):
    """Of four layers of latent attention, three of them with experts and a shared one."""
    assert len(adapters(ModelDefinition(FAMILIES["deepseek"], lora=LoraConfig(rank=2, targets=targets)))) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("out", "kv_dwon")}, "'kv_dwon' matches no projection of this model; did you mean 'kv_down'"),
        ({"targets": ("embed/table",)}, "'embed/table' matches no projection"),
        ({"targets": ()}, "lora_targets is empty"),
        ({"dropout": 0.1}, "the adapters of experts take no dropout"),
    ],
)
def test_what_a_model_cannot_have_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        ModelDefinition(FAMILIES["deepseek"], lora=LoraConfig(rank=2, **changes))


def test_a_recipe_says_all_of_it_in_flat_parameters():
    given = {"lora_rank": 4, "lora_targets": "query, experts/*", "lora_dropout": 0.1, "base_weight_dtype": "nf4"}
    found = config.resolve("sft", given={name: (value, "papermill") for name, value in given.items()}, environ={})
    wanted = LoraConfig(rank=4, targets=("query", "experts/*"), dropout=0.1, base_weight_dtype="nf4")
    assert build.lora_config(found) == wanted
    assert build.lora_config(config.resolve("sft", environ={})) is None
    with pytest.raises(UserError, match="lora_dropout=0.1 needs LoRA matrices: set lora_rank"):
        config.resolve("sft", given={"lora_dropout": (0.1, "keyword")}, environ={})


# ---------------------------------------------------------------- dropout


@functools.cache
def compiled(dropout, accumulation=1, scan_layers=True, remat_policy="none"):
    lora = DROPPED.model_copy(update={"dropout": dropout})
    definition = ModelDefinition(TINY, Execution(scan_layers=scan_layers, remat_policy=remat_policy), lora)
    return definition, jax.jit(train_step(definition, OBJECTIVE, SGD, accumulation))


def update(*case, step=0):
    """What one update subtracts from the adapters, by (address, layer), and its loss."""
    definition, run = compiled(*case)
    params, base = definition.split_trainable(weights(definition))
    state = TrainState(jnp.int32(step), params, base, SGD.init(params), jax.random.key(5))
    after, metrics = run(state, random_batch(TINY))
    found = {}
    for path, leaf in definition.flat(jax.tree.map(jnp.subtract, params, after.params)).items():
        parameter = definition.parameters[path]
        for row, layer in enumerate(parameter.layers):
            found[parameter.address, layer] = np.asarray(leaf[row] if parameter.stacked else leaf)
    return found, float(metrics["loss"])


def difference(a, b):
    assert a.keys() == b.keys()
    return np.sqrt(sum(((a[k] - b[k]) ** 2).sum() for k in a) / sum((b[k] ** 2).sum() for k in b))


def test_dropout_is_of_the_row_and_the_layer_whatever_the_layout():
    """Scanned and unrolled, 1 x 4 = 2 x 2 = 4 x 1 rows, with rematerialisation: 4e-7 measured, 1e-5 allowed."""
    whole, loss = update(0.4)
    for case in ((0.4, 4), (0.4, 2, False, "full")):
        other, other_loss = update(*case)
        assert difference(other, whole) < 1e-5 and other_loss == pytest.approx(loss, rel=1e-6)
    plain, without = update(0.0)
    assert difference(plain, whole) > 0.1 and without != loss
    assert difference(update(0.4, step=1)[0], whole) > 0.1


def test_dropout_keeps_the_mean_and_evaluation_has_none():
    definition, plain = (ModelDefinition(TINY, lora=DROPPED.model_copy(update={"dropout": d})) for d in (0.4, 0.0))
    params, batch = weights(definition), random_batch(TINY)
    total = OBJECTIVE.weights(batch)
    dropped, kept = (eval_step(d, OBJECTIVE)(params, batch, None, total)["loss"] for d in (definition, plain))
    assert float(dropped) == float(kept)
    model = definition.merge(params, Dropout(jax.random.key(0), jnp.arange(64)))
    query = model.layers.block_0.attention.query
    x = jnp.ones((64, 50, TINY.embed_dim))
    seen = np.asarray(query._drop(x, query.row_keys[0]))
    assert set(np.unique(seen.round(4))) == {0.0, np.float32(1 / 0.6).round(4)}
    assert seen.mean() == pytest.approx(1, abs=0.02) and (seen[0] != seen[1]).any()
