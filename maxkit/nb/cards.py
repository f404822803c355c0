# SPDX-License-Identifier: Apache-2.0
"""Cards and tables for notebooks: HTML that is legible on light and dark pages, and the same as plain text.

Colours are translucent greys over whatever the page has, and text keeps the page's own colour, so there is
no theme to detect. A class would be stripped by GitHub's notebook viewer; inline styles degrade to a plain
table there.
"""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

GREY = "rgba(128,128,128,0.35)"
LINE = f"1px solid {GREY}"
SHADE = "rgba(128,128,128,0.12)"
# No colour has a contrast of 4.5 : 1 (WCAG 2.2, AA) on white and on #121212 at once: half of the page's own text
# colour is mixed in, by `tinted`. The words beside them carry the meaning too.
GOOD, BAD = "#2aa64a", "#f46a57"
CARD = f"border:{LINE};border-radius:8px;padding:0.7em 1em;margin:0.4em 0;max-width:52em;overflow-x:auto"


@dataclasses.dataclass(frozen=True)
class Card:
    """Something a notebook shows: `html` in a page, `text` where there is none."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def table(
    rows: Sequence[Mapping[str, Any]], *, title: str = "", caption: str = "", columns: Sequence[str] = ()
) -> Card:
    """A table of `rows`: numbers are right-aligned, booleans read yes and no, None is a dash.

    `columns` chooses and orders; without it they are those of all rows in order of appearance.
    """
    names = list(columns) or list(dict.fromkeys(name for row in rows for name in row))
    cells = [[show(row.get(name)) for name in names] for row in rows]
    right = [
        any(_is_number(row.get(n)) for row in rows)
        and all(_is_number(row.get(n)) or row.get(n) is None for row in rows)
        for n in names
    ]
    return Card(_table_html(names, cells, right, title, caption), _table_text(names, cells, right, title, caption))


def hardware_card(facts: Mapping[str, Any], *, title: str = "This machine", notes: Sequence[str] = ()) -> Card:
    """A card of `facts` in their order, for example platform, devices, memory, mesh, dtype, estimated time.

    A value may be a sequence: its items stand under each other. `notes` are sentences below, such as what a
    mesh could not shard.
    """
    values = {k: [show(v) for v in x] if isinstance(x, (list, tuple)) else [show(x)] for k, x in facts.items()}
    width = max(map(len, values), default=0)
    lines = [title, "-" * len(title)]
    for name, items in values.items():
        lines += [f"{name if i == 0 else '':<{width}}  {item}" for i, item in enumerate(items)]
    lines += [f"note: {note}" for note in notes]
    body = "".join(
        f'<div style="display:flex;gap:1em;padding:0.15em 0">'
        f'<div style="min-width:11em;opacity:0.75">{escape(k)}</div>'
        f'<div style="font-variant-numeric:tabular-nums">{"<br>".join(map(escape, v))}</div></div>'
        for k, v in values.items()
    )
    foot = "".join(
        f'<div style="margin-top:0.5em;border-left:3px solid {GREY};padding-left:0.6em">{escape(n)}</div>'
        for n in notes
    )
    return Card(f'<div style="{CARD}"><div style="{_HEAD}">{escape(title)}</div>{body}{foot}</div>', "\n".join(lines))


def text_card(segments: Sequence[Sequence[tuple[str, bool]]], *, title: str = "") -> Card:
    """Pieces of text, the marked ones bold and shaded (in plain text between » and «); a rule between segments."""
    parts, lines = [], [title] if title else []
    for pieces in segments:
        runs: list[tuple[str, bool]] = []
        for text, marked in pieces:
            if runs and runs[-1][1] == marked:
                runs[-1] = (runs[-1][0] + text, marked)
            else:
                runs.append((text, marked))
        bold = f"font-weight:700;background:{SHADE};border-bottom:2px solid {GREY}"
        parts.append("".join(f'<span style="{bold}">{escape(t)}</span>' if m else escape(t) for t, m in runs))
        lines.append("".join(f"»{t}«" if m else t for t, m in runs))
    head = f'<div style="{_HEAD}">{escape(title)}</div>' if title else ""
    rule = f'<div style="border-top:1px dashed {GREY};margin:0.4em 0"></div>'
    body = rule.join(f'<div style="font-family:monospace;white-space:pre-wrap">{part}</div>' for part in parts)
    return Card(f'<div style="{CARD}">{head}{body}</div>', "\n".join(lines))


def parameters_card(recipe: str, rows: Sequence[Mapping[str, Any]], num_defaults: int) -> Card:
    """What differs from a recipe's defaults, and where it came from."""
    rest = f"{num_defaults} other parameters have their defaults"
    if not rows:
        text = f"{recipe}: all {num_defaults} parameters have their defaults"
        return Card(f'<div style="{CARD}">{escape(text)}</div>', text)
    return table(rows, title=f"{recipe}: parameters that were given", caption=rest)


