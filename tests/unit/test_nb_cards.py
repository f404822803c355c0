# SPDX-License-Identifier: Apache-2.0
"""Cards and tables: the same content as HTML and as text, and nothing that a theme could make unreadable."""

import html.parser
import re

import pytest

from maxkit.nb import cards
from maxkit.nb.cards import BAD, GOOD, Card, checks_card, hardware_card, parameters_card, show, table, tinted

ROWS = [{"name": "a<b", "loss": 1.23456789, "ok": True}, {"name": "x\ny", "loss": None, "ok": False}]
ALL = [
    table(ROWS, title="T & U", caption="c"),
    hardware_card({"devices": ["cpu:0", "cpu:1"], "memory": "8 GiB"}, notes=["K=3 is left unsharded"]),
    parameters_card("sft", [{"parameter": "steps", "value": 3}], 4),
    checks_card([{"name": "n", "value": 1.0, "expected": 1.0, "tolerance": 0.1, "passed": True}]),
]


class Balance(html.parser.HTMLParser):
    """Fails where a tag is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("card", ALL)
def test_html_is_well_formed_and_brings_no_opaque_colours(card: Card) -> None:
    parser = Balance()
    parser.feed(card.html)
    assert not parser.open
    assert "<script" not in card.html and "class=" not in card.html and "http" not in card.html
    # Text keeps the page's colour and backgrounds let the page through, in light and dark.
    colours = re.findall(r"(?:background|(?<!-)color):([^;\"]+)", card.html)
    verdicts = {c for colour in (GOOD, BAD) for c in re.findall(r"color:([^;]+)", tinted(colour))}
    assert all(c in verdicts | {"none", "inherit"} or c.startswith("rgba(128,128,128") for c in colours), colours


@pytest.mark.parametrize("card", ALL)
def test_text_and_html_say_the_same_words(card: Card) -> None:
    parser = Balance()
    parser.feed(card.html)
    words = {w for w in re.findall(r"\w+", card.text) if w != "note"}
    assert words <= set(re.findall(r"\w+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", parser.text))) | set(
        w for part in re.split(r"<[^>]+>", card.html) for w in re.findall(r"\w+", part)
    )
    assert repr(card) == card.text and card._repr_html_() == card.html


def contrast(foreground: str, background: str) -> float:
    """WCAG 2 contrast of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(foreground), luminance(background)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def blend(top: str, share: float, bottom: str) -> str:
    """`share` of the colour `top`, the rest `bottom`."""
    pairs = ((int(top[i : i + 2], 16), int(bottom[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


# Page and text of the documentation, of JupyterLab and of Colab, light and dark.
PAGES = [("#ffffff", "#323232"), ("#121212", "#ced6dd"), ("#ffffff", "#212121"), ("#111111", "#ffffff"),
         ("#ffffff", "#1f1f1f"), ("#383838", "#d5d5d5")]  # fmt: skip


@pytest.mark.parametrize(("page", "ink"), PAGES)
@pytest.mark.parametrize("colour", [GOOD, BAD])
def test_verdicts_are_legible_on_light_and_dark(colour: str, page: str, ink: str) -> None:
    """WCAG 2.2, AA: 4.5 : 1, on the page and on the shaded rows of a table."""
    assert tinted(colour).endswith(f"color-mix(in srgb,{colour},currentColor)")  # half and half
    for ground in (page, blend("#808080", 0.12, page)):
        assert contrast(blend(colour, 0.5, ink), ground) >= 4.5, ground


def test_a_table_in_text() -> None:
    text = table([{"name": "a", "n": 1}, {"name": "bb", "n": 2000}], title="T", caption="end").text
    assert text == "T\nname      n\n----  -----\na         1\nbb    2,000\nend"


def test_a_cell_of_several_lines_keeps_its_row() -> None:
    text = table([{"q": "hi", "answer": "one\ntwo"}, {"q": "x", "answer": "y"}]).text
    assert text.splitlines()[2:] == ["hi  one", "    two", "x   y"]


def test_columns_are_chosen_and_missing_values_are_dashes() -> None:
    assert table([{"a": 1, "b": 2}, {"b": 3}], columns=["b", "a"]).text.splitlines()[2:] == ["2  1", "3  -"]
    assert table([]).text.strip() == ""


def test_hostile_text_stays_text() -> None:
    card = table([{"answer": "<script>alert(1)</script> costs $5"}], title="<b>")
    assert "<script>" not in card.html and "<b>" not in card.html and "$" not in card.html


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (1e-4, "0.0001"),
        (2.0, "2"),
        (1e6, "1,000,000"),
        ("a", "a"),
    ],
)
def test_values_for_people(value: object, shown: str) -> None:
    assert show(value) == shown


def test_a_hardware_card_lists_in_order_and_notes_below() -> None:
    card = hardware_card({"platform": "cpu", "devices": ["a", "b"]}, notes=["careful"])
    assert card.text.splitlines() == [
        "This machine",
        "------------",
        "platform  cpu",
        "devices   a",
        "          b",
        "note: careful",
    ]


def test_checks_say_what_failed() -> None:
    rows = [
        {"name": "loss", "value": 3.0, "expected": 2.0, "tolerance": 0.5, "passed": False},
        {"name": "n", "value": 1, "expected": "at most 2", "tolerance": None, "passed": True},
    ]
    card = checks_card(rows)
    assert card.text.startswith("1 of 2 checks failed")
    assert "2 ± 0.5" in card.text and "at most 2" in card.text
    assert BAD in card.html and GOOD in card.html
    assert cards.expectation(rows[0]) == "2 ± 0.5"
