# SPDX-License-Identifier: Apache-2.0
"""Guards of what cells do: the one setup cell, plain statements, and nothing that belongs to one machine or person."""

import ast
import re
from collections.abc import Iterator

from maxkit.nb.guards.notebook import Notebook, Problem, shown_text
from maxkit.nb.setup_cell import SETUP_CELL

KEPT = ("jax", "jaxlib", "numpy")  # what a hosted machine has loaded or matched to its chip
LOGIC = {
    ast.FunctionDef: "def", ast.AsyncFunctionDef: "def", ast.ClassDef: "class", ast.Lambda: "lambda",
    ast.For: "a for loop", ast.AsyncFor: "a for loop", ast.While: "a while loop", ast.Try: "try",
}  # fmt: skip
CALLS = {
    "input": "nobody answers in a headless run", "exit": "it would end the kernel", "quit": "it would end the kernel",
    "sys.exit": "it would end the kernel", "os.system": "only the setup cell starts programs",
    "subprocess.run": "only the setup cell starts programs", "exec": "show the code", "eval": "show the code",
}  # fmt: skip
HOME = re.compile(r"(?<![\w.:/-])/(?:home|root|Users|tmp|private|var|mnt|srv|opt|work|workspace)/[\w.-]+|[A-Z]:\\\w+")
SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "a Google key": re.compile(r"\bAIza[\w-]{35}"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a key of an API": re.compile(r"\bsk-[\w-]{20,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a password or token": re.compile(r"(?i)\b\w*(?:password|secret|api_?key|token)\w*\s*=\s*[\"'][^\"'\s]{12,}[\"']"),
}


def setup_cell(book: Notebook) -> Iterator[Problem]:
    """The second code cell is the setup cell word for word; it freezes what is preinstalled."""
    code = list(book.cells("code"))
    number, source = (code[1][0], code[1][1].source) if len(code) > 1 else (None, "")
    if source == SETUP_CELL:
        return
    frozen = re.search(r"used \|= \{(.*)\}", source)
    loose = [name for name in KEPT if not frozen or f'"{name}"' not in frozen[1]]
    if "--constraint" not in source or loose:
        wrong = f"the setup cell may replace a preinstalled {', '.join(loose) or 'package'}"
    else:
        wrong = "the setup cell is not that of maxkit/nb/setup_cell.py"
    yield book.problem(number, wrong, "copy SETUP_CELL into the second code cell")


def plain_code(book: Notebook) -> Iterator[Problem]:
    """No logic that belongs into the package, in recipes no jit either; nothing that a headless run cannot do."""
    for number, cell in book.cells("code"):
        if cell.source == SETUP_CELL:
            continue
        try:
            nodes = list(ast.walk(ast.parse(cell.source)))
        except SyntaxError as error:
            yield book.problem(number, f"not plain Python: {error.msg}, line {error.lineno}", "write it without magics")
            continue
        for node in nodes:
            if type(node) in LOGIC:
                yield book.problem(number, f"{LOGIC[type(node)]} in a cell", "move it into the package, and call it")
            elif isinstance(node, ast.Call) and (why := CALLS.get(ast.unparse(node.func))):
                yield book.problem(number, f"{ast.unparse(node.func)}() in a cell: {why}", "leave it out")
            elif book.is_recipe and isinstance(node, ast.Name | ast.Attribute) and _name(node) in ("jit", "pmap"):
                yield book.problem(number, f"{ast.unparse(node)} in a recipe", "train/ compiles the step: call that")


def machine_paths(book: Notebook) -> Iterator[Problem]:
    """No path that exists on one machine only, neither in what is written nor in what is shown."""
    for number, text in _texts(book):
        if found := HOME.search(text):
            yield book.problem(number, f"a path of one machine: {found[0]}", "use a path relative to the run folder")


def secrets(book: Notebook) -> Iterator[Problem]:
    """No token, key or password, neither in what is written nor in what is shown."""
    for number, text in _texts(book):
        for kind, pattern in SECRETS.items():
            if found := pattern.search(text):
                wrong = f"looks like {kind}: {found[0][:8]}..."
                yield book.problem(number, wrong, "revoke it, and read it from the environment")


def _name(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr


def _texts(book: Notebook) -> Iterator[tuple[int, str]]:
    """(cell, text) of everything that can be read: sources, and outputs other than pictures."""
    for number, cell in book.cells():
        html = (output.get("data", {}).get("text/html", "") for output in cell.get("outputs", []))
        yield number, "\n".join([cell.source, shown_text(cell), *html])
