"""Jobs that go wrong in a process of their own, which imports them by their module's name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def fail_or_leave_a_mark(path: Path, fails: bool) -> None:
    if fails:
        raise ValueError("the first one")
    time.sleep(3)
    path.touch()


def kill() -> None:
    if signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        raise AssertionError("a job hears Ctrl-C, which is its parent's to hear")
    os.kill(os.getpid(), signal.SIGKILL)
