# SPDX-License-Identifier: Apache-2.0
"""A machine as Colab gives it: its Python, its packages, a kernel without papermill, and no maxkit yet.

    python tests/colab_machine.py FOLDER

makes the environment in FOLDER (about 1.5 GB, only the package index is asked) and prints what it holds. The test
tests/slow/test_colab.py runs a recipe in it, cell by cell as a person does. Colab itself was not tried.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = Path(__file__).with_name("fixtures") / "colab_packages.txt"
PYTHON = "3.12"
PIP = "24.1.2"  # Colab's
LIST = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"


def find_python() -> Path | None:
    """A Python of Colab's version: on the path, or among pyenv's."""
    named = shutil.which(f"python{PYTHON}")
    for path in ([Path(named)] if named else []) + sorted(Path.home().glob(f".pyenv/versions/{PYTHON}*/bin/python")):
        says = subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True)
        if says.returncode == 0:
            return path
    return None


class Machine:
    """An environment in `folder`, which is made where it is missing."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder, self.python = folder, folder / "env" / "bin" / "python"
        if not self.python.exists():
            subprocess.run([python, "-m", "venv", folder / "env"], check=True)
            self.pip("install", f"pip=={PIP}")
            self.pip("install", "--no-deps", "--requirement", str(PACKAGES))  # the list is whole

    def pip(self, *arguments: str) -> None:
        """Run pip, without a cache beside the environment; what is imported is compiled then."""
        command = [str(self.python), "-m", "pip", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
        subprocess.run([*command, *arguments], check=True, env=os.environ | {"PIP_NO_COMPILE": "1"})

    def versions(self) -> dict[str, str]:
        """{distribution: version} of what is installed, seen by a new process."""
        done = subprocess.run([self.python, "-c", LIST], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def checkout(self) -> Path:
        """A copy of the checkout's package, since building writes beside the sources."""
        copy = self.folder / "checkout"
        if not copy.exists():
            copy.mkdir()
            for name in ("pyproject.toml", "README.md", "LICENSE"):
                shutil.copy(ROOT / name, copy)
            shutil.copytree(ROOT / "maxkit", copy / "maxkit", ignore=shutil.ignore_patterns("__pycache__"))
        return copy

    @contextmanager
    def kernel(self, **environment: str) -> Iterator["Kernel"]:
        """A kernel of this environment, at work in `folder`."""
        argv = [str(self.python), "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        manager = KernelManager(kernel_name="python3")
        manager._kernel_spec = KernelSpec(argv=argv, language="python")
        shown = {
            name: value for name, value in os.environ.items() if not name.startswith(("MAXKIT_", "PYTHON", "XLA_"))
        }
        client = NotebookClient(nbformat.v4.new_notebook(), km=manager, timeout=1800)
        environment = shown | {"JAX_PLATFORMS": "cpu"} | environment
        with client.setup_kernel(cwd=str(self.folder), env=environment, cleanup_kc=True):
            yield Kernel(client)


class Kernel:
    """Cells run in it one by one, in whatever order."""

    def __init__(self, client: NotebookClient) -> None:
        self.client = client

    def run(self, *sources: str) -> str:
        """Run cells; what the last one printed and showed. An error in a cell is raised."""
        for source in sources:
            self.client.nb.cells.append(nbformat.v4.new_code_cell(source))
            self.client.execute_cell(self.client.nb.cells[-1], len(self.client.nb.cells) - 1)
        return self.shown

    @property
    def shown(self) -> str:
        """What the latest cell printed and showed."""
        outputs = self.client.nb.cells[-1].outputs
        return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)


def recipe_cells(name: str, **parameters: object) -> list[str]:
    """The code cells of a recipe, the values of `parameters` edited in the first one as a person would."""
    book = nbformat.read(ROOT / "recipes" / f"{name}.ipynb", 4)
    cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
    for parameter, value in parameters.items():
        cells[0], edits = re.subn(rf"(?m)^({parameter}: \w+ = ).*?(  # )", rf"\g<1>{value!r}\g<2>", cells[0])
        assert edits == 1, parameter
    return cells


if __name__ == "__main__":
    found = find_python()
    if found is None:
        sys.exit(f"no Python {PYTHON} was found")
    start = time.perf_counter()
    print(json.dumps(Machine(Path(sys.argv[1]).absolute(), found).versions(), indent=1, sort_keys=True))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
