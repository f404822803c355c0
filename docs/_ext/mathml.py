# SPDX-License-Identifier: Apache-2.0
"""Mathematics as MathML, made while building: browsers draw it themselves, without a script or a font from elsewhere.

docutils has the translator. What it does not know stops the build, so no page shows broken mathematics.
"""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

# Spellings of LaTeX that the translator knows under another name only.
SYNONYMS = {
    "dots": "ldots",
    "dotsc": "ldots",
    "dotsb": "cdots",
    "tfrac": "frac",
    "dfrac": "frac",
    "operatorname*": "operatorname",
    "big": "bigl",
    "Big": "Bigl",
    "bigg": "biggl",
    "Bigg": "Biggl",
    "stackrel": "overset",
    "texttt": "mathtt",
}
logger = logging.getLogger(__name__)


def setup(app: Any) -> dict[str, Any]:
    """Register the renderer; `html_math_renderer = "mathml"` chooses it."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def to_mathml(tex: str, *, as_block: bool) -> str:
    """MathML of a formula.

    Raises:
        MathError: it has something that the translator does not know.
    """
    known = re.sub(r"\\([a-zA-Z]+\*?)", lambda found: "\\" + SYNONYMS.get(found[1], found[1]), tex)
    written = latex2mathml.tex2mathml(known, as_block=as_block)
    # Browsers leave no room between a function's name and what it is applied to.
    return written.replace("<mo>&ApplyFunction;</mo>", '<mo rspace="0.17em">&ApplyFunction;</mo>')


def _inline(writer: Any, node: nodes.math) -> None:
    _write(writer, node, "span", as_block=False)


def _block(writer: Any, node: nodes.math_block) -> None:
    _write(writer, node, "div", as_block=True)


def _write(writer: Any, node: nodes.Node, tag: str, *, as_block: bool) -> None:
    try:
        written = to_mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        written = ""
    writer.body.append(f'<{tag} class="math">{written}</{tag}>')
    raise nodes.SkipNode
