# SPDX-License-Identifier: Apache-2.0
"""Every kind of layer on 8 simulated devices against one: loss, gradients, decoding, layouts."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_families import FAMILIES

SCRIPT = Path(__file__).parent / "family_sharding_cases.py"


@functools.cache
def results():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(SCRIPT.parent.parent),
    }
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_devices_equal_one(family):
    """The same float32 sums in another order: 2e-5 of the loss, 2e-4 of the largest gradient, of the logits' spread."""
    found = {name: case for name, case in results().items() if name.split()[0] == family and " " in name}
    assert found
    for name, case in found.items():
        loss, wanted = case["loss"]
        assert loss == pytest.approx(wanted, rel=2e-5), name
        assert case["gradients"] < 2e-4 and case["decode"] < 2e-4, (name, case)
        assert case["wrong"] == [], name


@pytest.mark.parametrize("family", ["deepseek", "qwen3_next"])
def test_the_engine_generates_the_same_on_a_mesh(family):
    (tokens, slot), on_mesh = results()["generated"][family]
    assert [tokens, slot] == on_mesh and slot == tokens[0] and len(slot) == 5
