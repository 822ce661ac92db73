"""Which process something belongs to: named such that other processes can tell whether it still lives."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
from pathlib import Path
from typing import NamedTuple


class Owner(NamedTuple):
    """A process: of two with one number, the start time tells them apart."""

    machine: str  # 8 hexadecimal digits of its host, the host's last start, and the name space of its processes
    pid: int
    start: int  # clock ticks from the machine's start to that of the process; 0 where the system does not say

    @property
    def local(self) -> bool:
        """Whether it runs, or ran, where this process does, so that `alive` can tell."""
        return self.machine == _machine()

    @property
    def alive(self) -> bool:
        """Whether this very process is there; of a local one alone."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OverflowError:  # no number of a process
            return False
        except OSError:  # of another user
            pass
        state, start = _state_and_start(self.pid)
        return state != "Z" and (0 in (start, self.start) or start == self.start)


def this_process() -> Owner:
    """The process that asks."""
    pid = os.getpid()  # another one after a fork
    return Owner(_machine(), pid, _state_and_start(pid)[1])


@functools.cache
def _machine() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux: the host's name must do
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _state_and_start(pid: int) -> tuple[str, int]:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
        return words[0], int(words[19])
    except (OSError, ValueError, IndexError):
        return "", 0
