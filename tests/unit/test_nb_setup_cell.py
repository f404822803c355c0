# SPDX-License-Identifier: Apache-2.0
"""The setup cell: installs where maxkit is missing, replaces nothing that is there, leaves one name behind."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from maxkit.nb.setup_cell import SETUP_CELL

TELL = "\nprint([name for name in dir() if not name.startswith('__')])"


def test_where_maxkit_is_installed_it_only_imports() -> None:
    done = subprocess.run([sys.executable, "-c", SETUP_CELL + TELL], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["maxkit 0.1.0", "['maxkit']"], done.stderr


def wheel(folder: Path, name: str, version: str, requires: str = "") -> Path:
    """The smallest installable wheel."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"__version__ = {version!r}\n")
        archive.writestr(f"{info}/METADATA", metadata + (f"Requires-Dist: {requires}\n" if requires else ""))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> tuple[Path, Path]:
    """(python, wheels) of an environment with "jax" and "numpy" 0.4, and newer ones that pip could take."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    old = [wheel(folder, name, "0.4") for name in ("jax", "numpy")]
    for name in ("jax", "numpy"):
        wheel(folder, name, "0.9")
    pip(python, "install", "--no-index", *map(str, old))
    return python, folder


def pip(python: Path, *arguments: str) -> str:
    done = subprocess.run([str(python), "-m", "pip", "-q", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def run_cell(colab: tuple[Path, Path], source: Path) -> subprocess.CompletedProcess[str]:
    python, folder = colab
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"MAXKIT__INSTALL_FROM": str(source), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    return subprocess.run(
        [str(python), "-c", SETUP_CELL + TELL], capture_output=True, text=True, env=environ, cwd=folder
    )


@pytest.mark.parametrize("name", ["jax", "numpy"])
def test_what_is_preinstalled_is_not_replaced(colab: tuple[Path, Path], name: str) -> None:
    python, folder = colab
    refused = run_cell(colab, wheel(folder, "maxkit", "0.0.1", f"{name}>=0.9"))
    assert refused.returncode != 0 and "constraint" in refused.stderr.lower()
    assert f"{name}-0.4" in pip(python, "freeze")


def test_it_installs_once_and_leaves_one_name(colab: tuple[Path, Path]) -> None:
    python, folder = colab
    source = wheel(folder, "maxkit", "0.0.2", "jax")
    done = run_cell(colab, source)
    assert done.stdout.splitlines() == ["maxkit 0.0.2", "['maxkit']"], done.stderr
    assert "jax-0.4" in pip(python, "freeze")
    source.unlink()  # the second time nothing is fetched
    assert run_cell(colab, source).returncode == 0
