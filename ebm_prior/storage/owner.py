"""Identification of processes, by which another process can tell whether the owner of a file is still running."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
from pathlib import Path
from typing import NamedTuple


class Owner(NamedTuple):
    """A process. Its start time distinguishes it from a later process with the same number."""

    machine: str  # 8 hexadecimal digits of its host, the host's last start, and the name space of its processes
    pid: int
    start: int  # clock ticks from the machine's start to that of the process; 0 where the system does not say

    @property
    def local(self) -> bool:
        """Whether the process belongs to this machine, so that `alive` can find it."""
        return self.machine == _machine()

    @property
    def alive(self) -> bool:
        """Whether the process is running. Only for local processes."""
        if os.name == "nt":  # where a signal 0 would be a Ctrl-C, and nothing else tells: the lock's age decides
            return True
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
    """The Owner that describes this process."""
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
