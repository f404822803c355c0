# SPDX-License-Identifier: Apache-2.0
"""The rows that docs/data.md shows are read as it says, and the account it shows is the one that is printed."""

import json
import re
from pathlib import Path

from maxkit.data.preferences import pairs
from maxkit.data.report import RowReport
from maxkit.data.sources import conversations, to_messages

PAGE = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
CHAT, PAIRS = re.findall(r"^```json\n(.*?)^```$", PAGE, re.M | re.S)


def test_each_conversation_of_the_page_is_one(tmp_path):
    found = [to_messages(json.loads(line)) for line in CHAT.splitlines()]
    assert len(found) == 4
    assert [message["role"] for message in found[0]] == ["user", "assistant"]
    assert found[2][0]["content"] == "In German:\n\nthank you"
    assert all(messages[-1]["role"] == "assistant" for messages in found)


def test_the_pair_of_the_page_is_one(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    report = RowReport()
    (pair,) = pairs(str(tmp_path / "pairs.jsonl"), report)
    assert (pair.chosen, pair.rejected, report.rejected) == ("Paris.", "Lyon?", 0)


def test_the_account_is_the_one_that_is_printed(tmp_path):
    lines = [*CHAT.splitlines(), json.dumps({"messages": [{"role": "user", "content": "Hello?"}]}), "not json"]
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    report = RowReport()
    list(conversations(str(tmp_path / "my.jsonl"), report))
    shown = re.search(r"^```text\n(\d+ rows read.*?)^```$", PAGE, re.M | re.S)[1]
    assert "\n".join(report.lines()) + "\n" == shown
