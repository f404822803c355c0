# SPDX-License-Identifier: Apache-2.0
"""Every test carries the marker of its folder, and runs on the CPU unless told otherwise."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # for what several test files share: tiny_models.py, ...


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TESTS in item.path.parents:
            item.add_marker(item.path.relative_to(TESTS).parts[0])
