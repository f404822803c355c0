# SPDX-License-Identifier: Apache-2.0
"""Each guard of `maxkit check` is green on what is committed and red on a mutation of it.

Prints the list guard / mutation / message: python -m pytest -q tests/unit/test_guards.py
"""

import base64
import functools
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image, ImageDraw

from maxkit.config import RECIPES
from maxkit.nb import guards
from maxkit.nb.guards.freshness import STAMP
from maxkit.nb.guards.notebook import Notebook, read_notebook, read_tree
from maxkit.nb.metadata import notebook_metadata

ROOT = Path(__file__).resolve().parents[2]
RECIPE, TUTORIAL = "recipes/convert.ipynb", "notebooks/anatomy_of_a_checkpoint.ipynb"
GUARDS = {guard.__name__: guard for guard in (*guards.NOTEBOOK_GUARDS, *guards.TREE_GUARDS)}
IN_TREE = {guard.__name__ for guard in guards.TREE_GUARDS}
HOME = "/" + "home/ada/data.jsonl"  # in one piece it would look like a path of the machine that this was written on


def code(node: Any, words: str) -> Any:
    """The code cell that holds `words`."""
    return next(cell for cell in node.cells if cell.cell_type == "code" and words in cell.source)


def tagged(node: Any, tag: str) -> Any:
    return next(cell for cell in node.cells if tag in cell.metadata.get("tags", []))


def picture(node: Any) -> Any:
    """The data of the first picture."""
    shown = (output for cell in node.cells for output in cell.get("outputs", []))
    return next(output.data for output in shown if "image/png" in output.get("data", {}))


def drawn(ground: tuple[int, ...], ink: tuple[int, ...] | None) -> str:
    image = Image.new("RGBA", (400, 200), ground)
    if ink is not None:
        ImageDraw.Draw(image).rectangle((50, 50, 350, 150), outline=ink, width=6)
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def replace(cell: Any, old: str, new: str) -> None:
    assert old in cell.source, cell.source
    cell.source = cell.source.replace(old, new, 1)


def append(words: str, line: str) -> Callable[[Any], None]:
    """Adds a line to the code cell that holds `words`."""

    def mutate(node: Any) -> None:
        code(node, words).source += f"\n{line}"

    return mutate


def text(line: str) -> Callable[[Any], None]:
    """Adds a line to the second text."""

    def mutate(node: Any) -> None:
        [cell for cell in node.cells if cell.cell_type == "markdown"][1].source += f"\n\n{line}\n"

    return mutate


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Replaces text in a file of the tree."""

    def mutate(root: Path) -> None:
        content = (root / file).read_text()
        assert old in content
        (root / file).write_text(content.replace(old, new, 1))

    return mutate


def in_record(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Changes the run record of the recipe."""

    def mutate(root: Path) -> None:
        file = root / "recipes/results/convert-cpu.json"
        record = json.loads(file.read_text())
        change(record)
        file.write_text(json.dumps(record))

    return mutate


class Mutation(NamedTuple):
    """`change` takes a notebook's content, or the folder of the tree where `file` is empty."""

    guard: str
    what: str
    file: str
    change: Callable[[Any], Any]
    says: str


def recipe(guard: str, what: str, change: Callable[[Any], Any], says: str) -> Mutation:
    return Mutation(guard, what, RECIPE, change, says)


