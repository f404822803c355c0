# SPDX-License-Identifier: Apache-2.0
"""A training process that is killed, stopped or out of disk: the next start goes on as if nothing had been."""

import resource
import signal

import pytest
from killed_runs import Runs, half_written, kill_until, logged, wait_for

STEPS = 80


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), steps=STEPS, checkpoint_period=1)


def test_ten_kills_leave_no_trace(runs):
    """Of 10 kills -9, at least 2 while a save is being written."""
    run_dir = runs.folder / "killed"
    killed = kill_until(runs, run_dir, kills=10, seed=0)
    print(killed)
    assert killed.during_save >= 2 and len(set(killed.resumed_at)) > 3
    assert killed.resumed_at[-1] < STEPS  # the last kill still hit a run that had work to do
    runs.finish(run_dir)
    runs.check_equal(run_dir)


def test_sigterm_saves_ends_with_one_line_and_goes_on(runs):
    run_dir, log = runs.folder / "stopped", runs.folder / "stopped.log"
    process = runs.spawn(run_dir, log)
    try:
        wait_for(lambda: logged(run_dir) >= 3, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 2
    finally:
        process.kill()
        process.wait()
    [line] = [line for line in log.read_text().splitlines() if line.startswith("UserError")]
    assert "stopped by SIGTERM after update" in line and "start the same command again" in line
    assert "Traceback" not in log.read_text()
    done = int(line.split("after update ")[1].split(" of ")[0])
    assert 3 <= done < STEPS and logged(run_dir) == done
    assert (run_dir / "checkpoints" / str(done)).is_dir()
    runs.finish(run_dir)
    runs.check_equal(run_dir)


def test_a_full_disk_is_one_line_and_loses_nothing(runs):
    """A limit on the size of files, set while the run is going: the next save cannot be written."""
    run_dir, log = runs.folder / "full", runs.folder / "full.log"
    process = runs.spawn(run_dir, log)
    try:
        wait_for(lambda: logged(run_dir) >= 3, process, log)
        largest = max(p.stat().st_size for p in (runs.unbroken / "checkpoints").rglob("*"))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
        assert process.wait(60) == 2, log.read_text()
    finally:
        process.kill()
        process.wait()
    # What Orbax logs about its own threads stands above; the last line is the one for the user.
    line = log.read_text().splitlines()[-1]
    assert line.startswith("UserError") and "could not be saved" in line and "is intact" in line
    assert not half_written(run_dir)
    runs.finish(run_dir)
    runs.check_equal(run_dir)
