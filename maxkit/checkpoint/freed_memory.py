# SPDX-License-Identifier: Apache-2.0
"""Freed memory goes back to the system at once: for programs that pass large arrays on one after the other.

glibc raises the size from which on a block is mapped by itself to that of the largest block that was freed (up to 32
MiB), and takes smaller ones from heaps that it keeps per thread. TensorStore has many threads: converting then kept
250 MB where 90 were in use (docs/design/009-convert-and-compare.md).
"""

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_BYTES = 1 << 20


def return_freed_memory() -> None:
    """Map every block from 1 MiB on by itself, in all of this process; nothing where malloc is not glibc's."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _BYTES)