MUTATIONS = [
    recipe("file_format", "a cell id twice", lambda n: n.cells[4].update(id=n.cells[2].id), "used twice"),
    recipe("file_format", "no id", lambda n: n.cells[4].pop("id"), "'id' is a required property"),
    recipe("file_format", "widget state", lambda n: n.metadata.update(widgets={}), "left-over metadata: widgets"),
    recipe("file_format", "another kernel", lambda n: n.metadata.kernelspec.update(name="julia"), "'julia'"),
    recipe("hosting", "no network in Kaggle", lambda n: n.metadata.kaggle.update(isInternetEnabled=False), "kaggle: {"),
    recipe("hosting", "a GPU in Kaggle", lambda n: n.metadata.kaggle.update(isGpuEnabled=True), "bled': False"),
    recipe("file_format", "a GPU in Colab", lambda n: n.metadata.update(accelerator="GPU"), "left-over metadata: acc"),
    recipe("file_format", "too large", lambda n: n.cells[0].update(source="# a\n" + "b " * 250_000), "bytes, more"),
    recipe("cell_order", "no parameters tag", lambda n: tagged(n, "parameters").metadata.pop("tags"), "0 cells"),
    recipe("cell_order", "another recipe is bound", lambda n: replace(code(n, "bind("), "convert", "sft"), "not cfg ="),
    recipe("cell_order", "no check_all", lambda n: replace(code(n, "check_all"), "check_all()", "rows"), "can fail"),
    recipe("cell_order", "no record", lambda n: replace(code(n, ".finish("), ".finish(", ".end("), "no run.finish"),
    Mutation("cell_order", "nothing expected", TUTORIAL, lambda n: [
        c.update(source=c.source.replace("expect(", "tell(")) for c in n.cells], "nothing is expected"),
    recipe("headings", "a second title", text("# Another title"), "2 titles"),
    recipe("headings", "a level skipped", text("#### Deep"), "skips a level"),
    recipe("headings", "a heading twice", text("## Twice\n\n## Twice"), "occurs twice"),
    recipe("known_tags", "a misspelt tag", lambda n: tagged(n, "thumbnail").metadata.tags.append("hide_input"),
           "unknown tag 'hide_input'"),
    recipe("known_tags", "no thumbnail", lambda n: tagged(n, "thumbnail").metadata.tags.remove("thumbnail"), "0 cells"),
    recipe("known_tags", "a hidden nbval comment", append("describe_plan", "# NBVAL_IGNORE_OUTPUT"), "NBVAL_ comment"),
    Mutation("exercises", "an answer not closed", TUTORIAL, lambda n: [
        c.update(source=c.source.replace("</details>", "", 1)) for c in n.cells], "folded answers"),
    Mutation("exercises", "no figure", TUTORIAL, lambda n: [
        c.update(outputs=[]) for c in n.cells if c.cell_type == "code"], "no figure"),
    recipe("clean_run", "a cell not run", lambda n: code(n, "bind(").update(execution_count=None), "count None"),
    recipe("clean_run", "nothing run", lambda n: [
        c.update(execution_count=None) for c in n.cells if c.cell_type == "code"], "it was never run"),
    recipe("clean_run", "run out of order", lambda n: code(n, "bind(").update(execution_count=9), "count 9"),
    recipe("clean_run", "an error output", lambda n: code(n, "bind(").outputs.append(
        type(n)(output_type="error", ename="KeyError", evalue="x", traceback=[])), "shows an error: KeyError"),
    recipe("clean_run", "text on stderr", lambda n: code(n, "bind(").outputs.append(
        type(n)(output_type="stream", name="stderr", text="a warning")), "on stderr: 'a warning'"),
    recipe("clean_run", "papermill's marks", lambda n: code(n, "bind(").metadata.update(papermill={}), "left-over"),
    recipe("setup_cell", "numpy not frozen", lambda n: replace(tagged(n, "hide-input"), '"numpy"', '"scipy"'),
           "may replace a preinstalled numpy"),
    recipe("setup_cell", "no constraints", lambda n: replace(tagged(n, "hide-input"), "--constraint", "-v"), "may re"),
    recipe("setup_cell", "another wording", lambda n: replace(tagged(n, "hide-input"), "# Setup", "# Set"), "not that"),
    recipe("plain_code", "a function", append("bind(", "def twice(x):\n    return 2 * x"), "def in a cell"),
    recipe("plain_code", "a class", append("bind(", "class A:\n    pass"), "class in a cell"),
    recipe("plain_code", "a loop", append("bind(", "for i in range(3):\n    print(i)"), "a for loop in a cell"),
    recipe("plain_code", "jit", append("bind(", "import jax\nstep = jax.jit(max)"), "jax.jit in a recipe"),
    recipe("plain_code", "a question", append("bind(", "name = input()"), "input() in a cell"),
    recipe("plain_code", "a magic line", append("bind(", "!pip install jax"), "not plain Python"),
    recipe("machine_paths", "a home folder", append("bind(", f"path = '{HOME}'"), "a path of one machine"),
    recipe("machine_paths", "a home folder shown", lambda n: code(n, "bind(").outputs.append(
        type(n)(output_type="stream", name="stdout", text=f"read {HOME}")), "a path of one machine"),
    recipe("secrets", "a token", append("bind(", f"token = 'hf_{'a1B2' * 8}'"), "looks like a Hugging Face token"),
    recipe("secrets", "a password", append("bind(", "db_password = 'correct-horse-battery'"), "looks like a password"),
    recipe("parameters_cell", "a default changed", lambda n: replace(tagged(n, "parameters"), "= 24", "= 25"),
           "max_new_tokens is 25 in the cell and 24 in the configuration"),
    recipe("parameters_cell", "a name misspelt", lambda n: replace(tagged(n, "parameters"), "dtype", "d_type"),
           "lacks dtype"),
    recipe("parameters_cell", "another meaning", lambda n: replace(tagged(n, "parameters"), "# Tokens", "# Words"),
           "a comment is not the meaning"),
    recipe("parameters_cell", "no literal", lambda n: replace(tagged(n, "parameters"), "= 24", "= 4 * 6"),
           "must be a plain value"),
    Mutation("parameters_cell", "no comment", TUTORIAL, lambda n: replace(
        tagged(n, "parameters"), "# Blocks of the small model", ""), "a parameter without a comment"),
    recipe("parameters_table", "a row edited", lambda n: replace(
        next(c for c in n.cells if "parameters: begin" in c.source), "| `24` |", "| `25` |"), "not that of today"),
    recipe("parameters_table", "no table", lambda n: replace(
        next(c for c in n.cells if "parameters: begin" in c.source), "parameters: begin", "begin"), "0 tables"),
    recipe("alt_text", "no alt text", lambda n: tagged(n, "thumbnail").metadata.pop("mystnb"), "without a meaningful"),
    recipe("alt_text", "an empty phrase", lambda n: tagged(n, "thumbnail").metadata.mystnb.image.update(
        alt="A figure, figure, figure and figure."), "without a meaningful"),
    recipe("alt_text", "an overwide picture", lambda n: tagged(n, "thumbnail").outputs[0].metadata["image/png"].update(
        width=1400), "wider than 720"),
    recipe("legible", "a blank picture", lambda n: picture(n).update({"image/png": drawn((255,) * 4, None)}), "blank"),
    recipe("legible", "dark ink on nothing", lambda n: picture(n).update(
        {"image/png": drawn((0, 0, 0, 0), (20, 20, 20, 255))}), "hard to see on a dark page"),
    recipe("legible", "pale ink on nothing", lambda n: picture(n).update(
        {"image/png": drawn((0, 0, 0, 0), (240, 240, 240, 255))}), "hard to see on a light page"),
    recipe("legible", "half a picture", lambda n: picture(n).update({"image/png": picture(n)["image/png"][:400]}),
           "cannot be read"),
    recipe("stamp_current", "code edited", append("bind(", "print(cfg)"), "code was edited after the last run"),
    recipe("stamp_current", "a digit edited", lambda n: code(n, "run.compare()").outputs[0].update(text="273 tensors"),
           "outputs were edited after the last run"),
    recipe("stamp_current", "no stamp", lambda n: n.metadata.pop(STAMP), "no stamp of a clean run"),
    recipe("run_record", "outputs of another run", lambda n: n.metadata[STAMP].update(record="0" * 16), "no record of"),
    Mutation("run_record", "a metric edited", "", in_record(lambda r: r["metrics"].update(x=1)), "no record of"),
    Mutation("run_record", "an old default", "", in_record(lambda r: r["parameters"].update(max_new_tokens=8)),
             "other defaults than today's: max_new_tokens"),
    Mutation("run_record", "a failed check", "", in_record(lambda r: r["checks"][0].update(passed=False)),
             "its checks did not all pass"),
    Mutation("run_record", "half a record", "", in_record(lambda r: r.pop("checks")), "lacks checks"),
    recipe("lint", "an unused import", append("bind(", "import math"), "F401"),
    recipe("lint", "unformatted", append("bind(", "x   =   1"), "not formatted"),
    recipe("lint", "a reminder", text("TO" + "DO: say why"), "is left in a cell"),
    recipe("links", "a dead link", text("See [this](../docs/nothing.md)."), "../docs/nothing.md, which does not exist"),
    recipe("links", "a dead anchor", text("See [this](../README.md#nowhere)."), "no heading makes #nowhere"),
    recipe("links", "a badge to another notebook", text(
        "[Colab](https://colab.research.google.com/github/a/b/blob/main/recipes/sft.ipynb)"), "the badge opens"),
    recipe("links", "a Kaggle badge to another notebook", text(
        "[Kaggle](https://kaggle.com/kernels/welcome?src=https://github.com/a/b/blob/main/recipes/sft.ipynb)"),
        "the badge opens"),
    Mutation("links", "a dead link in a page", "", edit("README.md", "](docs/families.md)", "](docs/family.md)"),
             "docs/family.md, which does not exist"),
    Mutation("registry", "a recipe not listed", "", lambda r: (r / RECIPE).rename(r / "recipes/other.ipynb"),
             "not in the registry"),
    Mutation("registry", "a row without a notebook", "", lambda r: (r / RECIPE).unlink(), "there is no recipes/"),
    Mutation("registry", "not in the README", "", edit("README.md", f"]({RECIPE})", "](recipes)"), "no link to"),
    Mutation("environments", "conda differs", "", edit("environment.yml", "pyarrow>=18.0", "pyarrow>=17.0"),
             "'pyarrow>=17.0' is only in environment.yml"),
    Mutation("environments", "an old Python", "", edit("environment.yml", "python>=3.11", "python>=3.10"), "it lacks"),
    Mutation("environments", "a pin too old", "", edit("constraints.txt", "pydantic==", "pydantic==0."), "pydantic>="),
    Mutation("environments", "a range as pin", "", edit("constraints.txt", "flax==", "flax>="), "is not NAME==VERSION"),
]  # fmt: skip


