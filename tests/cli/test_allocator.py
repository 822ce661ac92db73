"""The allocator serves large blocks from memory that it keeps, not from mappings that end with each tensor."""

from __future__ import annotations

import platform

import pytest
from workshop import Workshop

MAPPED_BYTES = """
import ctypes, sys, torch
from ebm_prior.cli.allocator import keep_freed_memory
mallinfo = ctypes.CDLL(None).mallinfo2
class Info(ctypes.Structure):
    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(10)]
mallinfo.restype = Info
if sys.argv[1] == "keep":
    keep_freed_memory()
before = mallinfo().field_4  # hblkhd: bytes in blocks that are mapped one by one
kept = torch.ones(7 * 2**20)  # 28 MiB
print(mallinfo().field_4 - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")
def test_large_tensors_are_not_mapped_one_by_one(workshop: Workshop) -> None:
    def mapped(mode: str) -> int:
        with workshop.fork("-c", MAPPED_BYTES, mode) as process:
            return int(process.communicate()[0])

    assert mapped("default") >= 7 * 2**22
    assert mapped("keep") == 0
