# SPDX-License-Identifier: Apache-2.0
"""The documentation builds without a warning, and its pages load nothing from the network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run([*command, ROOT / "docs", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_pages_load_nothing_from_elsewhere(html):
    loads = re.compile(r'<(?:script|img|iframe|link)\b[^>]*?(?:src|href)="(?:https?:)?//[^"]*"')
    pages = list(html.rglob("*.html"))
    assert len(pages) > 3
    found = [f"{page.name}: {tag}" for page in pages for tag in loads.findall(page.read_text())]
    assert not found


def test_every_page_has_a_title(html):
    for name in ("index.html", "installation.html"):
        assert re.search(r"<title>[^<]+</title>", (html / name).read_text())
