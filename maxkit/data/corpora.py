# SPDX-License-Identifier: Apache-2.0
"""Corpora that need no account: one committed with the package, one in the standard library, one in a wheel.

`sources.py` reads them by name. Licences: `corpora/NOTICE` for the committed text, `CORPORA` for the others.
"""

import dataclasses
import importlib.resources
import zipfile
from collections.abc import Iterator
from typing import Any, Literal

import yaml

from maxkit.errors import UserError, nearest
from maxkit.fetch import Wheel, fetch_wheel

CHATTERBOT = Wheel(
    name="chatterbot-corpus",
    version="1.3.3",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
CHATTERBOT_FOLDER = "chatterbot_corpus/data/english/"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A packaged corpus: whether it holds text or conversations, what it is, and its licence.

    members: the files of the wheel to read; empty means all English ones.
    """

    kind: Literal["text", "chat"]
    description: str
    licence: str
    members: tuple[str, ...] = ()


CORPORA: dict[str, Corpus] = {
    "shakespeare": Corpus("text", "nine plays by Shakespeare, 1.2 MB", "public domain"),
    "pydoc": Corpus("text", "the help topics of the running Python, about 0.5 MB", "PSF-2.0"),
    # The 1,050 rows of tech_support are 10 conversations repeated, and row 14 of trivia is no list of turns.
    "chatterbot": Corpus("chat", "technical support and trivia, 270 conversations", "BSD", ("tech_support", "trivia")),
    "chatterbot-all": Corpus("chat", "all English topics of chatterbot-corpus, 898 conversations", "BSD"),
}


def text_corpus(name: str) -> list[tuple[str, str]]:
    """The documents of a packaged text corpus as (title, text). Raises `UserError` for another name."""
    _require(name, "text")
    if name == "shakespeare":
        folder = importlib.resources.files("maxkit.data") / "corpora"
        return [(name, (folder / "shakespeare.txt").read_text(encoding="utf-8"))]
    from pydoc_data.topics import topics  # 0.5 MB of literals: only when asked for

    return sorted(topics.items())


def chat_corpus(name: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The conversations of a packaged chat corpus as (file, number from 1, {"messages": [...]}).

    Turns alternate user, assistant, user, ... as the corpus means them. Repeats are left in: the reader
    counts them. Raises `UserError` for another name, or where the wheel cannot be fetched.
    """
    corpus = _require(name, "chat")
    with zipfile.ZipFile(fetch_wheel(CHATTERBOT)) as wheel:
        for path in sorted(wheel.namelist()):
            member = path.removeprefix(CHATTERBOT_FOLDER).removesuffix(".yml")
            if not path.startswith(CHATTERBOT_FOLDER) or (corpus.members and member not in corpus.members):
                continue
            conversations = yaml.safe_load(wheel.read(path))["conversations"]
            for number, turns in enumerate(conversations, start=1):
                yield f"{member}.yml", number, {"messages": _alternate(turns)}


def _alternate(turns: Any) -> Any:
    """Give the turns of one conversation their roles; what is no list stays, for the reader to report."""
    if not isinstance(turns, list):
        return turns
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _require(name: str, kind: str) -> Corpus:
    allowed = [other for other, corpus in CORPORA.items() if corpus.kind == kind]
    if name not in allowed:
        raise UserError(f"no packaged {kind} corpus {name!r}: {nearest(name, allowed)}")
    return CORPORA[name]