def copy_tree(folder: Path, guard: str) -> Path:
    """What a guard reads, in a folder of its own."""
    if guard not in IN_TREE:
        for name in (RECIPE, TUTORIAL, "recipes/results/convert-cpu.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        return folder
    for name in ("recipes", "notebooks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_build", "_static"))
    for pattern in ("*.md", "pyproject.toml", "environment.yml", "constraints.txt", "LICENSE"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    return folder


def messages(root: Path, guard: str) -> set[str]:
    """What a guard says of the tree, or of the two notebooks that are mutated."""
    if guard in IN_TREE:
        tree, unreadable = read_tree(root)
        assert not unreadable
        return {str(problem.of(GUARDS[guard])) for problem in GUARDS[guard](tree)}
    read = [read_notebook(root / name, root) for name in (RECIPE, TUTORIAL)]
    books = [book for book in read if isinstance(book, Notebook)]
    found = [problem.of(GUARDS[guard]) for book in books for problem in GUARDS[guard](book)]
    return {str(problem) for problem in [*found, *(book for book in read if not isinstance(book, Notebook))]}


@functools.cache
def messages_before(guard: str) -> set[str]:
    return messages(ROOT, guard)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.guard}-{m.what.replace(' ', '_')}")
def test_a_mutation_is_seen(tmp_path, capsys, mutation):
    root = copy_tree(tmp_path, mutation.guard)
    if mutation.file:
        book = read_notebook(root / mutation.file, root)
        assert isinstance(book, Notebook)
        mutation.change(book.node)
        book.path.write_text(json.dumps(book.node))
    else:
        mutation.change(root)
    new = messages(root, mutation.guard) - messages_before(mutation.guard)
    found = [message for message in sorted(new) if mutation.says in message]
    assert found, f"{mutation.guard} does not say {mutation.says!r}: {new}"
    with capsys.disabled():
        print(f"\n{mutation.guard:<16} | {mutation.what:<28} | {found[0]}", end="")


