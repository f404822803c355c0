# SPDX-License-Identifier: Apache-2.0
"""`maxkit report`: runs side by side; what is missing is named, what is no run is one line."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import tiny_runs

from maxkit import nb
from maxkit.cli import main
from maxkit.config import RECIPES, RecipeConfig
from maxkit.errors import UserError
from maxkit.nb import checks
from maxkit.nb.run_report import MEASURES, MOST_RUNS, report
from maxkit.nb.run_report_figures import RUN_COLOURS, RUN_LINES, SMOOTHED_FROM, smoothed
from maxkit.nb.run_report_table import measured
from maxkit.nb.side_by_side import Row, Section, as_html, as_text

RESULTS = Path(__file__).parents[2] / "recipes" / "results"


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A run of six updates, assessed before and after, with a check that holds and one that does not."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = tiny_runs.write_corpus(folder / "corpus.txt", words=800)
    from maxkit import run

    checks.clear()
    started = run.start(tiny_runs.config_of(folder / "base", dataset, steps=6, eval_period=2))
    started.load_data()
    started.load_model()
    before = started.assess()
    started.train()
    after = started.assess()
    nb.expect("updates done", started.steps_done, 6)
    nb.expect("held-out loss", after.loss, at_most=0.1)
    started.finish({"held_out/before": before.loss, "held_out/after": after.loss})
    checks.clear()
    return folder / "base"


@pytest.fixture
def variant(real, tmp_path):
    """`variant(name, **parameters)`: a copy of the real run in a folder of that name, of other parameters."""

    def made(name: str, **parameters) -> Path:
        folder = tmp_path / name
        shutil.copytree(real, folder)
        change(folder, lambda record: record["parameters"].update(parameters))
        return folder

    return made


def change(folder: Path, edit) -> None:
    record = json.loads((folder / "report.json").read_text())
    edit(record)
    (folder / "report.json").write_text(json.dumps(record))


def change_rows(folder: Path, edit) -> None:
    rows = [edit(row) for row in tiny_runs.rows_of(folder)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row))


def cells(found, label: str) -> list[str]:
    return next(list(row.cells) for section in found.sections for row in section.rows if row.label == label)


def test_one_run_shows_what_was_asked_for_and_what_came_of_it(real) -> None:
    found = report(real)
    run = found.runs[0]
    assert [run.name, run.recipe, run.finished, run.gaps] == ["base", "pretrain", True, ()]
    assert found.columns == ["base", "default"]
    assert cells(found, "learning_rate") == ["0.01", "0.004"]
    # The curve is that of the metrics file, the ends of the held-out one are those of the record.
    assert run.curve("loss") == [(row["step"], row["loss"]) for row in tiny_runs.rows_of(real) if "loss" in row]
    assert [step for step, _ in run.curve("held_out/loss")] == [0, 2, 4, 6]
    record = json.loads((real / "report.json").read_text())
    assert run.curve("held_out/loss")[-1][1] == record["metrics"]["held_out/after"]
    assert cells(found, "held-out loss") == [f"✗ {measured(record['metrics']['held_out/after'])[0]} (at most 0.1)", ""]
    assert cells(found, "updates done")[0] == "✓ 6"
    assert found.notes == []
    assert found.lead.startswith("Held-out loss from 5.5") and found.lead.endswith("after 6 updates.")


def test_of_two_runs_the_parameters_that_differ_and_the_change(real, variant) -> None:
    other = variant("fast", learning_rate=0.03, run_dir="elsewhere")
    change(other, lambda record: record["seconds"].update(total=2 * record["seconds"]["total"]))
    change(other, lambda record: record["metrics"].update({"held_out/loss_at_6": 1.0}))
    found = report(real, other)
    assert found.differing == {"learning_rate": [0.01, 0.03]}  # where a run lies is no difference
    assert cells(found, "learning_rate") == ["0.01", "0.03", ""]
    assert cells(found, "total")[2] == "+100%" and cells(found, "train")[2] == "+0%"
    ends = [run.curve("held_out/loss")[-1][1] for run in found.runs]
    assert cells(found, "held-out loss, last")[2] == f"{1.0 - ends[0]:+.4g}"
    assert found.lead == "The lowest held-out loss at the end: fast, 1.000 after 6 updates."
    assert [series.legend for series in found.series] == ["base (learning_rate 0.01)", "fast (learning_rate 0.03)"]


def test_equal_runs_are_told_as_equal(real, variant) -> None:
    found = report(real, variant("again"))
    assert found.differing == {} and cells(found, "none") == ["", "", ""]
    assert cells(found, "held-out loss, last")[2] == "0"
    assert found.lead.endswith("in all runs.")


def test_curves_are_over_tokens_where_updates_differ_in_them(real, variant) -> None:
    runs = (real, variant("wide", batch_size=8))
    found = report(*runs)
    assert found.over == "tokens" and not found.notes
    base, wide = (points for points in found.panels[0][0].points.values())
    assert [x for x, _ in base] == [64 * i for i in range(1, 7)] and [x for x, _ in wide][-1] == 6 * 128
    told = report(*runs, over="steps")
    assert told.notes == ["an update is not of as many tokens in all runs: 64, 128"]


def test_an_unfinished_run_has_its_curve_and_the_parameters_of_its_checkpoint(real, variant) -> None:
    half, bare = variant("half"), variant("bare")
    for folder in (half, bare):
        (folder / "report.json").unlink()
        change_rows(folder, lambda row: row if row["step"] <= 4 else None)
    shutil.rmtree(bare / "checkpoints")
    found = report(real, half, bare)
    assert [run.finished for run in found.runs] == [True, False, False]
    assert found.runs[1].recipe == "pretrain" and found.runs[1].parameters["learning_rate"] == 0.01
    assert cells(found, "updates") == ["6", "4 of 6", "4"]
    assert cells(found, "held-out loss, last")[1].endswith(" at 4")
    assert found.notes[:3] == [
        "half: not finished: no report.json, so no checks and no times of the whole",
        "bare: not finished: no report.json, so no checks and no times of the whole",
        "bare: no checkpoint either, so its parameters are not known",
    ]
    assert list(found.panels[2][0].totals.values())[1:] == ["not finished", "not finished"]


def test_a_record_that_is_older_than_the_metrics_says_so(variant) -> None:
    going = variant("going", steps=9)
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.5}\n{"step": 8, "lo')  # the row that is being written
    change(going, lambda record: record.update(steps_this_run=2))
    found = report(going)
    assert not found.runs[0].finished and cells(found, "updates")[0] == "7 of 9"
    assert found.runs[0].gaps == (
        "continued: its times are of the last start, 2 of 6 updates",
        "not finished: metrics.jsonl goes on to update 7, report.json is of update 6, and so are its checks and times",
    )


def test_holes_in_a_curve_are_gaps_with_a_name(real, variant) -> None:
    broken = variant("broken")
    change_rows(broken, lambda row: row | {"loss": "nan"} if row["step"] in (3, 4) and "loss" in row else row)
    gone = variant("gone")
    (gone / "metrics.jsonl").unlink()
    found = report(real, broken, gone)
    assert "gone: no metrics.jsonl: no training curve" in found.notes
    assert "broken: training loss is nan at update 3 and 1 more: a gap in the curve" in found.notes
    drawn = dict(zip(("base", "broken"), found.panels[0][0].points.values(), strict=True))
    assert [math.isnan(value) for _, value in drawn["broken"]] == [False, False, True, True, False, False]
    assert found.figure.png
    text = json.dumps(found.to_json(), allow_nan=False)
    assert [3, "nan"] in json.loads(text)["runs"][1]["curves"]["loss"]


def test_parameters_that_only_some_record_are_a_note(real, variant) -> None:
    old = variant("old", learning_rate=0.1)
    change(old, lambda record: [record["parameters"].pop(name) for name in ("seq_len", "remat_policy")])
    found = report(real, old)
    assert list(found.differing) == ["learning_rate"]
    assert "old does not record 2 parameters that others have: remat_policy, seq_len" in found.notes


@pytest.mark.parametrize("record", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_records_are_read(record: Path) -> None:
    found = report(record)
    assert found.runs[0].finished and found.text() and found.to_json()
    measure = MEASURES.get(found.recipe)
    if measure:
        assert found.lead and f"held_out/{measure.held_out}" in found.curves
        assert "a record alone: no training curve" in found.runs[0].gaps


def test_every_recipe_that_trains_has_its_measure() -> None:
    assert set(MEASURES) == {name for name, entry in RECIPES.items() if issubclass(entry.config, RecipeConfig)}


def test_runs_of_one_name_are_told_apart_by_their_folders(real, tmp_path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(real, tmp_path / parent / "run")
    assert report(tmp_path / "a" / "run", tmp_path / "b" / "run").names == ["a/run", "b/run"]


def refused(capsys, *arguments) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert not shown.out and len(shown.err.splitlines()) == 1
    return shown.err


def test_a_mistake_is_one_line(real, variant, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("empty", None), ("torn", "{"), ("poor", '{"recipe": "sft"}')):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "report.json").write_text(content)
    odd = variant("odd")
    for i in range(MOST_RUNS):
        (tmp_path / f"v{i}").mkdir()
        shutil.copy(real / "report.json", tmp_path / f"v{i}")
    (odd / "metrics.jsonl").write_text("[1]\n")
    (tmp_path / "mine.html").write_text("<p>mine")
    before = sorted(tmp_path.rglob("*"))
    for arguments, part in [
        (("none",), "'none': no such run folder"),
        (("empty",), "has neither report.json nor metrics.jsonl"),
        ((tmp_path,), "holds some (odd, poor, torn, v0, v1, ...): give"),
        (("torn",), "'torn' is not the record of a run: no JSON"),
        (("poor",), "'poor' is not the record of a run: parameters: field required"),
        (("odd",), "metrics.jsonl has a row that is not one of numbers"),
        ((real, real / "report.json"), "is given twice"),
        ((real, RESULTS / "sft-cpu.json"), "of different recipes, give those of one"),
        ((real, "--curve", "los"), "no run has a curve of 'los': did you mean 'loss'?"),
        ((RESULTS / "convert-cpu.json", "--over", "tokens"), "no batch_size and seq_len"),
        ((real, "-o", "report.pdf"), "'report.pdf' must end in .html"),
        ((real, "-o", "mine.html"), "'mine.html' is there and no report"),
        ([tmp_path / f"v{i}" for i in range(MOST_RUNS)] + [real], "19 runs are given; one figure can tell 18 apart"),
    ]:
        assert part in refused(capsys, *arguments), arguments
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="over='epochs'"):
        report(real, over="epochs")  # type: ignore[arg-type]


def test_the_command_prints_the_table_and_draws_a_page_that_stands_alone(real, variant, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(real), str(variant("<b>$x</b>", learning_rate=0.02))]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("pretrain: 2 runs\n") and "learning_rate" in shown
    assert shown.endswith("page    report.html\nfigure  report.svg, report.png\n")
    page = Path("report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\((?!#)|https?://', page)
    assert "<b>" not in page and "$x" not in page and "&lt;b&gt;&#36;x" in page
    assert page.count('<svg role="img"') == 4 and page.count("<figure>") == 4
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', page))
    assert used <= set(ids)
    # Nothing of the figures keeps a colour of its own: both themes have theirs.
    drawn = "".join(re.findall(r"<svg role.*?</svg>", page, re.S))
    assert not re.findall(r"(?:fill|stroke): #\w+", drawn)
    assert main(["report", str(real)]) == 0 and "pretrain: base" in Path("report.html").read_text()  # replaced


def test_json_has_everything_and_writes_nothing(real, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(real), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == "pretrain" and found["files"] == [] and found["notes"] == []
    run = found["runs"][0]
    record = json.loads((real / "report.json").read_text())
    assert all(run[name] == record[name] for name in ("parameters", "metrics", "checks", "seconds", "environment"))
    assert len(run["curves"]["grad_norm"]) == 6 and run["peak_memory_bytes"] > 1e6
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_shows_one_figure_and_one_card(real, variant, monkeypatch) -> None:
    import IPython.display

    found = nb.report(*(variant(f"run-{i}-with-a-rather-long-name", learning_rate=0.01 * i) for i in range(8)))
    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda *things: shown.extend(things))
    found._ipython_display_()
    assert shown == [found.figure, found.card] and repr(found) == found.card.text
    assert 20 <= len(found.figure.alt) <= 250 and "8 runs" in found.figure.alt
    assert found.card.html.count("<table") == 1 and found.card.html.count('scope="row"') > 12
    assert found.names[0] == "run-0-with…r-long-name"


def test_other_curves_can_be_asked_for(real) -> None:
    found = report(real, curves=["grad_norm"])
    assert [panel.title for panel, _ in found.panels] == ["Grad_norm", "Time", "Peak memory"]
    assert cells(found, "grad_norm, last")[0]


def test_eighteen_runs_have_lines_of_their_own() -> None:
    assert len(RUN_COLOURS) * len(RUN_LINES) == MOST_RUNS


def test_means_keep_the_ends_and_the_holes() -> None:
    noisy = [math.nan if i == 70 else 5 + (-1) ** i for i in range(120)]
    means = smoothed(noisy)
    assert (means[0], means[-1]) == (noisy[0], noisy[-1]) and math.isnan(means[70])
    assert all(abs(mean - 5) <= 0.21 for i, mean in enumerate(means) if 2 <= i < 118 and abs(i - 70) > 2)
    assert smoothed(noisy[:40]) == noisy[:40] and SMOOTHED_FROM >= 60  # half a window is at least one update


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((1.9012345, 1.84), ["1.901", "1.840"]),
        ((0.17, 0.6), ["0.17", "0.60"]),
        ((0.89, 0.0001), ["0.89", "0.0001"]),  # too different to share their decimals
        ((186.71430, None), ["186.7", "-"]),
        ((12345.678,), ["12,346"]),
        ((3, "x", True), ["3", "x", "yes"]),
        ((math.nan, 2.5), ["nan", "2.50"]),
    ],
)
def test_results_share_their_decimals(values, shown) -> None:
    assert measured(*values) == shown


SECTIONS = [Section("time", [Row("total", ["1 s", "20 s", ""]), Row("per update", ["2 ms", "-", "x"], best=1)])]


def test_a_table_too_wide_goes_on_below() -> None:
    columns = ["first", "second", "change"]
    assert as_text(columns, SECTIONS, 80) == (
        "              first  second  change\n"
        "------------  -----  ------  ------\n"
        "time\n"
        "  total         1 s    20 s\n"
        "  per update   2 ms       -       x"
    )
    narrow = as_text(columns, SECTIONS, 28)
    assert max(map(len, narrow.splitlines())) <= 28 and narrow.count("per update") == 2
    assert narrow.count("total") == 1  # a row with nothing in a block is not repeated in it
    assert as_html(columns, SECTIONS).count("font-weight:700") == 1
