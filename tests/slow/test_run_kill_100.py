# SPDX-License-Identifier: Apache-2.0
"""The long form of tests/faults/test_run_kill.py: 100 kills, at least 20 of them during a save."""

from killed_runs import Runs, kill_until


def test_a_hundred_kills_leave_no_trace(tmp_path):
    steps = 500
    runs = Runs(tmp_path, steps=steps, checkpoint_period=1)
    run_dir = tmp_path / "killed"
    killed = kill_until(runs, run_dir, kills=100, seed=1)
    print(killed)
    assert killed.during_save >= 20 and len(set(killed.resumed_at)) > 30
    assert killed.resumed_at[-1] < steps
    runs.finish(run_dir)
    runs.check_equal(run_dir)
