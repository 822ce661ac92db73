"""Settings of the C library's allocator: it keeps freed memory, since each training step allocates the same tensors."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST_KEPT = 32 * 2**20  # bytes: glibc accepts no more
KEPT_IN_ALL = 2**30


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB; by default it returns them to the kernel, which is slow to undo.

    The setting holds for the whole process, so only a program should choose it, never a library. Without glibc nothing
    happens.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, LARGEST_KEPT)
    _glibc("mallopt", M_TRIM_THRESHOLD, KEPT_IN_ALL)


def return_freed_memory() -> None:
    """Let glibc return to the kernel what it keeps, so that the free memory of the machine counts it."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such function; on Windows no such handle
        getattr(ctypes.CDLL(None), name)(*arguments)