def checks_card(rows: Sequence[Mapping[str, Any]]) -> Card:
    """The rows of `expect`, with a verdict each."""
    failed = sum(not row["passed"] for row in rows)
    title = f"{failed} of {len(rows)} checks failed" if failed else f"all {len(rows)} checks passed"
    shown = [
        {
            "check": row["name"],
            "value": row["value"],
            "expected": expectation(row),
            "verdict": "✓ passed" if row["passed"] else "✗ FAILED",
        }
        for row in rows
    ]
    card = table(shown, title=title)
    page = card.html
    for verdict, colour in (("✓ passed", GOOD), ("✗ FAILED", BAD)):
        page = page.replace(verdict, f'<span style="{tinted(colour)};font-weight:600">{verdict}</span>')
    return Card(page, card.text)


def expectation(row: Mapping[str, Any]) -> str:
    """What a check expects, in words: "2.1 ± 0.05", "at most 3", "yes"."""
    return show(row["expected"]) + (f" ± {show(row['tolerance'])}" if row["tolerance"] else "")


def tinted(colour: str) -> str:
    """The style of text that is half in `colour`, half in the page's text colour: as legible as the page's text.

    Browsers older than 2023 do not know how to mix and take the plain colour.
    """
    return f"color:{colour};color:color-mix(in srgb,{colour},currentColor)"


def show(value: Any) -> str:
    """A value for people: at most six significant digits, thousands separated, yes and no, - for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{int(value):,}" if value.is_integer() and 1e3 <= abs(value) < 1e15 else f"{value:.6g}"
    return str(value)


_HEAD = "font-weight:600;margin-bottom:0.4em"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def escape(text: str) -> str:
    """Text as HTML; a dollar sign would start mathematics in a notebook."""
    return html.escape(text).replace("$", "&#36;").replace("\n", "<br>")


def _table_html(
    names: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool], title: str, caption: str
) -> str:
    sides = ["right" if r else "left" for r in right]
    pad = "padding:0.25em 0.9em;vertical-align:top;background:none;color:inherit"
    head = "".join(
        f'<th scope="col" style="{pad};text-align:{s};border-bottom:{LINE};font-weight:600">{escape(n)}</th>'
        for n, s in zip(names, sides, strict=True)
    )
    body = ""
    for i, row in enumerate(cells):
        columns = "".join(
            f'<td style="{pad};text-align:{s};font-variant-numeric:tabular-nums">{escape(c)}</td>'
            for c, s in zip(row, sides, strict=True)
        )
        body += f'<tr style="background:{SHADE if i % 2 else "none"}">{columns}</tr>'
    top = f'<div style="{_HEAD}">{escape(title)}</div>' if title else ""
    foot = f'<div style="opacity:0.75;margin-top:0.4em">{escape(caption)}</div>' if caption else ""
    return (
        f'<div style="{CARD}">{top}<table style="border-collapse:collapse;border:none;margin:0">'
        f'<thead><tr style="background:none">{head}</tr></thead><tbody>{body}</tbody></table>{foot}</div>'
    )


def _table_text(
    names: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool], title: str, caption: str
) -> str:
    # A value of several lines (a generated answer) keeps its row: the lines stand under each other.
    widths = [max([len(n)] + [len(line) for row in cells for line in row[i].split("\n")]) for i, n in enumerate(names)]
    lines = [title] if title else []
    for row in [list(names), ["-" * w for w in widths], *cells]:
        split = [cell.split("\n") for cell in row]
        for level in range(max(map(len, split), default=0)):
            parts = [cell[level] if level < len(cell) else "" for cell in split]
            aligned = (f"{p:>{w}}" if r else f"{p:<{w}}" for p, w, r in zip(parts, widths, right, strict=True))
            lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines + ([caption] if caption else []))
