# SPDX-License-Identifier: Apache-2.0
"""The page of `maxkit report` in a real browser: it loads nothing, fits a phone, and can be read in both themes."""

import json
import shutil
from pathlib import Path

import pytest
from page_checks import findings, overflow

from maxkit.nb.run_report import report

RECORD = Path(__file__).resolve().parents[2] / "recipes" / "results" / "pretrain-cpu.json"


@pytest.fixture(scope="module", params=[1, 2, 8])
def page_file(tmp_path_factory, request) -> Path:
    """Runs made from the committed record, each with a curve; one failed a check, one has a long name."""
    folder = tmp_path_factory.mktemp("runs")
    record = json.loads(RECORD.read_text())
    for i in range(request.param):
        run = folder / ("run" if i != 1 else "a-run-whose-name-nobody-would-want-to-type-twice") / str(i)
        run.mkdir(parents=True)
        record["parameters"] |= {"learning_rate": 0.001 * (i + 1)}
        record["checks"][-1]["passed"] = i != 1
        (run / "report.json").write_text(json.dumps(record))
        rows = ({"step": step, "loss": 5.7 - step / (50 + 5 * i)} for step in range(1, 121))
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = folder / "report.html"
    report(*sorted(path.parent for path in folder.rglob("report.json"))).save(page)
    yield page
    shutil.rmtree(folder)


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_the_page_stands_alone_and_can_be_read(browser, page_file, scheme):
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    loaded, complaints = [], []
    page.on("request", lambda request: loaded.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(page_file.as_uri())
    assert findings(page) == []
    drawn = page.locator(".panels svg")
    assert drawn.count() == 4
    beside = [drawn.nth(i).bounding_box()["y"] for i in range(2)]
    assert beside[0] == beside[1]
    page.set_viewport_size({"width": 390, "height": 900})
    assert overflow(page) <= 0
    below = [drawn.nth(i).bounding_box()["y"] for i in range(2)]
    assert below[1] > below[0] + 200
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('.panels svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 8  # pixels on a phone
    page.locator("summary").click()
    assert overflow(page) <= 0 and page.get_by_text("gradient_accumulation_steps").is_visible()
    assert findings(page) == []
    assert [url for url in loaded if not url.startswith("data:")] == [page_file.as_uri()] and not complaints
    context.close()


def test_marks_are_legible_where_the_browser_mixes_their_colour(browser, page_file):
    """What `tinted` promises on paper, in the browser's own arithmetic: 4.5 : 1 in both themes."""
    contrast = """() => {
        const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const light = colour => {
            canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(c => c / 255)
                .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ground = light(getComputedStyle(document.querySelector(".table")).backgroundColor);
        return [...document.querySelectorAll("td span")].map(mark => {
            const [low, high] = [ground, light(getComputedStyle(mark).color)].sort((a, b) => a - b);
            return [mark.textContent, (high + 0.05) / (low + 0.05)];
        });
    }"""
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(page_file.as_uri())
        found = page.evaluate(contrast)
        assert found and all(ratio >= 4.5 for _, ratio in found), found
        page.close()
