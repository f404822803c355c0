# SPDX-License-Identifier: Apache-2.0
"""Kill a training run again and again, let it finish, and compare it with one that nobody touched."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tiny_runs import compile_cache, rows_of, spawn, write_corpus

from maxkit.checkpoint import manifest
from maxkit.checkpoint.load import load
from maxkit.checkpoint.store import CheckpointStore

START_S = 60.0  # for a process to begin, on a busy machine


class Killed(NamedTuple):
    """How many kills there were, how many left a half-written save, and at how many different updates."""

    kills: int
    during_save: int
    resumed_at: tuple[int, ...]


class Runs:
    """An unbroken run in `folder/unbroken`, to which others of the same settings are compared."""

    def __init__(self, folder: Path, **settings: object):
        self.folder, self.settings = folder, [f"{k}={v}" for k, v in settings.items()]
        self.dataset = write_corpus(folder / "corpus.txt")
        self.steps = int(settings["steps"])
        # Only the unbroken run writes programs into the cache: the others start in a second instead of ten.
        self.environment = compile_cache(folder / "programs")
        self.unbroken = folder / "unbroken"
        log = folder / "unbroken.log"
        process = self.spawn(self.unbroken, log)
        assert process.wait(600) == 0, log.read_text()
        report = json.loads((self.unbroken / "report.json").read_text())
        self.update_s = report["seconds"]["train"] / self.steps  # with its save, on this machine as busy as it is

    def spawn(self, run_dir: Path, log: Path) -> subprocess.Popen:
        return spawn(run_dir, self.dataset, log, *self.settings, **self.environment)

    def finish(self, run_dir: Path) -> None:
        log = self.folder / "finish.log"
        process = self.spawn(run_dir, log)
        assert process.wait(600) == 0, log.read_text()

    def check_equal(self, run_dir: Path) -> None:
        """Bit for bit: weights, optimizer state, key, data position, and every logged loss, once each."""
        ours, theirs = (CheckpointStore(path / "checkpoints", read_only=True) for path in (run_dir, self.unbroken))
        assert ours.latest_step() == theirs.latest_step() == self.steps
        mine, wanted = ours.manifest(), theirs.manifest()
        assert mine.leaves == wanted.leaves  # digests of params, opt_state, step and key
        positions = [manifest.read_iterator(store.step_path(self.steps), 0, 1) for store in (ours, theirs)]
        assert positions[0] == positions[1]
        weights = [load(path, unexpected="error") for path in (run_dir, self.unbroken)]
        flat = [loaded.definition.flat(loaded.params) for loaded in weights]
        for path, leaf in flat[1].items():
            np.testing.assert_array_equal(flat[0][path], leaf, err_msg=path)
        histories = [[unclocked(row) for row in rows_of(path)] for path in (run_dir, self.unbroken)]
        assert histories[0] == histories[1]
        assert [row["step"] for row in histories[0] if "loss" in row] == list(range(1, self.steps + 1))


def unclocked(row: dict) -> dict:
    """What a row says besides how long it took and how much memory there was."""
    return {name: value for name, value in row.items() if not name.startswith("perf/")}


def half_written(run_dir: Path) -> bool:
    """Whether a save has begun that is not committed."""
    folder = run_dir / "checkpoints"
    return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


def committed(run_dir: Path) -> int:
    """The newest saved update."""
    with CheckpointStore(run_dir / "checkpoints", read_only=True) as store:
        return store.latest_step() or 0


def logged(run_dir: Path) -> int:
    """The number of updates in metrics.jsonl."""
    rows = rows_of(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return sum("loss" in row for row in rows)


def kill_until(runs: Runs, run_dir: Path, kills: int, seed: int) -> Killed:
    """Kill -9 a run `kills` times: half of them as soon as a save has begun, the others at random instants."""
    draw, during_save, resumed_at = random.Random(seed), 0, []
    for number in range(kills):
        log = runs.folder / f"kill-{number}.log"
        process = runs.spawn(run_dir, log)
        try:
            # Some lives do a few updates, others end while the program is compiled or the first update runs.
            updates = committed(run_dir) + draw.randrange(4)
            wait_for(lambda log=log: "training" in log.read_text(), process, log)
            wait_for(lambda n=updates: logged(run_dir) >= n, process, log)
            if number % 2:
                time.sleep(draw.uniform(0.0, 5 * runs.update_s))
            else:
                wait_for(lambda: half_written(run_dir), process, log)
                time.sleep(draw.uniform(0.0, 0.1 * runs.update_s))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        during_save += half_written(run_dir)
        resumed_at.append(committed(run_dir))
    return Killed(kills, during_save, tuple(resumed_at))


def wait_for(condition, process: subprocess.Popen, log: Path, timeout: float = START_S) -> None:
    """Poll until `condition()`; the process must not end before."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {log.read_text()}"
        assert time.monotonic() < deadline, f"nothing happened for {timeout} s: {log.read_text()}"
        time.sleep(0.002)