def test_what_takes_minutes_on_a_cpu_asks_for_a_gpu():
    asking = {name for name, entry in RECIPES.items() if "accelerator" in notebook_metadata(entry)}
    assert asking == {"sft", "pretrain", "grpo", "eval", "dpo", "distill"}
    assert notebook_metadata(RECIPES["sft"])["colab"] == {"gpuType": "T4"}
    assert "accelerator" not in notebook_metadata(None)


def test_the_tree_is_clean():
    found = guards.check_tree(ROOT)
    assert not found, "\n".join(["", *map(str, found)])


def test_every_guard_has_a_mutation():
    assert {mutation.guard for mutation in MUTATIONS} == set(GUARDS)


def test_what_is_no_notebook_is_a_problem_not_a_crash(tmp_path):
    (tmp_path / "recipes").mkdir()
    bare = {"cells": [{"cell_type": "code"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    for name, content in {"empty": "", "list": "[]", "table": "{}", "bare": json.dumps(bare)}.items():
        path = tmp_path / "recipes" / f"{name}.ipynb"
        path.write_text(content)
        (problem,) = guards.check_notebooks([path])
        assert (problem.guard, problem.file) == ("file_format", f"recipes/{name}.ipynb")


def test_smoke_runs_are_resolved(monkeypatch, tmp_path):
    entry = guards.project.RECIPES["convert"]
    monkeypatch.setitem(guards.project.RECIPES, "convert", entry._replace(smoke={"max_new_token": 4}))
    assert any("refused" in message and "max_new_tokens" in message for message in messages(ROOT, "registry"))


def test_the_command_lists_what_is_wrong_and_imports_no_jax(tmp_path):
    broken = tmp_path / "recipes" / "convert.ipynb"
    broken.parent.mkdir()
    broken.write_text((ROOT / RECIPE).read_text().replace('maxkit.bind(\\"convert\\")', 'maxkit.bind(\\"sft\\")'))
    script = "import sys; from maxkit.cli import main; code = main(['check', *sys.argv[1:]]); "
    script += "sys.exit(99 if {'jax', 'flax'} & set(sys.modules) else code)"
    done = subprocess.run([sys.executable, "-c", script, str(broken)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert 'recipes/convert.ipynb, cell 5: the cell after the setup is not cfg = maxkit.bind("convert")' in done.stdout
    done = subprocess.run([sys.executable, "-c", script, "nothing.ipynb"], capture_output=True, text=True)
    assert done.returncode == 2 and "nothing.ipynb does not exist" in done.stderr
