# SPDX-License-Identifier: Apache-2.0
"""What programs read of the site: an Atom feed of the changelog, and llms.txt with the pages as plain text."""

import datetime
import html
import re
import subprocess
from pathlib import Path
from typing import Any

from entries import ROOT, entries
from markdown_it import MarkdownIt
from notebook_pages import write_if_changed

CHANGELOG = ROOT / "CHANGELOG.md"
FEED = "changelog.xml"


def write_feed(site: Path) -> None:
    """`changelog.xml`: one entry for each version, the unreleased one dated by the changelog's last commit."""
    items = [_entry(version, date, body) for version, date, body in versions(CHANGELOG.read_text(encoding="utf-8"))]
    feed = (
        '<?xml version="1.0" encoding="utf-8"?>\n<feed xmlns="http://www.w3.org/2005/Atom">\n'
        "<title>maxkit: changes</title><id>urn:maxkit:changelog</id><author><name>the maxkit authors</name></author>\n"
        f'<link rel="self" href="{FEED}"/><link href="changelog.html"/>\n'
        f"<updated>{last_change()}</updated>\n" + "\n".join(items) + "\n</feed>\n"
    )
    write_if_changed(site / FEED, feed)


def versions(text: str) -> list[tuple[str, str, str]]:
    """(version, its date or "", Markdown) for each `## [version] - date` of a changelog."""
    parts = re.split(r"^## \[([^\]]+)\](?: - (\S+))?\s*$", text, flags=re.M)
    return [(parts[i], parts[i + 1] or "", parts[i + 2].strip()) for i in range(1, len(parts), 3)]


def last_change() -> str:
    """When the changelog was last committed, else when it was last written."""
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%cI", "--", CHANGELOG.name]
    try:
        committed = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        committed = ""
    written = datetime.datetime.fromtimestamp(CHANGELOG.stat().st_mtime, datetime.UTC)
    return committed or written.isoformat(timespec="seconds")


def _entry(version: str, date: str, body: str) -> str:
    content = html.escape(MarkdownIt("commonmark").render(body))
    return (
        f"<entry><title>{html.escape(version)}</title><id>urn:maxkit:changelog:{html.escape(version)}</id>"
        f'<link href="changelog.html"/><updated>{f"{date}T00:00:00Z" if date else last_change()}</updated>'
        f'<content type="html">{content}</content></entry>'
    )


def write_llms(site: Path, env: Any) -> None:
    """`llms.txt`, an index for language models, and the Markdown of each page beside it."""
    lines = [
        "# maxkit",
        "",
        "> Train language models in JAX, from notebooks that run the same on CPU, GPU and TPU.",
        "",
        "Run a recipe with `maxkit run RECIPE -p NAME=VALUE`; `maxkit run RECIPE --help` lists its parameters.",
    ]
    for kind, heading in (("recipe", "Recipes"), ("tutorial", "Tutorials")):
        found = [entry for entry in entries() if entry.kind == kind]
        lines += ["", f"## {heading}", "", *(f"- [{e.title}]({e.page}.py): {e.summary}" for e in found)]
    pages = {name: Path(env.doc2path(name)) for name in sorted(env.found_docs)}
    texts = {name: path for name, path in pages.items() if path.suffix == ".md"}
    for heading, designs in (("Guides", False), ("Design", True)):
        chosen = [name for name in texts if name.startswith("design/") == designs]
        lines += ["", f"## {heading}", "", *(f"- [{env.titles[name].astext()}]({name}.md)" for name in chosen)]
    for name, path in texts.items():
        write_if_changed(site / f"{name}.md", path.read_bytes())
    write_if_changed(site / "llms.txt", "\n".join(lines) + "\n")
