# SPDX-License-Identifier: Apache-2.0
"""Whether a written answer is right: pure functions of two texts, shared by rewards and evaluation. No JAX.

Each takes what a model wrote and the expected answer, both texts, and returns True or False. They never raise on what a
model writes; an expected answer that a verifier cannot use is a ValueError.
"""

import re
from collections.abc import Callable
from decimal import Decimal

Verifier = Callable[[str, str], bool]

# A minus belongs to the number unless something is being subtracted from: "-4", "= -4", but 3 in "7-3" is 3.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def exact(written: str, answer: str) -> bool:
    """Equal, apart from white space at both ends."""
    return written.strip() == answer.strip()


def contains(written: str, answer: str) -> bool:
    """The answer stands in the text as whole words, in upper or lower case.

    Raises:
        ValueError: an empty answer, which every text would contain.
    """
    if not answer.strip():
        raise ValueError("an empty answer is contained in every text")
    return re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", written, re.IGNORECASE) is not None


def last_number(written: str, answer: str) -> bool:
    """The last number of the text equals the answer in value: 1,000 is 1000.0; a text without numbers is wrong.

    Raises:
        ValueError: the answer is not one number.
    """
    wanted = _NUMBER.fullmatch(answer.strip())
    if wanted is None:
        raise ValueError(f"the answer {answer!r} is not a number")
    found = _NUMBER.findall(written)
    return bool(found) and _value(found[-1]) == _value(wanted.group())


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


VERIFIERS: dict[str, Verifier] = {"exact": exact, "contains": contains, "last_number": last_number}
