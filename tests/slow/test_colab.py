# SPDX-License-Identifier: Apache-2.0
"""Colab, as far as it can be had here: its packages, a kernel of its age without papermill, maxkit from this checkout.

The setup cell replaces nothing that is in use; the recipe then runs as people run it: all cells, all again, one out of
order, and on in a new runtime. Colab itself was not tried.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from colab_machine import PYTHON, Machine, find_python, recipe_cells
from nbclient.exceptions import CellExecutionError

# What a person installs who was refused (docs/colab.md): a newer JAX than the one that maxkit is tested with, and
# neither its NumPy nor the newest.
NEWER = {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "numpy": "2.3.5"}
IN_USE = "import jax, matplotlib.pyplot, numpy, pandas\nprint(jax.__version__, numpy.__version__)"
SIZES = {"batch_size": 2, "seq_len": 64, "run_dir": "runs/sft"}


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    python = find_python()
    if python is None:
        pytest.skip(f"no Python {PYTHON}")
    with tempfile.TemporaryDirectory(prefix="colab-") as folder:  # 1.5 GB: pytest would keep three of them
        yield Machine(Path(folder), python)


def cell_with(cells: list[str], text: str) -> str:
    [found] = [cell for cell in cells if text in cell]
    return found


def test_a_jax_that_is_too_old_is_refused_and_nothing_is_replaced(machine: Machine) -> None:
    before = machine.versions()
    setup = cell_with(recipe_cells("sft"), "# Setup:")
    with machine.kernel(MAXKIT__INSTALL_FROM=f"{machine.checkout()}[notebooks]") as kernel:
        assert kernel.run(IN_USE) == "0.7.2 2.0.2\n"
        with pytest.raises(CellExecutionError, match="nothing was installed: pip says above what does not fit"):
            kernel.run(setup)
        assert "depends on jax>=0.10" in kernel.shown and "(constraint) jax==0.7.2" in kernel.shown
    assert machine.versions() == before


def test_a_recipe_runs_as_people_run_it(machine: Machine) -> None:
    machine.pip("install", *(f"{name}=={version}" for name, version in NEWER.items()))
    before, cells = machine.versions(), recipe_cells("sft", steps=2, **SIZES)
    with machine.kernel(MAXKIT__INSTALL_FROM=f"{machine.checkout()}[notebooks]") as kernel:
        kernel.run(IN_USE)
        used = set(kernel.run(USED).split())
        kernel.run(*cells)
        after = machine.versions()
        replaced = {name: (version, after[name]) for name, version in before.items() if after[name] != version}
        print(f"in use {len(used)}, replaced {replaced}, new {sorted(after.keys() - before.keys())}")
        assert {"jax", "jaxlib", "numpy", "ipykernel", "tornado", "pandas"} <= used and not used & replaced.keys()
        assert kernel.run(IN_USE) == f"{NEWER['jax']} {NEWER['numpy']}\n"
        loss = kernel.run("print(after.loss)")

        kernel.run(*cells)  # all again: nothing is left to do
        assert kernel.run("print(after.loss)") == loss

        # Out of order: the weights are loaded again after training, and must be the trained ones.
        kernel.run(*(cell_with(cells, text) for text in ("run.load_model()", "run.train()", "run.assess(")))
        assert kernel.run("print(after.loss)") == loss

    cells = recipe_cells("sft", steps=3, **SIZES)  # a new runtime; no source is needed, maxkit is there
    with machine.kernel() as kernel:
        kernel.run(*cells)
    report = json.loads((machine.folder / SIZES["run_dir"] / "report.json").read_text())
    assert (report["steps_done"], report["steps_this_run"]) == (3, 1)
    assert report["explicit"] == dict.fromkeys(["run_dir", "steps", "batch_size", "seq_len"], "notebook")
    assert report["checks"] and all(check["passed"] for check in report["checks"])
    environment = report["environment"]
    print({name: environment.get(name) for name in ("python", "jax", "packages")})


# The distributions whose modules the kernel has loaded.
USED = """\
import sys
from importlib import metadata
loaded = {name for name, module in sys.modules.items() if getattr(module, "__file__", None)}
print(*{dist for name, dists in metadata.packages_distributions().items() if name in loaded for dist in dists})
"""
