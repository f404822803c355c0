# SPDX-License-Identifier: Apache-2.0
"""Plans that the TPU compiler once made of one model, kept for reading where there is no compiler. No JAX.

`EXAMPLES` says of what, `benchmarks/plans.py` compiles them into `records/`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from maxkit.errors import UserError, nearest
from maxkit.plan.report import Plan

RECORDS = Path(__file__).parent / "records"
RECIPE = "sft"
MODEL = {"model": "qwen3-0.6b", "batch_size": 8, "seq_len": 1024}


class Example(NamedTuple):
    """What was compiled: parameters of `RECIPE` besides `MODEL`, for a topology."""

    topology: str
    given: dict[str, Any]


_LEAN = {"remat_policy": "full", "dtype": "bfloat16"}
EXAMPLES = {
    "one chip": Example("v5e:1x1", {}),
    "four chips": Example("v5e:2x2", {}),
    "eight chips": Example("v5e:2x4", {}),
    "one tile": Example("v5e:2x2", {"num_vocab_tiling": 1}),
    "recompute": Example("v5e:1x1", {"remat_policy": "full"}),
    "bfloat16": Example("v5e:1x1", {"dtype": "bfloat16"}),
    "accumulate": Example("v5e:1x1", {"gradient_accumulation_steps": 8}),
    "recompute and bfloat16": Example("v5e:1x1", _LEAN),
    "fsdp": Example("v5e:2x2", _LEAN),
    "data": Example("v5e:2x2", _LEAN | {"mesh": "data:4"}),
    "tensor": Example("v5e:2x2", _LEAN | {"mesh": "tensor:4"}),
}


def example(name: str) -> Plan:
    """The plan that was made of one of `EXAMPLES`.

    Raises:
        UserError: no such example.
    """
    if name not in EXAMPLES:
        raise UserError(f"no example {name!r}; {nearest(name, EXAMPLES)}")
    return Plan.from_dict(json.loads(record_of(name).read_text(encoding="utf-8")))


def record_of(name: str) -> Path:
    """Where an example lies."""
    return RECORDS / f"{name.replace(' ', '-')}.json"
