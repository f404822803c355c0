# SPDX-License-Identifier: Apache-2.0
"""`scan_layers` on every way into a checkpoint: which layout, why, from which source, under which spelling.

Nothing is mocked: the checkpoints are on disk, the sources are files, environments and parameter cells. Every row that
was tried is printed (`pytest -s`).
"""

import collections
import itertools
import json
import shutil
from pathlib import Path

import pytest
from etils import epath
from tiny_checkpoints import definition_of, save_run

from maxkit import cli
from maxkit import run as runs
from maxkit.checkpoint import inspect
from maxkit.checkpoint.compare import compare
from maxkit.checkpoint.convert import convert
from maxkit.checkpoint.load import load, open_source
from maxkit.config import resolve
from maxkit.data.tokenizer import train_bpe
from maxkit.errors import UserError
from maxkit.nb.bind import cell_parameters
from maxkit.train.config import SCAN_LAYERS

MAXTEXT = Path(__file__).parent.parent / "fixtures" / "maxtext"
SOURCES = ("file", "environment", "command line", "papermill", "notebook", "keyword")
SPELLINGS = {
    "run": "{run}",
    "run/": "{run}/",
    "checkpoints": "{run}/checkpoints",
    "step": "{run}/checkpoints/7",
    "step/": "{run}/checkpoints/7/",
    "item": "{run}/checkpoints/7/state",
    "item/": "{run}/checkpoints/7/state/",
    "manifest": "{run}/checkpoints/7/manifest",
    "file://": "file://{run}",
    "file:// step/": "file://{run}/checkpoints/7/",
}
TABLE: list[tuple[str, ...]] = []


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """{scan_layers: run folder}; a name with a space must not matter."""
    folder = tmp_path_factory.mktemp("two layouts")
    tokenizer = train_bpe(["the cat sat on the mat"], 258)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    files = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    for scan in (True, False):
        save_run(folder / f"scan {scan}", definition_of("text", scan), tokenizer=files)
    return {scan: folder / f"scan {scan}" for scan in (True, False)}


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    widths = [max(map(len, column)) for column in zip(*TABLE, strict=True)]
    print(
        "\n" + "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in TABLE)
    )


def row(entry, spelling, source, given, scan, outcome):
    TABLE.append((entry, spelling, source, f"given {given}", f"stored {scan}", outcome))


def config_from(source, value, tmp_path, **settings):
    """A pretraining config in which `scan_layers` came from `source`; value None gives none."""
    given = {name: (text, "keyword") for name, text in settings.items()}
    file, environ = None, {}
    if value is not None:
        text = str(value).lower()
        if source == "file":
            file = tmp_path / "run.yaml"
            file.write_text(f"scan_layers: {text}\n")
        elif source == "environment":
            environ = {"MAXKIT_SCAN_LAYERS": text}
        elif source == "keyword":
            given["scan_layers"] = (value, "keyword")
        else:
            cell = f"# Parameters\nscan_layers = {text!r}"  # papermill -p writes the string
            if source == "notebook":
                cell = f"# Parameters: change them here.\nscan_layers = {value}"
            handed_over = {"scan_layers": "command line"} if source == "command line" else {}
            found, problems = cell_parameters("pretrain", [cell], handed_over)
            assert not problems
            given |= found
    return resolve("pretrain", file=file, environ=environ, given=given)


def settings_of(entry, path, tmp_path):
    if entry == "resume":
        return {"run_dir": str(path)}
    key = {"load_parameters_path": "load_parameters_path", "model": "model"}[entry]
    return {"run_dir": str(tmp_path / "new"), key: str(path), "seq_len": 16}


def outcome_of(cfg):
    started = runs.start(cfg)
    started.store.close()
    return started.definition.execution.scan_layers, started.report


@pytest.mark.parametrize("entry", ["resume", "load_parameters_path", "model"])
def test_a_run_takes_the_stored_layout(stored, tmp_path, entry):
    for scan in (True, False):
        value, report = outcome_of(config_from(None, None, tmp_path, **settings_of(entry, stored[scan], tmp_path)))
        assert value is scan and f"scan_layers={scan} (loaded from the checkpoint)" in report
        row(entry, "run", "-", None, scan, f"{value}")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("entry", ["resume", "load_parameters_path", "model"])
def test_an_explicit_layout_must_be_the_stored_one(stored, tmp_path, entry, source):
    for scan in (True, False):
        settings = settings_of(entry, stored[scan], tmp_path)
        with pytest.raises(UserError) as caught:
            outcome_of(config_from(source, not scan, tmp_path, **settings))
        text = str(caught.value)
        assert isinstance(caught.value, ValueError) and "\n" not in text
        assert f"scan_layers={not scan} was given ({source})" in text and f"stores scan_layers={scan}" in text
        assert f"maxkit convert '{stored[scan]}' CONVERTED --to maxkit --scan-layers {str(not scan).lower()}" in text
        row(entry, "run", source, not scan, scan, "ValueError")
    # It is the value that decides, not where it came from: the stored one is accepted from every source.
    scan = SOURCES.index(source) % 2 == 0
    value, _ = outcome_of(config_from(source, scan, tmp_path, **settings_of(entry, stored[scan], tmp_path)))
    assert value is scan
    row(entry, "run", source, scan, scan, f"{value}")


