# SPDX-License-Identifier: Apache-2.0
"""How much there is to read: lines of the model code and tests that run it, beside MaxText's wheel where one is given.

    python benchmarks/lines_of_code.py [maxtext-0.2.5-py3-none-any.whl]

Every line of every .py file counts, comments and blank lines too. Prints one JSON line.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What computes the model; `ops` are its kernels, which MaxText keeps in `kernels` and `layers`.
OURS = ("maxkit/models", "maxkit/ops")
THEIRS = ("maxtext/layers/", "maxtext/models/")
TESTS = ("test_decoder", "test_attention", "test_moe", "test_gated_delta", "test_rope", "test_family", "test_families")


def model_lines() -> dict[str, int]:
    """{folder: lines}."""
    return {folder: sum(_lines(path.read_bytes()) for path in (ROOT / folder).glob("*.py")) for folder in OURS}


def wheel_lines(wheel: str) -> dict[str, int]:
    """{folder: lines} of the layers and models of MaxText."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        return {
            folder: sum(_lines(archive.read(name)) for name in names if name.startswith(folder)) for folder in THEIRS
        }


def model_tests() -> int:
    """Tests of the decoder, its parts and its families, as pytest collects them."""
    files = [path for path in sorted((ROOT / "tests").glob("*/test_*.py")) if path.stem.startswith(TESTS)]
    files = [path for path in files if path.parent.name in ("unit", "golden")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sum("::" in line for line in done.stdout.splitlines())


def _lines(content: bytes) -> int:
    return content.count(b"\n")


def main() -> None:
    """Print the counts."""
    found = {"maxkit": model_lines(), "tests": model_tests()}
    if len(sys.argv) > 1:
        found["maxtext"] = wheel_lines(sys.argv[1])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
