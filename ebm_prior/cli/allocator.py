"""The C library's allocator, told to keep freed memory: a training step allocates the same tensors again and again."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST_KEPT = 32 * 2**20  # bytes: glibc accepts no more
KEPT_IN_ALL = 2**30


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of up to 32 MiB; by default it returns them to the kernel and faults them in again.

    It holds for the whole process, so a program may decide it but not a library. Without glibc it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no such function; on Windows no such handle
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(M_TRIM_THRESHOLD, KEPT_IN_ALL)
