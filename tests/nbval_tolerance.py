# SPDX-License-Identifier: Apache-2.0
"""A plugin for nbval that lets numbers differ a little: machines round differently in the last digits.

    python -m pytest --nbval --nbval-current-env -p tests.nbval_tolerance notebooks/decoder_tour.ipynb

Whole numbers must be equal. A number with a fraction or an exponent may be off by `RELATIVE` of itself. How wide a
column is depends on the digits in it, so runs of blanks and of rules count as one. What colour a text has is not
compared: a cell promises what it says.
"""

import math
import re

from nbval.plugin import IPyNbCell

RELATIVE = 1e-3  # outputs show three or four digits
ABSOLUTE = 1e-6  # of what is zero but for rounding
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")
FRACTION = re.compile(r"[.e]")
COLOUR = re.compile(r"(?<=[\";])color:(?:#[0-9a-f]{6}|color-mix\([^;\"]*\));?")


class Tolerant(str):
    """A text that equals another with the same words and close numbers."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and same(str(self), str(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def same(one: str, other: str) -> bool:
    """Whether two outputs say the same, apart from rounding."""
    one, other = (COLOUR.sub("", text) for text in (one, other))
    return _words(one) == _words(other) and all(map(_close, NUMBER.findall(one), NUMBER.findall(other)))


def _words(text: str) -> str:
    """The text with a mark for each number."""
    return re.sub(r"[ \t]+|-{2,}", " ", NUMBER.sub("#", text)).replace("  ", " ")


def _close(one: str, other: str) -> bool:
    if not FRACTION.search(one + other):
        return one == other
    a, b = (float(text.replace(",", "")) for text in (one, other))
    return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


_sanitize = IPyNbCell.sanitize
IPyNbCell.sanitize = lambda self, text: Tolerant(done) if isinstance(done := _sanitize(self, text), str) else done
