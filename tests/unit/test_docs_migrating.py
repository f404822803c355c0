# SPDX-License-Identifier: Apache-2.0
"""The guides for users of MaxText: their names exist, and what they say maxkit answers is what it answers."""

import re
from pathlib import Path

import pytest

import maxkit
from maxkit.config import RECIPES
from maxkit.errors import UserError
from maxkit.formats.maxtext.settings import DEFAULTS
from maxkit.models.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs/migrating-from-maxtext.md").read_text()
TROUBLE = (ROOT / "docs/checkpoints.md").read_text().partition("## Troubleshooting")[2]
FIXTURE = ROOT / "tests/fixtures/maxtext/paramonly_linen_unrolled_024"
SETTINGS = (FIXTURE / "config_resolved.txt").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    lines = GUIDE.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]


def names(cell: str) -> set[str]:
    return set(re.findall(r"`([a-z0-9_]+)`", cell))


def test_every_setting_is_named_as_both_sides_name_it():
    ours = {field for entry in RECIPES.values() for field in entry.config.model_fields}
    rows = table("Settings of a run")
    assert len(rows) > 20
    for theirs, mine, _ in rows:
        assert names(mine) <= ours, theirs
    for theirs, mine in table("Settings of a model"):
        assert names(mine) <= set(ModelConfig.model_fields), theirs
        known = {*DEFAULTS, *(name.removeprefix("base_") for name in DEFAULTS)}
        assert names(theirs) <= known, theirs


def load(tmp_path, change=("", ""), **options):
    """Load the fixture, a Llama of four unrolled layers, with one setting of its log changed."""
    path = tmp_path / "config_resolved.txt"
    text = re.sub(*change, SETTINGS, flags=re.MULTILINE) if change[0] else SETTINGS
    path.write_text(text)
    return maxkit.load(FIXTURE, **{"config": str(path), **options})


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (("", ""), {"config": None}, "does not record what its model computes"),
        (("", ""), {"config": "llama2-7b"}, "tensors contradict"),
        ((r"^(base_)?num_decoder_layers: .*", r"\1num_decoder_layers: 5"), {}, "-> num_layers"),
        (
            (r"^(base_)?num_decoder_layers: .*", r"\1num_decoder_layers: 3"),
            {},
            "tensors of the checkpoint are not part of the model",
        ),
        (("", ""), {"scan_layers": True}, "stores scan_layers=False"),
    ],
)
def test_maxkit_answers_as_the_guides_say(tmp_path, change, options, words):
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path, change, **options)
    assert "ShapeDtypeStruct" not in str(caught.value)
    known = TROUBLE + GUIDE
    assert words in known or words in ("-> num_layers", "stores scan_layers=False")


def test_a_checkpoint_that_lacks_tensors_is_mended_as_the_guide_says(tmp_path):
    five = (r"^(base_)?num_decoder_layers: .*", r"\1num_decoder_layers: 5")
    loaded = load(tmp_path, five, missing="init")
    assert any("layer_4" in line for line in loaded.report)
    maxkit.save(loaded, tmp_path / "mended", format="maxtext-linen")
    again = maxkit.load(tmp_path / "mended")
    assert again.config.num_layers == 5 and not again.definition.execution.scan_layers


def test_every_error_of_the_table_has_more_in_the_troubleshooting():
    headings = " ".join(line for line in TROUBLE.splitlines() if line.startswith(("### ", "Also as")))
    texts = [re.match(r"`([^`(]+)", row[0]) for row in table("Errors, and what to do")]
    for text in filter(None, texts):
        assert re.sub(r"[. ]*(at)?[. ]*$", "", text[1]) in headings, text[1]
    assert len(list(filter(None, texts))) >= 8


def test_scan_layers_is_loaded_never_synced():
    for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.ipynb"), *ROOT.glob("notebooks/*.ipynb")]:
        for line in path.read_text().splitlines():
            if "scan_layers" in line:
                assert not re.search(r"\b(syncs?|synced|overrid\w+)\b", line), (path.name, line)
