# SPDX-License-Identifier: Apache-2.0
"""Expected values that can fail: state them one by one, then check all at once."""

import math
from typing import Any

from maxkit.errors import CheckFailed, UserError
from maxkit.nb.cards import Card, checks_card, expectation, show

# By name, so that a cell that runs again replaces its rows.
_rows: dict[str, dict[str, Any]] = {}


def expect(
    name: str,
    value: Any,
    expected: Any = None,
    tolerance: float | None = None,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> bool:
    """Note whether `value` is `expected` (within `tolerance`), or lies below `at_most` or above `at_least`.

    Nothing is raised here: `check_all` does, after the record of the run is written. NaN passes nothing.

    Raises:
        UserError: no expectation was given, or more than one.
    """
    bounds = {"at most": at_most, "at least": at_least}
    if sum(bound is not None for bound in (expected, *bounds.values())) != 1:
        raise UserError(f"expect({name!r}): give one of expected, at_most and at_least")
    value = plain(value)
    if expected is not None:
        expected = plain(expected)
        passed = _is_close(value, expected, tolerance)
    else:
        kind, bound = next((k, plain(b)) for k, b in bounds.items() if b is not None)
        passed = bool(value <= bound if kind == "at most" else value >= bound)
        expected, tolerance = f"{kind} {show(bound)}", None
    row = {"name": name, "value": value, "expected": expected, "tolerance": tolerance, "passed": passed}
    _rows[name] = row
    return passed


def rows() -> list[dict[str, Any]]:
    """What was expected so far, as `report.json` holds it."""
    return [dict(row) for row in _rows.values()]


def clear() -> None:
    """Forget all rows, for a second run in one kernel."""
    _rows.clear()


def check_all() -> Card:
    """The table of all checks.

    Raises:
        CheckFailed: some failed (the message names them), or there are none.
    """
    card = checks_card(rows())
    failed = [row for row in rows() if not row["passed"]]
    if failed:
        _show(card)
        lines = (f"{row['name']} is {show(row['value'])}, expected {expectation(row)}" for row in failed)
        raise CheckFailed(f"{len(failed)} of {len(_rows)} checks failed: " + "; ".join(lines))
    if not _rows:
        raise CheckFailed("nothing was checked: state what is expected with maxkit.nb.expect(...) first")
    return card


def plain(value: Any) -> Any:
    """A number or text of Python from one of numpy or JAX."""
    return value.item() if hasattr(value, "item") else value


def _is_close(value: Any, expected: Any, tolerance: float | None) -> bool:
    if not isinstance(value, (int, float)) or not isinstance(expected, (int, float)):
        return bool(value == expected)
    return math.isfinite(value) and abs(value - expected) <= (tolerance or 0)


def _show(card: Card) -> None:
    """The table must stand above the error, also where the cell's value is never shown."""
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import display
    except ImportError:
        print(card.text)
        return
    display(card) if get_ipython() is not None else print(card.text)
