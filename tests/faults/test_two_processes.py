# SPDX-License-Identifier: Apache-2.0
"""Two processes on localhost, 2 simulated devices each, against one process with 4: the same run."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from killed_runs import logged, wait_for
from tiny_runs import compile_cache, rows_of, spawn, write_corpus

STEPS = 30
# The same float32 sums in the order of other devices, through 30 updates of Adam with falling rate: 1e-6 measured.
RTOL = 1e-4


class Cluster:
    """Starts a run on one or two processes that share 4 devices."""

    def __init__(self, folder):
        self.folder, self.dataset, self.number = folder, write_corpus(folder / "corpus.txt"), 0
        self.cache = compile_cache(folder / "programs")

    @staticmethod
    def address(processes):
        """Where the processes of one run find each other."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        return {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}

    def start(self, name, processes, **settings):
        self.number += 1
        logs = [self.folder / f"{name}-{self.number}-{rank}.log" for rank in range(processes)]
        given = [f"{k}={v}" for k, v in {"steps": STEPS, "num_heads": 4, "num_kv_heads": 4, **settings}.items()]
        environment = {
            **self.cache,
            # Simulated devices block a thread each while they wait for another process, and XLA makes only as many
            # threads as there are cores: with 2 of them both processes waited for ever in about one run of two.
            "NPROC": "16",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
        }
        if processes > 1:
            environment |= self.address(processes)
        return [
            (spawn(self.folder / name, self.dataset, log, *given, **environment, JAX_PROCESS_ID=str(rank)), log)
            if processes > 1
            else (spawn(self.folder / name, self.dataset, log, *given, **environment), log)
            for rank, log in enumerate(logs)
        ]

    def finish(self, started, code=0):
        try:
            for process, log in started:
                assert process.wait(300) == code, log.read_text()
        finally:
            kill(started)

    def run(self, name, processes, **settings):
        started = self.start(name, processes, **settings)
        self.finish(started)
        return self.folder / name


def kill(started):
    for process, _ in started:
        process.kill()
        process.wait()


def losses(run_dir):
    return [row["loss"] for row in rows_of(run_dir)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    return Cluster(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def unbroken(cluster):
    return cluster.run("two", 2, checkpoint_period=5)


@pytest.fixture(scope="module")
def one(cluster):
    return cluster.run("one", 1)


def leaves(run_dir):
    manifest = json.loads((run_dir / "checkpoints" / str(STEPS) / "manifest" / "manifest.json").read_text())
    return manifest["leaves"]


def test_two_processes_are_one(one, unbroken):
    differences = [abs(a / b - 1) for a, b in zip(losses(unbroken), losses(one), strict=True)]
    print(f"largest relative difference {max(differences):.1e}")
    assert losses(unbroken) == pytest.approx(losses(one), rel=RTOL)
    assert losses(one)[-1] < 0.9 * losses(one)[0]


def test_only_process_0_writes_records(unbroken):
    """One line an update, one report, one events file; the other process shows nothing either."""
    assert [row["step"] for row in rows_of(unbroken)] == list(range(1, STEPS + 1))
    report = json.loads((unbroken / "report.json").read_text())
    assert report["environment"]["processes"] == 2 and report["environment"]["devices"] == 4
    assert report["steps_done"] == STEPS and report["artifacts"]
    assert len(list((unbroken / "tensorboard").iterdir())) == 1
    logs = sorted(unbroken.parent.glob("two-*.log"))
    assert "update" in logs[0].read_text() and "update" not in logs[1].read_text()
    # `maxkit run` on the other host looks for the record as soon as its own kernel has ended.
    assert logs[1].read_text().splitlines()[-1] == "record"


def test_killed_together_they_go_on_bit_for_bit(cluster, unbroken):
    started = cluster.start("killed", 2, checkpoint_period=5)
    try:
        process, log = started[0]
        folder = cluster.folder / "killed" / "checkpoints"
        wait_for(lambda: any((folder / str(n)).exists() for n in range(5, STEPS, 5)), process, log)
    finally:
        kill(started)
    run_dir = cluster.run("killed", 2, checkpoint_period=5)
    report = json.loads((run_dir / "report.json").read_text())
    assert 0 < report["steps_this_run"] < STEPS
    assert leaves(run_dir) == leaves(unbroken) and losses(run_dir) == losses(unbroken)


def test_a_signal_to_one_stops_both(cluster, unbroken):
    started = cluster.start("stopped", 2, checkpoint_period=0)
    wait_for(lambda: logged(cluster.folder / "stopped") >= 2, *started[0])
    started[1][0].send_signal(signal.SIGTERM)
    cluster.finish(started, code=2)
    for _, log in started:
        assert "stopped by SIGTERM after update" in log.read_text()
    run_dir = cluster.run("stopped", 2, checkpoint_period=0)
    assert losses(run_dir) == losses(unbroken)


@pytest.mark.parametrize("mesh", ["tensor:4", "fsdp:2,tensor:2"])
def test_a_mesh_axis_across_processes(cluster, one, mesh):
    """tensor:4 spans both processes, so both read the same rows; fsdp:2,tensor:2 gives each its own."""
    run_dir = cluster.run(mesh.replace(":", ""), 2, mesh=mesh)
    assert losses(run_dir) == pytest.approx(losses(one), rel=RTOL)


def test_two_hosts_run_the_same_line(cluster):
    """`maxkit run` with its kernel on both, as docs/tpu.md has it: one run folder, a notebook for each."""
    run_dir, logs = cluster.folder / "line", [cluster.folder / f"line-{rank}.log" for rank in range(2)]
    given = {"run_dir": run_dir, "dataset": cluster.dataset, "steps": 2, "batch_size": 4, "seq_len": 64}
    given |= {"vocab_size": 258, "num_layers": 1, "embed_dim": 16, "mlp_dim": 24, "num_heads": 2, "num_kv_heads": 1}
    parameters = [word for name, value in given.items() for word in ("-p", f"{name}={value}")]
    environment = {**os.environ, **cluster.cache, "NPROC": "16", **cluster.address(2)}
    started = []
    for rank, log in enumerate(logs):
        line = [
            sys.executable,
            "-m",
            "maxkit.cli",
            "run",
            "pretrain",
            *parameters,
            "-o",
            run_dir / f"host-{rank}.ipynb",
        ]
        with log.open("w") as file:
            mine = environment | {"JAX_PROCESS_ID": str(rank)}
            started.append((subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=mine), log))
    cluster.finish(started)
    assert all("2 updates now, 2 in all" in log.read_text() for log in logs)
    assert sorted(path.name for path in run_dir.glob("*.ipynb")) == ["host-0.ipynb", "host-1.ipynb"]
    assert json.loads((run_dir / "report.json").read_text())["environment"]["processes"] == 2


def test_incomplete_variables_are_one_line(cluster):
    cases = [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID must be set too"),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES='two'",
        ),
    ]
    for environment, words in cases:
        log = cluster.folder / "bad.log"
        process = spawn(cluster.folder / "bad", cluster.dataset, log, **environment)
        assert process.wait(120) == 2
        assert words in log.read_text() and "Traceback" not in log.read_text()
