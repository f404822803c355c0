# SPDX-License-Identifier: Apache-2.0
"""Continuations that share a row have the log-probabilities that each has alone, in every kind of model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_families import FAMILIES
from tiny_models import TINY, weights

from maxkit.errors import UserError
from maxkit.eval.likelihood import Continuations, _logps, can_branch, continuation_logps
from maxkit.infer.score import sequence_logps
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition


def items(count: int = 5, seed: int = 0) -> list[Continuations]:
    """Contexts of 1 to 12 tokens with one to four options of 1 to 6 tokens."""
    draw = np.random.default_rng(seed)
    ids = lambda n: draw.integers(0, TINY.vocab_size, n).tolist()  # noqa: E731
    sizes = [1, *draw.integers(2, 13, count - 1)]
    return [
        Continuations(ids(n), [ids(m) for m in draw.integers(1, 7, 1 + i % 4)]) for i, n in enumerate(sizes, start=1)
    ]


def alone(definition: ModelDefinition, params, given: list[Continuations]) -> list[list[np.ndarray]]:
    """The same numbers, one whole sequence for every option."""
    whole = [[*item.context, *option] for item in given for option in item.options]
    scored = iter(sequence_logps(definition, params, whole, batch_size=len(whole)))
    return [[next(scored)[len(item.context) - 1 :] for _ in item.options] for item in given]


def assert_equal(found, wanted) -> None:
    assert [[len(o) for o in some] for some in found] == [[len(o) for o in some] for some in wanted]
    for some, others in zip(found, wanted, strict=True):
        for one, other in zip(some, others, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("name", ["gemma3", "deepseek", "qwen3_next"])
def test_sharing_a_row_changes_nothing(name: str) -> None:
    definition = ModelDefinition(FAMILIES[name])
    params, given = weights(definition), items()
    assert can_branch(definition) is (name != "qwen3_next")  # a recurrent state cannot branch
    assert_equal(continuation_logps(definition, params, given, batch_size=2), alone(definition, params, given))


def test_order_batch_size_and_a_named_kernel_change_nothing() -> None:
    definition = ModelDefinition(TINY)
    params, given = weights(definition), items(9, seed=1)
    wanted = continuation_logps(definition, params, given, batch_size=16)
    assert_equal(continuation_logps(definition, params, given[::-1], batch_size=4)[::-1], wanted)
    # Kernels that make their own masks cannot branch; on a CPU only the question whether they are asked to is tested.
    assert not can_branch(ModelDefinition(TINY, Execution(attention_kernel="splash")))


def test_lengths_of_one_bucket_compile_once() -> None:
    definition = ModelDefinition(TINY.model_copy(update={"mlp_dim": 20}))
    params, before = weights(definition), _logps._cache_size()
    for length in (2, 9, 13, 16):
        continuation_logps(definition, params, [Continuations([1] * length, [[2]])] * 2, batch_size=2)
    assert _logps._cache_size() == before + 1
    continuation_logps(definition, params, [Continuations([1] * 17, [[2]])] * 2, batch_size=2)
    assert _logps._cache_size() == before + 2


def test_the_last_token_may_stand_one_beyond_the_models_length() -> None:
    definition = ModelDefinition(TINY)
    longest = Continuations([3], [[5] * TINY.max_seq_len])
    (found,) = continuation_logps(definition, weights(definition), [longest])
    assert found[0].shape == (TINY.max_seq_len,) and np.isfinite(found[0]).all()


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (Continuations([], [[1]]), "item 0 has an empty context or option"),
        (Continuations([1], []), "item 0 has an empty context or option"),
        (Continuations([1], [[2], []]), "item 0 has an empty context or option"),
        (Continuations([1], [[2] * 65]), "item 0 has 66 tokens; allowed are max_seq_len \\+ 1 = 65"),
        (Continuations([1], [[48]]), "ids from 1 to 48; allowed: 0 to 47"),
    ],
)
def test_what_cannot_be_scored_is_refused(item: Continuations, words: str) -> None:
    definition = ModelDefinition(TINY)
    with pytest.raises(UserError, match=words):
        continuation_logps(definition, weights(definition), [item])


SHARDED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_eval_likelihood import items
from tiny_models import TINY, weights
import jax
from maxkit import mesh as meshes
from maxkit.eval.likelihood import continuation_logps
from maxkit.models.definition import ModelDefinition
definition = ModelDefinition(TINY)
mesh = meshes.make_mesh("fsdp:4,tensor:2")
params = jax.device_put(weights(definition), definition.shardings(mesh))
found = continuation_logps(definition, params, items(9), batch_size=8, mesh=mesh)
print(json.dumps([[option.tolist() for option in some] for some in found]))
"""


def test_eight_devices_give_what_one_gives() -> None:
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parent.parent)]),
    }
    command = [sys.executable, "-c", SHARDED, str(here)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    definition = ModelDefinition(TINY)
    wanted = continuation_logps(definition, weights(definition), items(9), batch_size=8)
    assert_equal([[np.asarray(o) for o in some] for some in json.loads(done.stdout)], wanted)
