# SPDX-License-Identifier: Apache-2.0
"""Guards of the figures: said in words, not empty, and legible on a light and on a dark page."""

import base64
import binascii
import io
import re
from collections.abc import Iterator
from typing import Any

from maxkit.nb.guards.notebook import Notebook, Problem, images

# The two backgrounds of the documentation's theme.
PAGES = {"light": (255, 255, 255), "dark": (18, 18, 18)}
# WCAG 2.2, success criterion 1.4.11: what must be seen of a graphic has a contrast of 3 to 1.
CONTRAST = 3.0
DRAWN = 0.005  # share of a figure's pixels that are ink; a line, axes and labels make 3 to 10 in a hundred
KEPT = 0.6  # share of the ink that must stay legible on the other page
WIDTH = 720  # what a page has room for
ALT = "mystnb.image.alt in the cell's metadata: 20 to 250 characters on what the figure shows"


def alt_text(book: Notebook) -> Iterator[Problem]:
    """Every figure has a text of its own that says what there is to see."""
    seen = set()
    for number, cell in book.cells("code"):
        shown = images(cell)
        if not shown:
            continue
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        words = re.findall(r"[^\W\d_]{2,}", alt)
        if not 20 <= len(alt) <= 250 or len(set(words)) < 5 or re.search(r"\.(png|svg|jpg)\b", alt):
            yield book.problem(number, f"a figure without a meaningful alt text ({alt!r})", f"write {ALT}")
        if alt in seen:
            yield book.problem(number, "two figures with one alt text", f"write {ALT}")
        seen.add(alt)
        for output in shown:
            shown_as = output.get("metadata", {}).get("image/png", {})
            if not shown_as.get("alt") or not 0 < shown_as.get("width", 0) <= WIDTH:
                wrong = f"a picture that is no PNG, has no alt text, or is wider than {WIDTH} points"
                yield book.problem(number, wrong, "draw it with maxkit.nb's figures")


def legible(book: Notebook) -> Iterator[Problem]:
    """Every picture shows something, and shows it on both pages."""
    for number, cell in book.cells("code"):
        for output in images(cell):
            try:
                ink = ink_on_pages(base64.b64decode(output.data.get("image/png", ""), validate=True))
            except (binascii.Error, OSError) as error:
                yield book.problem(number, f"a picture that cannot be read: {error}", "run maxkit refresh")
                continue
            most = max(ink.values())
            if most < DRAWN:
                wrong = f"a blank picture: {most:.2%} of it differ from its background"
                yield book.problem(number, wrong, "draw something, or show no figure")
                continue
            for page, share in ink.items():
                if share < KEPT * most:
                    wrong = f"a picture that is hard to see on a {page} page: {share / most:.0%} of its ink are left"
                    yield book.problem(number, wrong, "draw on an opaque card, as maxkit.nb's figures do")


def ink_on_pages(png: bytes) -> dict[str, float]:
    """{page: share of the pixels that stand out from the background} of a picture laid on each page."""
    from PIL import Image  # matplotlib brings it

    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    picture.thumbnail((800, 800))
    return {page: _ink(Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture))
            for page, colour in PAGES.items()}  # fmt: skip


def _ink(picture: Any) -> float:
    """Share of the pixels with enough contrast to the most frequent colour."""
    import numpy as np

    packed = np.asarray(picture.convert("RGB")).astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    values, counts = np.unique(packed, return_counts=True)
    colours = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=-1)
    linear = np.where(colours <= 10, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    light = linear @ np.array([0.2126, 0.7152, 0.0722]) + 0.05  # WCAG's relative luminance, and its offset
    ground = light[counts.argmax()]
    contrast = np.maximum(light, ground) / np.minimum(light, ground)
    return float(counts[contrast >= CONTRAST].sum() / counts.sum())
