# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/adding-a-family.md: its code exists, is as short as it says, and does what it says."""

import re
from pathlib import Path

import pytest

from maxkit.errors import UserError
from maxkit.formats.hf_config.reader import read_config_dict
from maxkit.formats.tables import TABLES
from maxkit.nb.architecture_figures import layer_map_figure

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "adding-a-family.md").read_text()
SMOLLM3 = {"architectures": ["SmolLM3ForCausalLM"]}


def shown() -> list[list[str]]:
    """The lines of each literalinclude, as Sphinx takes them."""
    blocks = []
    for path, options in re.findall(r"```\{literalinclude\} (\S+)\n(.*?)```", PAGE, re.DOTALL):
        given = dict(re.findall(r"^:([a-z-]+): '?(.*?)'?$", options, re.MULTILINE))
        lines = (DOCS / path).read_text().splitlines()
        start = next(i for i, line in enumerate(lines) if given["start-at"] in line)
        if "end-before" in given:
            end = next(i for i, line in enumerate(lines) if i > start and given["end-before"] in line)
        else:
            end = start + int(given["lines"].rpartition("-")[2])
        blocks.append([line for line in lines[start:end] if line.strip()])
    return blocks


def test_the_example_is_as_short_as_the_page_says():
    blocks = shown()
    family, joined, table, other_rows, case, effects_case, effects = blocks
    assert family[0] == "def _smollm3_fields(values: Values) -> dict[str, Any]:" and family[-1] == ")"
    assert "SMOLLM3" in joined[1] and "smollm3" in table[0]
    assert "_POST_NORMS" in other_rows[0] and other_rows[-1] == ")" and len(other_rows) == 4
    assert case[-1].endswith("),") and effects[-1].strip() == "],"
    written = [line for block in blocks if block is not other_rows for line in block]
    stated = int(re.search(r"\*\*(\d+) lines\*\*", PAGE)[1])
    assert (stated, stated < 100) == (len(written), True)


def test_what_the_page_says_of_smollm3():
    config = read_config_dict(SMOLLM3, "x")
    assert [block.rope for block in config.blocks[:5]] == [True, True, True, False, True]
    assert [(len(group.pattern), group.repeats) for group in config.layer_groups()] == [(4, 9)]
    assert TABLES["smollm3", "hf"] is TABLES["llama", "hf"]
    assert "SmolLM3 3B 4×9" in layer_map_figure({"SmolLM3 3B": config}, title="SmolLM3").alt
    with pytest.raises(UserError, match=r"^my.json: no_rope_layers must be 36 zeros and ones, one per layer"):
        read_config_dict(SMOLLM3 | {"no_rope_layers": [1, 0]}, "my.json")
    with pytest.raises(UserError, match="rope_every_other_day"):
        read_config_dict(SMOLLM3 | {"rope_every_other_day": True}, "my.json")


def test_files_and_commands_of_the_page_exist():
    for path in re.findall(r"\b(?:tests|maxkit|notebooks)/[\w/]+\.(?:py|ipynb)", PAGE):
        assert (DOCS.parent / path).is_file(), path
