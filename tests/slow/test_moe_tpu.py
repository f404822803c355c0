# SPDX-License-Identifier: Apache-2.0
"""A training step with experts on three mesh axes, by the real TPU compiler."""

import json
import subprocess
from pathlib import Path

import pytest

from maxkit.errors import UserError
from maxkit.plan import command
from maxkit.plan.topology import one_compile_at_a_time

SCRIPT = Path(__file__).parent / "moe_on_tpu.py"


def test_a_step_compiles_with_grouped_products_and_exchanges_rows():
    try:
        python = command._python_with_libtpu()
    except UserError as error:
        pytest.skip(f"TPU compiler: {error}")
    with one_compile_at_a_time() as lock:
        done = subprocess.run([python, str(SCRIPT)], capture_output=True, text=True, pass_fds=[lock])
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # gate, up and down: forward, and the gradients of rows and of kernels.
    assert found["ragged"]["grouped"] >= 9 and found["capacity"]["grouped"] == 0
    for run in found.values():
        assert {"all-gather", "all-reduce"} <= set(run["collectives"])
