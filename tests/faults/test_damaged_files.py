# SPDX-License-Identifier: Apache-2.0
"""Every kind of file in a checkpoint, damaged at 500 places, cut short and removed: an error or the same bits.

`pytest -s tests/faults/test_damaged_files.py` prints how much was tried of each kind, and what came of it.
"""

import collections
import itertools
import random
import re

import jax
import pytest
from tiny_checkpoints import POSITION, definition_of, record_of, state_of

from maxkit.checkpoint import digest
from maxkit.checkpoint.manifest import MANIFEST_FILE, read_tokenizer
from maxkit.checkpoint.store import CheckpointStore
from maxkit.data.tokenizer import train_bpe

FLIPS = 500
# What a file of a step is, by its path; everything that a save writes must be one of these.
KINDS = {
    "arrays": r"state/(ocdbt\.process_\d+/)?d/\w+",
    "index of the arrays (OCDBT)": r"state/(ocdbt\.process_\d+/)?manifest\.ocdbt",
    "Orbax's notes on the arrays": r"state/(_METADATA|_sharding|array_metadatas/process_\d+)",
    "manifest": rf"manifest/{MANIFEST_FILE}",
    "tokenizer": r"manifest/tokenizer/.+",
    "data position": r"iterator/process_0-of-1\.json",
    "its checksum": r"iterator/process_0-of-1\.json\.sha256",
    "step metadata": r"_CHECKPOINT_METADATA",
    "Orbax's marks": r"(.+/)?commit_success\.txt",
}
DEFINITION = definition_of("text", True)
TARGET = jax.eval_shape(lambda: state_of(DEFINITION))
COUNTS: dict[tuple[str, str], collections.Counter] = {}


def kind_of(name):
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), None)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with steps 1 and 2; only 2 is damaged."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    tokenizer = train_bpe(["the cat sat on the mat"], 258)
    tokenizer.save(folder.parent)
    files = {path.name: path.read_bytes() for path in folder.parent.iterdir() if path.is_file()}
    with CheckpointStore(folder) as store:
        for step in (1, 2):
            record = record_of(DEFINITION, tokenizer=files)
            store.save(step, state_of(DEFINITION, step=step), record, POSITION, {"loss": 1.5})
    return folder


@pytest.fixture(scope="module")
def saved(checkpoints):
    """{step: what a restore gives when nothing is damaged}."""
    with CheckpointStore(checkpoints, read_only=True) as store:
        return {step: restored(store, step) for step in (1, 2)}


@pytest.fixture(scope="module", autouse=True)
def table(checkpoints):
    yield
    names = ("tried", "refused", "same bits", "lost")
    width = max((len(kind) for kind, _ in COUNTS), default=0)
    print("\n" + " " * width, *(f"{name:>10}" for name in ("", *names)))
    for (kind, damage), counts in sorted(COUNTS.items(), key=lambda item: item[0][1]):
        print(f"{kind:<{width}}", f"{damage:>10}", *(f"{counts[name]:>10}" for name in names))


def restored(store, step=None):
    """Everything that a restore gives: bits of the state, the whole manifest, position, tokenizer, notes."""
    found = store.restore(step, TARGET, fallback=True)
    files = read_tokenizer(store.step_path(found.manifest.step), found.manifest)
    return digest.digest_tree(found.state), found.manifest, found.iterator_state, files, found.notes


def attempt(store, saved, path):
    """What became of step 2: "refused" with the damage named and step 1 in its place, or "same bits"."""
    found = restored(store)
    if found[1].step == 2:
        return "same bits" if found == saved[2] else "lost"
    *rest, notes = found
    text = notes[0].partition("was passed over: ")[2]
    assert (*rest, ()) == saved[1] and notes[1:] == ("restored step 1",)
    assert "\n" not in text and text.startswith(str(store.step_path(2))), text
    if kind_of(path) not in ("arrays", "index of the arrays (OCDBT)"):  # of these the array is named
        assert path.rpartition("/")[2].removesuffix(".sha256") in text, f"{path} is not named: {text}"
    return "refused"


def try_damage(checkpoints, saved, damages):
    """Each of `damages`, (file, name of the damage, its new content or None), in turn; the file is then as before."""
    with CheckpointStore(checkpoints, read_only=True) as store:
        for name, damage, content in damages:
            path = checkpoints / "2" / name
            before = path.read_bytes()
            path.unlink() if content is None else path.write_bytes(content)
            counts = COUNTS.setdefault((kind_of(name), damage), collections.Counter())
            try:
                counts.update(["tried", attempt(store, saved, name)])
            finally:
                path.write_bytes(before)
        assert restored(store) == saved[2]  # nothing was left damaged, nothing held in memory


def files_by_kind(checkpoints):
    names = sorted(str(p.relative_to(checkpoints / "2")) for p in (checkpoints / "2").rglob("*") if p.is_file())
    assert not [name for name in names if kind_of(name) is None], names
    found = {kind: [name for name in names if kind_of(name) == kind] for kind in KINDS}
    assert all(found.values()), found
    return found


def totals(damage):
    whole = sum((counts for (_, kind), counts in COUNTS.items() if kind == damage), collections.Counter())
    print(damage, dict(whole))
    return whole


def test_five_hundred_flipped_bytes(checkpoints, saved, capfd):
    """One byte at a time, as many in each kind of file, anywhere in it; no restore gives other bits."""
    draw, kinds = random.Random(0), files_by_kind(checkpoints)

    def damages():
        for number in range(FLIPS):
            names = list(kinds.values())[number % len(kinds)]
            sizes = [(checkpoints / "2" / name).stat().st_size for name in names]
            name = draw.choices(names, sizes)[0]
            content = bytearray((checkpoints / "2" / name).read_bytes())
            content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
            yield name, "flipped", content

    try_damage(checkpoints, saved, damages())
    with capfd.disabled():
        found = totals("flipped")
    assert found["tried"] == FLIPS and found["lost"] == 0 and found["refused"] > FLIPS // 3
    assert "Traceback" not in capfd.readouterr().err


def test_files_cut_short_or_removed(checkpoints, saved, capfd):
    def damages():
        for name in itertools.chain.from_iterable(files_by_kind(checkpoints).values()):
            content = (checkpoints / "2" / name).read_bytes()
            for length in sorted({0, 1, len(content) // 2, len(content) - 1}):
                yield name, "cut", content[:length]
            yield name, "removed", None

    try_damage(checkpoints, saved, damages())
    for damage in ("cut", "removed"):
        with capfd.disabled():
            found = totals(damage)
        assert found["lost"] == 0 and found["refused"] > 5
    assert "Traceback" not in capfd.readouterr().err
