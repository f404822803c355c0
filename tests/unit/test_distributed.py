# SPDX-License-Identifier: Apache-2.0
"""How many hosts a TPU VM's slice has: asked of a metadata server, here one on localhost, only on Google's hardware."""

import http.server
import threading

import pytest

from maxkit import distributed


class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        known = self.path == distributed.WORKERS and self.headers["Metadata-Flavor"] == "Google" and self.server.workers
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(self.server.workers.encode())

    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as running:
        running.asked, running.workers = [], "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def tpu_vm(server, tmp_path, monkeypatch):
    """A machine with one of Google's devices and the TPU runtime installed."""
    for name in ("JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    (tmp_path / "libtpu.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name, vendor in {"0000:00:04.0": "0x8086", "0000:00:05.0": distributed.GOOGLE}.items():
        (tmp_path / "pci" / name).mkdir(parents=True)
        (tmp_path / "pci" / name / "vendor").write_text(f"{vendor}\n")
    return tmp_path / "pci"


def test_the_hosts_of_a_slice_are_counted(server, tpu_vm):
    assert distributed.tpu_vm_hosts(tpu_vm) == 2
    server.workers = "10.0.0.2"
    assert distributed.tpu_vm_hosts(tpu_vm) == 1
    server.workers = ""
    assert distributed.tpu_vm_hosts(tpu_vm) == 1  # a virtual machine without TPU knows no such entry
    assert server.asked == [distributed.WORKERS] * 3


@pytest.mark.parametrize(
    ("name", "value"), [("JAX_PLATFORMS", "cpu"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_SKIP_MDS_QUERY", "1")]
)
def test_nobody_is_asked_where_the_environment_has_told(server, tpu_vm, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert distributed.tpu_vm_hosts(tpu_vm) == 1 and not server.asked


def test_nobody_is_asked_without_googles_hardware(server, tpu_vm):
    (tpu_vm / "0000:00:05.0" / "vendor").write_text("0x10de\n")
    assert distributed.tpu_vm_hosts(tpu_vm) == 1 and not server.asked


def test_no_server_is_no_slice(tpu_vm, monkeypatch):
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:1")
    assert distributed.tpu_vm_hosts(tpu_vm) == 1
