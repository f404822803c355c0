# SPDX-License-Identifier: Apache-2.0
"""The setup cell: installs where maxkit is missing, replaces nothing that is in use, leaves one name behind."""

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
    folder.mkdir(exist_ok=True)
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
    """(python, wheels) of an environment with "jax" and others at 0.4, and newer ones that pip could take."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    names = ("jax", "numpy", "tornado", "flax")
    old = [wheel(folder, name, "0.4") for name in names]
    for name in names:
        wheel(folder, name, "0.9")
    pip(python, "install", "--no-index", *map(str, old))
    return python, folder


def pip(python: Path, *arguments: str) -> str:
    done = subprocess.run([str(python), "-m", "pip", "-q", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def run_cell(colab: tuple[Path, Path], source: Path | str, before: str = "") -> subprocess.CompletedProcess[str]:
    python, folder = colab
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"MAXKIT__INSTALL_FROM": str(source), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    return subprocess.run(
        [str(python), "-c", before + SETUP_CELL + TELL], capture_output=True, text=True, env=environ, cwd=folder
    )


def test_without_a_source_it_says_what_to_set_and_asks_no_index(colab: tuple[Path, Path]) -> None:
    # The maxkit of the package index is a project of other people.
    refused = run_cell(colab, "")
    assert refused.stderr.splitlines()[-1].startswith("RuntimeError: say where maxkit is: %env MAXKIT__INSTALL_FROM=")
    assert "pip" not in refused.stdout + refused.stderr


@pytest.mark.parametrize("name, before", [("jax", ""), ("numpy", ""), ("tornado", "import tornado\n")])
def test_what_is_preinstalled_or_in_use_is_not_replaced(colab: tuple[Path, Path], name: str, before: str) -> None:
    python, folder = colab
    refused = run_cell(colab, wheel(folder, "maxkit", "0.0.1", f"{name}>=0.9"), before)
    assert f"depends on {name}>=0.9" in refused.stdout and f"(constraint) {name}==0.4" in refused.stdout
    assert refused.stderr.splitlines()[-1].startswith("RuntimeError: nothing was installed")
    assert f"{name}-0.4" in pip(python, "freeze")


def test_what_nobody_uses_may_be_renewed(colab: tuple[Path, Path]) -> None:
    python, folder = colab
    # A second, older numpy further down the path, as a system's own packages are in Colab: not the one in use.
    with zipfile.ZipFile(wheel(folder / "system", "numpy", "0.2")) as archive:
        archive.extractall(folder / "system")
    before = f"import sys\nsys.path.append({str(folder / 'system')!r})\ndel sys\n"
    done = run_cell(colab, wheel(folder, "maxkit", "0.0.1", "flax>=0.9"), before)
    assert done.returncode == 0, done.stdout
    assert "flax==0.9" in pip(python, "freeze") and "numpy-0.4" in pip(python, "freeze")
    pip(python, "uninstall", "--yes", "maxkit")


def test_it_installs_once_and_leaves_one_name(colab: tuple[Path, Path]) -> None:
    python, folder = colab
    source = wheel(folder, "maxkit", "0.0.2", "jax")
    done = run_cell(colab, source)
    assert done.stdout.splitlines() == ["maxkit 0.0.2", "['maxkit']"], done.stderr
    assert "jax-0.4" in pip(python, "freeze")
    source.unlink()  # the second time nothing is fetched
    assert run_cell(colab, source).returncode == 0
