# SPDX-License-Identifier: Apache-2.0
"""A file whose bytes are looked at where they lie, of which only the part that was asked for last stays in memory."""

import mmap
from pathlib import Path

import numpy as np


class MappedFile:
    """A file mapped read-only; `data` are its bytes. Raises OSError or (for an empty file) ValueError."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as stream:
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._last = (0, 0)

    def view(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        """`count` numbers from byte `start` on.

        Views given before stay right: their pages were let go and come back from the file when they are looked at.
        Otherwise a file that is read from end to end would count as memory of this process.
        """
        part = start // mmap.PAGESIZE * mmap.PAGESIZE, start + count * dtype.itemsize
        if part != self._last and hasattr(mmap, "MADV_DONTNEED"):
            begin, end = self._last
            if end > begin:
                self.data.madvise(mmap.MADV_DONTNEED, begin, end - begin)
            self._last = part
        return np.frombuffer(self.data, dtype, count=count, offset=start)
