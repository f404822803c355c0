# SPDX-License-Identifier: Apache-2.0
"""A table with a column per thing and its rows in sections: as HTML like the other cards, and as text of any width."""

from collections.abc import Sequence
from typing import NamedTuple

from maxkit.nb.cards import BAD, CARD, GOOD, GREY, LINE, SHADE, escape, tinted

GAP = "  "
SHORT = 14  # characters of a cell that stays on one line
MARKS = {"✓": GOOD, "✗": BAD}


class Row(NamedTuple):
    """A label and a cell per column; `best` is the column whose cell is set in bold, if any."""

    label: str
    cells: Sequence[str]
    best: int | None = None


class Section(NamedTuple):
    """Rows under a heading."""

    title: str
    rows: Sequence[Row]


def as_html(columns: Sequence[str], sections: Sequence[Section], *, heads: Sequence[str] = ()) -> str:
    """The table as HTML. `heads` are the columns' headings as HTML, by default their names.

    ✓ and ✗ are coloured wherever they stand. The labels are row headings, which a page may keep in view.
    """
    pad = "padding:0.22em 0.8em;vertical-align:top;background:none;color:inherit;font-weight:400"
    heads = heads or [escape(name) for name in columns]
    top = f'<td style="{pad};border-bottom:{LINE}"></td>' + "".join(
        f'<th scope="col" style="{pad};text-align:right;border-bottom:{LINE};font-weight:600{_whole(name)}">{head}</th>'
        for name, head in zip(columns, heads, strict=True)
    )
    body = ""
    for section in (section for section in sections if section.rows):
        body += (
            f'<tbody><tr style="background:none"><th scope="colgroup" colspan="{len(columns) + 1}" style="{pad};'
            f'text-align:left;font-weight:600;padding-top:0.9em;border-bottom:1px solid {GREY}">'
            f"{escape(section.title)}</th></tr>"
        )
        for i, row in enumerate(section.rows):
            cells = "".join(
                f'<td style="{pad};text-align:right;font-variant-numeric:tabular-nums'
                f'{_whole(cell)}{";font-weight:700" if row.best == j else ""}">'
                f"{_marked(cell)}</td>"
                for j, cell in enumerate(row.cells)
            )
            body += (
                f'<tr style="background:{SHADE if i % 2 else "none"}">'
                f'<th scope="row" style="{pad};text-align:left">{escape(row.label)}</th>{cells}</tr>'
            )
        body += "</tbody>"
    return (
        f'<div style="{CARD};max-width:none"><table style="border-collapse:collapse;border:none;margin:0">'
        f'<thead><tr style="background:none">{top}</tr></thead>{body}</table></div>'
    )


def as_text(columns: Sequence[str], sections: Sequence[Section], width: int = 100) -> str:
    """The table as text; where it is wider than `width`, the columns go on below, with the labels again."""
    sections = [section for section in sections if section.rows]
    labels = max((len(row.label) + len(GAP) for s in sections for row in s.rows), default=0)
    labels = max([labels, *(len(s.title) for s in sections)])
    widths = [
        max([len(name), *(len(row.cells[j]) for s in sections for row in s.rows)]) for j, name in enumerate(columns)
    ]
    return "\n\n".join(_block(columns, sections, labels, widths, some) for some in _fitting(widths, width - labels))


def _fitting(widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns by blocks: as many as there is room for, at least one."""
    blocks: list[list[int]] = []
    used = 0
    for j, width in enumerate(widths):
        if not blocks or used + len(GAP) + width > room:
            blocks.append([])
            used = 0
        blocks[-1].append(j)
        used += len(GAP) + width
    return blocks


def _block(
    columns: Sequence[str], sections: Sequence[Section], labels: int, widths: Sequence[int], some: Sequence[int]
) -> str:
    def line(label: str, cells: Sequence[str]) -> str:
        return GAP.join([f"{label:<{labels}}", *(f"{cells[j]:>{widths[j]}}" for j in some)]).rstrip()

    lines = [line("", columns), line("-" * labels, ["-" * width for width in widths])]
    for section in sections:
        rows = [row for row in section.rows if any(row.cells[j] for j in some) or not any(row.cells)]
        lines += [section.title] * bool(rows)
        lines += [line(GAP + row.label, row.cells) for row in rows]
    return "\n".join(lines)


def _whole(text: str) -> str:
    return ";white-space:nowrap" if len(text) <= SHORT else ""


def _marked(cell: str) -> str:
    shown = escape(cell)
    for mark, colour in MARKS.items():
        shown = shown.replace(mark, f'<span style="{tinted(colour)};font-weight:600">{mark}</span>')
    return shown
