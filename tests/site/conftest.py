# SPDX-License-Identifier: Apache-2.0
"""The site, built once; a server for it; a browser, where there is one."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
sys.path.insert(0, str(ROOT / "docs" / "_ext"))


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` does it; the notebooks' links are those of a public repository."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", out / ".doctrees"]
    environment = os.environ | {"GITHUB_REPOSITORY": "example/maxkit"}
    done = subprocess.run([*command, ROOT / "docs", out / "html"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return out / "html"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        """Nothing: the tests say what was asked for in vain."""


@pytest.fixture(scope="session")
def address(site) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        assert not os.environ.get("MAXKIT__REQUIRE_BROWSER"), "no Chromium found"
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, address):
    """`open_page(path, scheme=, width=)`: a page in a context of its own, watched.

    `page.loaded` are the addresses it asked for, `page.complaints` errors and warnings of its console, and requests
    that failed.
    """
    contexts = []

    def opened(path: str, *, scheme: str = "light", width: int = 1280):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.loaded, page.complaints = [], []
        page.on("request", lambda request: page.loaded.append(request.url))
        page.on("requestfailed", lambda request: page.complaints.append(f"failed: {request.url}"))
        page.on("pageerror", lambda error: page.complaints.append(f"error: {error}"))
        page.on("console", lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.goto(address + path)
        return page

    yield opened
    for context in contexts:
        context.close()
