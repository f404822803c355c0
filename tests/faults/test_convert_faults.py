# SPDX-License-Identifier: Apache-2.0
"""Conversions that are killed, run out of disk, or read damaged files: an error or the same bits, never a false end."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny_checkpoints import definition_of, save_run
from tiny_models import tiny

from maxkit.checkpoint.contents import StoreContents
from maxkit.checkpoint.conversion_store import JOURNAL
from maxkit.checkpoint.convert import PARTIAL, convert
from maxkit.checkpoint.inspect import find
from maxkit.errors import UserError
from maxkit.models.config import Execution
from maxkit.models.definition import ModelDefinition

# 33 MB with its moments, 222 arrays unrolled: long enough to be killed in the middle.
LARGER = tiny(num_layers=8, vocab_size=512, embed_dim=128, mlp_dim=512)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "run"
    save_run(folder, ModelDefinition(LARGER, Execution(scan_layers=True)))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "run"
    save_run(folder, definition_of("llama", True))
    return folder


def leaves_of(folder):
    return StoreContents(find(folder).path).manifest.leaves


@pytest.fixture(scope="module")
def expected(source, small, tmp_path_factory):
    """{source: leaves of its conversion}."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        path: leaves_of(convert(path, folder / str(number), to="maxkit", scan_layers=False).path)
        for number, path in enumerate((source, small))
    }


def start(source, target, *options, **arguments):
    command = [sys.executable, "-m", "maxkit.cli", "convert", str(source), str(target), "--to", "maxkit"]
    command += ["--scan-layers", "false", *options]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=inherited, **arguments
    )


def noted(target):
    """How many arrays the journal of an unfinished conversion speaks of."""
    journal = target.with_name(target.name + PARTIAL) / JOURNAL
    try:
        return max(0, len(journal.read_text().splitlines()) - 1)
    except OSError:
        return -1


def test_killed_conversions_go_on_and_end_in_the_same_bits(source, expected, tmp_path, monkeypatch):
    """Killed again and again, each time a little later; then finished."""
    target, seen = tmp_path / "target", []
    slow = "import maxkit.checkpoint.arrays as a; a._COMMIT_BYTES = 1 << 20\n"
    slow += "from maxkit.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    command = ["convert", str(source), str(target), "--to", "maxkit", "--scan-layers", "false"]
    for wanted in (-1, 0, 1, 40, 80, 120, 200):
        process = subprocess.Popen(
            [sys.executable, "-c", slow, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        until = time.monotonic() + 60
        while noted(target) < wanted and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if target.exists():  # it was done before the signal came
            break
        seen.append(noted(target))
    print(f"\nkilled {len(seen)} times, with so many arrays noted (-1: before the journal): {seen}")
    assert sum(count > 0 for count in seen) >= 3, f"too few kills hit a conversion: {seen}"
    assert seen == sorted(seen), "what was done was lost"
    done = subprocess.run([sys.executable, "-c", slow, *command], capture_output=True, text=True, check=False)
    assert target.exists() and (done.returncode == 0 or "exists already" in done.stderr), done.stderr
    assert leaves_of(target) == expected[source]
    assert StoreContents(find(target).path).check_all() == len(expected[source])
    assert not target.with_name("target" + PARTIAL).exists()


@pytest.mark.parametrize("limit", [20_000, 400_000, 3_000_000])
def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_whole(source, expected, tmp_path, limit):
    """The limit on a file's size stands for the disk's end: writing fails with an error in the middle."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start(source, tmp_path / "target", preexec_fn=limited)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and error.count("\n") == 1, error
    assert "cannot be written" in error and "Traceback" not in error
    assert not (tmp_path / "target").exists()
    with pytest.raises(UserError):
        find(tmp_path / ("target" + PARTIAL))
    # With room the same command ends well.
    assert leaves_of(convert(source, tmp_path / "target", to="maxkit", scan_layers=False).path) == expected[source]


def files_of(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def outcome(damaged, target, expected):
    """ "refused", or "same bits"; everything else is a failure."""
    try:
        done = convert(damaged, target, to="maxkit", scan_layers=False)
    except UserError as error:
        assert not target.exists() and "\n" not in str(error)
        shutil.rmtree(target.with_name(target.name + PARTIAL), ignore_errors=True)
        return "refused"
    assert leaves_of(done.path) == expected
    shutil.rmtree(target)
    return "same bits"


def test_flipped_and_missing_bytes_of_the_source(small, expected, tmp_path, capfd):
    """Every file of a source at two places, and every file cut short: never other bits, never a traceback."""
    draw, found = random.Random(0), {"refused": 0, "same bits": 0}
    for number, name in enumerate(files_of(small)):
        for kind in ("flip", "flip", "cut"):
            damaged = tmp_path / "damaged"
            shutil.copytree(small, damaged)
            content = bytearray((damaged / name).read_bytes())
            if kind == "cut":
                content = content[: draw.randrange(len(content))]
            else:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            (damaged / name).write_bytes(bytes(content))
            found[outcome(damaged, tmp_path / f"target{number}", expected[small])] += 1
            shutil.rmtree(damaged)
    with capfd.disabled():
        print(f"\nflipped or cut source files: {sum(found.values())} tried, {found}, 0 lost")
    # Manifest, position and its checksum are refused each of the 9 times; how many files hold arrays is up to Orbax.
    assert found["refused"] > 9, found
    assert "Traceback" not in capfd.readouterr().err


def test_two_conversions_into_one_folder(source, expected, tmp_path):
    target = tmp_path / "target"
    processes = [start(source, target) for _ in range(2)]
    results = [(process.communicate(timeout=120), process.returncode) for process in processes]
    codes = sorted(code for _, code in results)
    assert codes == [0, 2], results
    refused = next(error for (_, error), code in results if code == 2)
    assert "being written by another process" in refused or "exists already" in refused
    assert refused.count("\n") == 1 and leaves_of(target) == expected[source]
