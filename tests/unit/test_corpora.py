# SPDX-License-Identifier: Apache-2.0
"""The packaged corpora themselves: what the package and the wheel hold, and how much repeats."""

import hashlib
import importlib.resources
import subprocess
import sys

import pytest

from maxkit.data.corpora import CORPORA, chat_corpus, text_corpus
from maxkit.data.report import RowExample, RowReport
from maxkit.data.sources import conversations, documents
from maxkit.errors import UserError

SHAKESPEARE_SHA256 = "e3c3a83293e36d2b1aa5a39bd653ffe9a93545cbd50092ea8751a98b0f91f9e5"


def test_shakespeare_is_the_committed_text():
    [(_, text)] = text_corpus("shakespeare")
    assert hashlib.sha256(text.encode()).hexdigest() == SHAKESPEARE_SHA256
    assert text.isascii() and len(text) == 1_156_590
    assert "To be, or not to be,--that is the question:--" in text
    assert not {"Gutenberg", "http", "Copyright"} & set(text.split())


def test_the_source_and_status_are_named():
    notice = (importlib.resources.files("maxkit.data") / "corpora" / "NOTICE").read_text()
    assert "public domain" in notice and "`shakespeare` 0.6" in notice


def test_pydoc_needs_only_python():
    topics = dict(text_corpus("pydoc"))
    assert len(topics) > 50 and sum(map(len, topics.values())) > 300_000
    report = RowReport()
    assert len(list(documents("pydoc", report))) == report.kept == len(topics)


@pytest.mark.parametrize(("name", "kept", "duplicate"), [("chatterbot", 270, 1040), ("chatterbot-all", 898, 1127)])
def test_chatterbot_repeats_are_counted(name, kept, duplicate):
    report = RowReport()
    found = list(conversations(name, report))
    assert (len(found), report.kept, report.duplicate) == (kept, kept, duplicate)
    # One entry of the trivia file is a sentence where a list of turns should be.
    assert (report.malformed, report.empty) == (1, 0)
    assert report.examples["malformed"] == [RowExample(14, "messages must be a list, not str", "trivia.yml")]
    assert report.rows_read == len(list(chat_corpus(name)))
    first = found[0].messages
    assert [message["role"] for message in first[:2]] == ["user", "assistant"]
    for conversation in found:
        roles = [message["role"] for message in conversation.messages]
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]


def test_chatterbot_rows_are_the_known_ones():
    exchanges = {c.messages[0]["content"]: c.messages[1]["content"] for c in conversations("chatterbot", RowReport())}
    answer = "Check if it's plugged in and hold the power button for 10 seconds."
    assert exchanges["My computer won't turn on."] == answer
    assert exchanges["Who was the 37th President of the United States?"] == "Richard Nixon"


def test_another_name_gets_the_nearest():
    with pytest.raises(UserError, match="did you mean 'shakespeare'"):
        text_corpus("shakespear")
    with pytest.raises(UserError, match="no packaged text corpus 'chatterbot'"):
        text_corpus("chatterbot")
    assert all(corpus.licence and corpus.description for corpus in CORPORA.values())


def test_naming_a_corpus_does_not_import_jax():
    code = "import sys, maxkit.data.corpora, maxkit.data.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
