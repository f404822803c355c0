# SPDX-License-Identifier: Apache-2.0
"""Put a built site into its folder among those of other versions, and write the page that leads to them.

    python docs/publish.py docs/_build/html SITE refs/heads/main      into SITE/latest
    python docs/publish.py docs/_build/html SITE refs/tags/v1.2.3     into SITE/v1.2

SITE holds what is served: one folder a version, `versions.html` with a link to each, and `index.html`, which leads to
the main branch. Whatever a folder held before is replaced. Standard library only.
"""

import re
import shutil
import sys
from pathlib import Path

LATEST = "latest"
VERSION = re.compile(r"v(\d+)\.(\d+)")
STYLE = (
    ":root{color-scheme:light dark}li{margin:.4rem 0}"
    "body{font:1.1rem/1.6 system-ui,sans-serif;max-width:40rem;margin:12vh auto;padding:0 1.2rem}"
)


def folder_of(ref: str) -> str:
    """The folder of a git ref: "latest" for the main branch, "v1.2" for the tag v1.2.3.

    Raises:
        SystemExit: neither.
    """
    if ref == "refs/heads/main":
        return LATEST
    if found := re.fullmatch(r"refs/tags/(v\d+\.\d+)\.\d+", ref):
        return found[1]
    raise SystemExit(f"{ref!r} is neither refs/heads/main nor a tag such as refs/tags/v1.2.3: nothing is published")


def versions(site: Path) -> list[str]:
    """The folders of a site: the main branch first, then the newest version first."""
    found = [folder.name for folder in site.iterdir() if folder.is_dir() and VERSION.fullmatch(folder.name)]
    newest = sorted(found, key=lambda name: tuple(map(int, VERSION.fullmatch(name).groups())), reverse=True)
    return [LATEST] * (site / LATEST).is_dir() + newest


def publish(built: Path, site: Path, ref: str) -> Path:
    """Copy `built` into its folder of `site`, and write the pages at the top. Returns the folder."""
    target = site / folder_of(ref)
    if not (built / "index.html").is_file():
        raise SystemExit(f"{built} holds no site: make docs")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(built, target, ignore=shutil.ignore_patterns(".doctrees", ".buildinfo"))
    (site / ".nojekyll").touch()  # or folders that begin with _ would not be served
    names = versions(site)
    first = names[0]
    rows = "".join(
        f'<li><a href="{name}/index.html">{name}</a>{" (main branch)" if name == LATEST else ""}</li>' for name in names
    )
    _page(site / "versions.html", "maxkit: versions of this site", f"<h1>Versions</h1><ul>{rows}</ul>")
    refresh = f'<meta http-equiv="refresh" content="0; url={first}/index.html">'
    _page(site / "index.html", "maxkit", f'<p><a href="{first}/index.html">maxkit</a></p>', refresh)
    return target


def _page(path: Path, title: str, body: str, head: str = "") -> None:
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    path.write_text(
        f'<!doctype html><html lang="en"><head>{meta}{head}<title>{title}</title><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    print(publish(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
