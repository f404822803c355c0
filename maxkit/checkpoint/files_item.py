# SPDX-License-Identifier: Apache-2.0
"""An Orbax item that is a folder of plain files: the manifest with the tokenizer, and the data position per
process.

Next to read: `store.py`.
"""

import dataclasses
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from etils import epath


class FilesHandler(ocp.AsyncCheckpointHandler):
    """Writes files in the background of an asynchronous save, before the step is committed.

    The files are asked for in the background too, so that their content may depend on what the devices are
    still computing (digests).
    """

    def __init__(self, *, every_process: bool = False):
        self._every_process = every_process

    async def async_save(self, directory: epath.Path, args: "FilesArgs") -> list[ocp.future.Future]:
        """Start writing; the futures end when the files are there."""
        name = f"write {directory.name}"
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, args), name=name)]

    async def _write(self, directory: epath.Path, args: "FilesArgs") -> None:
        files = args.files()  # on every process: it may wait for a result that all of them compute
        if not self._every_process and jax.process_index() != 0:
            return
        for name, content in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def save(self, directory: epath.Path, args: "FilesArgs") -> None:
        """Not used: the store saves asynchronously."""
        raise AssertionError("these files are read by manifest.py, never through Orbax")

    def restore(self, directory: epath.Path, args: "FilesArgs | None" = None) -> dict[str, bytes]:
        """Not used: `manifest.py` reads the files without Orbax."""
        raise AssertionError("these files are read by manifest.py, never through Orbax")


@ocp.args.register_with_handler(FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class FilesArgs(ocp.args.CheckpointArgs):
    """What to save: `files()` returns {name relative to the item: content}."""

    files: Callable[[], dict[str, bytes]] = dict
