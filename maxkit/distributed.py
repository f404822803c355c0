# SPDX-License-Identifier: Apache-2.0
"""Several hosts: start `jax.distributed` when, and only when, the environment says that there are several."""

import importlib.util
import os
import urllib.request
from pathlib import Path

import jax

from maxkit.errors import UserError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
GOOGLE = "0x1ae0"  # PCI vendor of TPU chips and of the network cards of Google's virtual machines
WORKERS = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"


def initialize() -> bool:
    """Join the other processes of this run; does nothing on one host or when it was done before.

    Either `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are set, or a cluster that JAX knows
    (Cloud TPU pod slice, GKE, Slurm, Open MPI) is found. Must run before the first array is made.

    Returns:
        Whether this process is one of several.

    Raises:
        UserError: only some of the three variables are set, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    given = {name: os.environ.get(name) for name in EXPLICIT}
    if any(given.values()):
        missing = [name for name, value in given.items() if not value]
        if missing:
            raise UserError(f"several hosts: {', '.join(missing)} must be set too ({', '.join(EXPLICIT)})")
        address, *numbers = given.values()
        for name, value in list(given.items())[1:]:
            if not value.isdecimal():
                raise UserError(f"several hosts: {name}={value!r} must be a number")
        _join(coordinator_address=address, num_processes=int(numbers[0]), process_id=int(numbers[1]))
        return True
    if _cluster_of_several():
        _join()
        return True
    return False


def _join(**where) -> None:
    # On a CPU, XLA makes as many threads as there are cores, and collectives of several simulated devices wait for each
    # other in them: with fewer threads than devices they wait for ever.
    os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, 16)))
    try:
        jax.distributed.initialize(**where)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        found = where or "what it found"
        raise UserError(f"several hosts: jax.distributed could not start with {found}: {reason}") from error


def _cluster_of_several() -> bool:
    """Whether the variables of a known cluster, or the TPU VM itself, name more than one process."""
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1").isdigit() and int(os.environ.get(name, "1")) > 1:
            return True
    return tpu_vm_hosts() > 1


def tpu_vm_hosts(pci: Path = Path("/sys/bus/pci/devices")) -> int:
    """Hosts of the Cloud TPU slice that this virtual machine belongs to; 1 on any other machine.

    A shell on a TPU VM has no variable that says it; the metadata server knows, and JAX asks it as well. It is asked
    only where the TPU runtime would be used and the hardware is Google's: nobody else's start waits for a network.
    On GKE `TPU_WORKER_HOSTNAMES` has told already.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    told = os.environ.get("TPU_WORKER_HOSTNAMES") or os.environ.get("TPU_SKIP_MDS_QUERY")
    if told or (platforms and "tpu" not in platforms.split(",")) or importlib.util.find_spec("libtpu") is None:
        return 1
    if not any(vendor.read_text().strip() == GOOGLE for vendor in pci.glob("*/vendor")):
        return 1
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{server}{WORKERS}", headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode().count(",") + 1
    except OSError:  # no such server or no such entry: not a slice that JAX could join either
        return 1
