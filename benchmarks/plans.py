# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler says of the recipes' steps, kept for the recipe builder: `recipes/plans/*.json`.

    .venv/bin/python benchmarks/plans.py                     all of `PLANS`
    .venv/bin/python benchmarks/plans.py pretrain v5e:1x1    one

Needs the environment that `make plan` makes.
"""

import json
import sys
from pathlib import Path

import maxkit

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
    FOLDER.mkdir(exist_ok=True)
    for recipe, topology, given in PLANS:
        if chosen in ([], [recipe, topology]):
            plan = maxkit.plan.plan(recipe, topology, given).to_dict()
            name = f"{recipe}-{topology.replace(':', '-')}.json"
            (FOLDER / name).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
            print(name, "fits" if plan["fits"] else "does not fit", plan["required_bytes"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
