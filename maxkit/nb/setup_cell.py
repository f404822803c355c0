# SPDX-License-Identifier: Apache-2.0
"""The setup cell that every recipe holds word for word: it runs before maxkit can be imported.

A test compares it with the recipes. `MAXKIT__INSTALL_FROM` names another source (a wheel, a checkout) for
that test and for people behind a mirror.
"""

SETUP_CELL = """\
# Setup: import maxkit, or install it where it is missing (Colab, Kaggle) and leave JAX and numpy alone.
try:
    import maxkit
except ModuleNotFoundError:
    import os, subprocess, sys, tempfile  # noqa: E401
    from importlib import metadata

    source = os.environ.get("MAXKIT__INSTALL_FROM", "maxkit[notebooks]")
    names = ("jax", "jaxlib", "libtpu", "numpy")
    frozen = [f"{d.name}=={d.version}" for d in metadata.distributions() if d.name in names]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        print(*frozen, sep="\\n", file=constraints, flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints.name]
        subprocess.run([*pip, source], check=True)
    del os, subprocess, sys, tempfile, metadata, source, names, frozen, constraints, pip
    import maxkit
print(f"maxkit {maxkit.__version__}")"""
