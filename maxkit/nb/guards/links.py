# SPDX-License-Identifier: Apache-2.0
"""Guard of links: what notebooks and documents point at inside the tree exists, headings included.

Nothing is fetched. Of addresses elsewhere only those that name a notebook of a repository (Colab, Kaggle, GitHub) are
looked at: the path in them must exist here.
"""

import functools
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from maxkit.errors import UserError
from maxkit.nb.guards.notebook import Notebook, Problem, Tree, read_notebook

HOSTED = re.compile(r"/blob/[^/]+/([^?#]+\.ipynb)")
FIXED = re.compile(r"""(?:\b(?:id|name)=["']([\w.-]+)["'])|^\(([\w-]+)\)=""", re.M)
ATTRIBUTE = re.compile(r"""\b(?:href|src)=["']([^"']+)["']""")


class Markdown(NamedTuple):
    """What a text links to, its headings (level, text), and the anchors that it sets by hand."""

    targets: tuple[str, ...]
    headings: tuple[tuple[int, str], ...]
    anchors: frozenset[str]


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Markdown:
    """The links and headings of a Markdown text; what stands in code is neither.

    Raises:
        UserError: the parser is not installed.
    """
    try:
        from markdown_it import MarkdownIt
    except ModuleNotFoundError:
        raise UserError("maxkit check reads Markdown with markdown-it-py: make setup installs it") from None
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    targets, headings = [], []
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            inline = tokens[i + 1].children or []
            headings.append(
                (int(token.tag[1]), "".join(c.content for c in inline if c.type in ("text", "code_inline")))
            )
        for part in [token, *(token.children or [])]:
            if part.type in ("link_open", "image"):
                targets.append(str(part.attrGet("href") or part.attrGet("src") or ""))
            elif part.type in ("html_block", "html_inline"):
                targets += ATTRIBUTE.findall(part.content)
    fixed = frozenset(name for pair in FIXED.findall(text) for name in pair if name)
    return Markdown(tuple(targets), tuple(headings), fixed)


def links(tree: Tree) -> Iterator[Problem]:
    """Relative links lead to a file and a heading of it; badges to a notebook of this tree, in a notebook to itself."""
    for book in tree.notebooks:
        for number, cell in book.cells("markdown"):
            for target in parse(cell.source).targets:
                if wrong := _wrong(tree.root, book.path, target):
                    yield book.problem(number, wrong, "correct the link")
                hosted = HOSTED.search(target)
                if hosted and ("colab" in target or "kaggle" in target) and hosted[1] != book.name:
                    yield book.problem(number, f"the badge opens {hosted[1]}", f"let it open {book.name}")
    for path in tree.documents:
        name = path.relative_to(tree.root).as_posix()
        for target in parse(path.read_text(encoding="utf-8")).targets:
            if wrong := _wrong(tree.root, path, target):
                yield Problem(name, wrong, "correct the link")


def _wrong(root: Path, source: Path, target: str) -> str | None:
    """What is wrong with a link, None where nothing is."""
    url = urllib.parse.urlsplit(target)
    if url.scheme in ("http", "https"):
        hosted = HOSTED.search(target)
        if not url.netloc:
            return f"the address {target} has no host"
        if hosted and ("colab" in url.netloc or "kaggle" in url.netloc) and not (root / hosted[1]).is_file():
            return f"the link to {hosted[1]}, which does not exist"
        return None
    if url.scheme:
        return None if url.scheme == "mailto" else f"the address {target} is neither relative nor on the web"
    path = source.parent / urllib.parse.unquote(url.path) if url.path else source
    if not path.exists() and path.with_name(f"{path.name}.md").exists():
        path = path.with_name(f"{path.name}.md")  # as Sphinx has it
    if not path.exists():
        return f"the link to {target}, which does not exist"
    if url.fragment and url.fragment not in _anchors(path, root):
        return f"the link to {target}: no heading makes #{url.fragment}"
    return None


def _anchors(path: Path, root: Path) -> frozenset[str]:
    """The anchors of a document or notebook, as GitHub and MyST make them from headings."""
    if path.suffix == ".ipynb":
        book = read_notebook(path.resolve(), root.resolve())
        texts = [cell.source for _, cell in book.cells("markdown")] if isinstance(book, Notebook) else []
    else:
        texts = [path.read_text(encoding="utf-8")] if path.suffix == ".md" else []
    found: list[str] = []
    for markdown in map(parse, texts):
        found += markdown.anchors
        for _, heading in markdown.headings:
            slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return frozenset(found)
