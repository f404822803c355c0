# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler says of training steps, kept: for the recipe builder, `recipes/plans/*.json`, and for the
tutorial on reading a plan, `maxkit/plan/records/*.json`.

    .venv/bin/python benchmarks/plans.py                       all of `PLANS` and of `EXAMPLES`
    .venv/bin/python benchmarks/plans.py pretrain v5e:1x1      one of the first
    .venv/bin/python benchmarks/plans.py example "four chips"  one of the second

Needs the environment that `make plan` makes.
"""

import json
import sys
from pathlib import Path
from typing import Any

import maxkit
from maxkit.plan.examples import EXAMPLES, MODEL, RECIPE, record_of

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "plans"
# A micro-batch must divide over the devices: eight of them need eight rows.
PLANS = [
    ("sft", "v5e:1x1", {}),
    ("sft", "v5e:2x2", {}),
    ("sft", "v5e:2x4", {"batch_size": 8}),
    ("sft", "v5p:2x2x1", {}),
    ("sft", "v6e:1x1", {}),
    ("pretrain", "v5e:1x1", {}),
    ("pretrain", "v5e:2x2", {}),
]


def main(chosen: list[str]) -> None:
    """Compile and write."""
    for recipe, topology, given in PLANS:
        if chosen in ([], [recipe, topology]):
            write(FOLDER / f"{recipe}-{topology.replace(':', '-')}.json", recipe, topology, given)
    for name, (topology, given) in EXAMPLES.items():
        if chosen in ([], ["example", name]):
            write(record_of(name), RECIPE, topology, MODEL | given)


def write(path: Path, recipe: str, topology: str, given: dict[str, Any]) -> None:
    """One plan."""
    plan = maxkit.plan.plan(recipe, topology, given).to_dict()
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    print(path.name, "fits" if plan["fits"] else "does not fit", plan["required_bytes"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
