# SPDX-License-Identifier: Apache-2.0
"""Guards of what belongs together: recipes and their registry, the lists that readers see, the environments."""

import re
import tomllib
from collections.abc import Iterator

import yaml

from maxkit.config import RECIPES, resolve
from maxkit.errors import UserError
from maxkit.nb.guards.notebook import Problem, Tree

REGISTRY = "maxkit/config.py"


def registry(tree: Tree) -> Iterator[Problem]:
    """Every recipe is in the registry, every row has its notebook and a smoke run; readers find all of them."""
    held = {book.path.name: book for book in tree.notebooks if book.is_recipe}
    readme = (tree.root / "README.md").read_text(encoding="utf-8")
    documents = [p for p in tree.documents if p.parent.name == "docs"]
    text = "".join(path.read_text(encoding="utf-8") for path in documents)
    for name, book in held.items():
        if book.entry is None:
            yield book.problem(None, "not in the registry", f"add it to RECIPES in {REGISTRY}")
        if not re.search(rf"maxkit run {book.path.stem}\b|recipes/{re.escape(name)}", text):
            yield Problem("docs", f"no page mentions recipes/{name}", f"write recipes/{name} or maxkit run there")
    for book in tree.notebooks:
        if f"]({book.name})" not in readme:
            yield Problem("README.md", f"no link to {book.name}", "add it to the list")
    for name, entry in RECIPES.items():
        if entry.notebook not in held:
            yield Problem(REGISTRY, f"RECIPES has {name!r}, but there is no recipes/{entry.notebook}", "add it")
        if not entry.title or not entry.result or not entry.smoke:
            yield Problem(REGISTRY, f"recipe {name!r} lacks a title, a result or a smoke run", "fill in its row")
        try:
            resolve(entry.config, environ={}, given={key: (value, "keyword") for key, value in entry.smoke.items()})
        except UserError as error:
            yield Problem(REGISTRY, f"the smoke run of recipe {name!r} is refused: {error}", "correct its row")


def environments(tree: Tree) -> Iterator[Problem]:
    """environment.yml is the `notebooks` extra, and every requirement that make setup installs has a fitting pin."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((tree.root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    conda = yaml.safe_load((tree.root / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    pip = [line for entry in conda if isinstance(entry, dict) for line in entry["pip"]]
    for line in sorted(set(pip) ^ set(extras["notebooks"])):
        where = "environment.yml" if line in pip else "the notebooks extra of pyproject.toml"
        yield Problem("environment.yml", f"{line!r} is only in {where}", "write the same in both")
    if (python := f"python{project['requires-python']}") not in conda:
        yield Problem("environment.yml", f"it lacks {python!r}, as in pyproject.toml", "add it")
    pins = {}
    for line in (tree.root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, exact, version = line.partition("==")
        pins[canonicalize_name(name)] = version
        if not exact or not re.fullmatch(r"[\w.+!]+", version):
            yield Problem("constraints.txt", f"{line!r} is not NAME==VERSION", "pin it exactly")
    installed = [project["dependencies"], *(extras[name] for name in ("notebooks", "post-train", "docs", "dev"))]
    for requirement in (Requirement(text) for group in installed for text in group):
        pin = pins.get(canonicalize_name(requirement.name))
        if not pin or not requirement.specifier.contains(pin):
            yield Problem("constraints.txt", f"{requirement} is pinned to {pin}", "renew the pins (CONTRIBUTING.md)")
