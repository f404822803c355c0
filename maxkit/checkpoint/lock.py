# SPDX-License-Identifier: Apache-2.0
"""One writer per folder of checkpoints: a lock that the system releases when its process dies. No JAX."""

import errno
import fcntl
import os
import pathlib

from maxkit.errors import UserError

LOCK_FILE = ".lock"


class FolderLock:
    """The exclusive right of this process to write into a local folder.

    A POSIX record lock: it is not inherited by forked data workers, works on NFS, and ends with the process,
    also after kill -9. Within one process it does not exclude; the store takes care of that.
    """

    def __init__(self, folder: pathlib.Path):
        """Take the lock.

        Raises:
            UserError: another process has it, or the folder cannot be written.
        """
        path = folder / LOCK_FILE
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"checkpoint folder {folder} cannot be written: {error.strerror}: give another run_dir"
            ) from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._file, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"checkpoint folder {folder} cannot be locked: {error.strerror}: give another run_dir"
                ) from error
            raise UserError(
                f"checkpoint folder {folder} is in use by another process ({holder}): "
                "wait for it or give another run_dir"
            ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back; the file stays (removing it would let two processes lock two files of one
        name).
        """
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