def test_the_command_in_the_message_works(stored, tmp_path, capsys):
    import shlex

    with pytest.raises(UserError) as caught:
        load(stored[True], scan_layers=False)
    command = str(caught.value).partition("maxkit convert ")[2]
    assert cli.main(["convert", *shlex.split(command.replace("CONVERTED", str(tmp_path / "converted")))]) == 0
    capsys.readouterr()
    assert load(tmp_path / "converted", scan_layers=False).definition.execution.scan_layers is False
    # The converted run is the one that would have been saved unrolled.
    assert compare(tmp_path / "converted", stored[False], values=True, only="all", atol=0, rtol=0).equal


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_path(stored, tmp_path, spelling):
    for scan in (True, False):
        path = SPELLINGS[spelling].format(run=stored[scan])
        assert open_source(path).scan_layers is scan
        for given in (not scan, scan):
            if given is scan:
                assert load(path, scan_layers=given).definition.execution.scan_layers is scan
            else:
                with pytest.raises(UserError, match=rf"scan_layers={given} was given \(keyword\).*scan_layers={scan}"):
                    load(path, scan_layers=given)
            row("load", spelling, "keyword", given, scan, f"{scan}" if given is scan else "ValueError")
        with pytest.raises(UserError, match=rf"scan_layers={not scan} was given \(papermill\).*scan_layers={scan}"):
            outcome_of(
                config_from("papermill", not scan, tmp_path, **settings_of("load_parameters_path", path, tmp_path))
            )
        row("load_parameters_path", spelling, "papermill", not scan, scan, "ValueError")
        done = convert(path, tmp_path / f"{scan}", to="maxkit", params_only=True)
        assert done.plan.scan_layers is scan
        row("convert", spelling, "-", None, scan, f"{scan}")
        with pytest.raises(UserError, match=rf"scan_layers={not scan} was given \(command line\).*scan_layers={scan}"):
            convert(path, tmp_path / "hf", to="hf", scan_layers=not scan)
        row("convert to hf", spelling, "command line", not scan, scan, "ValueError")


def test_path_objects_and_both_layouts_in_one_process(stored):
    """Teacher and student: the second resolves as if the first had not been loaded."""
    for make, scan in itertools.product((Path, epath.Path), (True, False, True)):
        found = load(make(stored[scan]))
        assert found.definition.execution.scan_layers is scan
        assert f"scan_layers={scan} (loaded from the checkpoint)" in found.report
        row("load", make.__module__.split(".")[0] + ".Path", "-", None, scan, f"{scan}")


def test_generation_takes_either(stored, capsys):
    texts = []
    for scan in (True, False):
        assert cli.main(["generate", str(stored[scan]), "--prompt", "the cat", "--max-new-tokens", "2"]) == 0
        texts.append(capsys.readouterr().out)
        row("generate", "run", "-", None, scan, f"{scan}")
    assert texts[0] == texts[1]


def test_a_source_without_a_layout_takes_any(stored, tmp_path):
    folder = convert(stored[False], tmp_path / "hf", to="hf").path
    for given, want in ((None, True), (True, True), (False, False)):
        assert load(folder, scan_layers=given).definition.execution.scan_layers is want
        row("load", "hf folder", "keyword" if given is not None else "-", given, None, f"{want}")
    assert any("stacked by default; the source has no layout of its own" in line for line in load(folder).report)


# ---------------------------------------------------------------- MaxText: metadata, then structure


def fixture(tmp_path, metadata):
    """A scanned checkpoint of MaxText with other step metadata; "absent" removes the file."""
    source = MAXTEXT / "axis0_scanned_025"
    run = tmp_path / "run"
    shutil.copytree(source, run)
    step = inspect.find(run).path
    file = step / inspect.STEP_METADATA
    content = json.loads(file.read_text())
    if metadata == "absent":
        file.unlink()
    else:
        content["custom_metadata"] = metadata
        file.write_text(json.dumps(content))
    return run, step


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ({"scan_layers": True}, "scan_layers: the step's custom_metadata"),
        ({}, "scan_layers: layers hold stacked layers"),
        ("absent", "scan_layers: layers hold stacked layers"),
        ({"scan_layers": "true"}, "scan_layers: metadata has 'true', not a boolean: read from the structure"),
        ({"scan_layers": 1}, "scan_layers: metadata has 1, not a boolean: read from the structure"),
    ],
    ids=["boolean", "none", "no file", "text", "number"],
)
def test_metadata_then_structure_and_the_report_says_which(tmp_path, metadata, line):
    run, step = fixture(tmp_path, metadata)
    config = MAXTEXT / "axis0_scanned_025" / "config_resolved.txt"
    for number, path in enumerate((run / "checkpoints", step, step / "items", f"{step / 'items'}/", f"file://{step}")):
        source = open_source(path, config)
        assert source.scan_layers is True
        if number < 2:
            found = load(path, config=config)
            assert found.definition.execution.scan_layers is True and line in found.report, found.report
        with pytest.raises(UserError, match="scan_layers=False was given .keyword.*stores scan_layers=True"):
            load(path, config=config, scan_layers=False)
        row("load", "maxtext", "keyword", False, True, "ValueError")


def test_one_description_of_the_parameter():
    """The field, the tables made of it, and the guides say the same: it is loaded."""
    assert "loaded from the checkpoint" in SCAN_LAYERS and "ValueError" in SCAN_LAYERS and "pipeline" in SCAN_LAYERS
    docs = Path(__file__).parent.parent.parent / "docs"
    assert SCAN_LAYERS in " ".join((docs / "checkpoints.md").read_text().replace("\n>", "").split())
    for page in docs.glob("*.md"):
        for line in page.read_text().splitlines():
            assert not ("scan_layers" in line and any(word in line.lower() for word in ("sync", "overrid"))), (
                page,
                line,
            )


def test_the_table_covers_what_it_should():
    entries = collections.Counter(entry for entry, *_ in TABLE)
    assert {"resume", "load_parameters_path", "model", "load", "convert", "convert to hf", "generate"} <= entries.keys()
