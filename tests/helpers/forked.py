"""Processes that begin where the imports end: forked from one that has imported the library and done nothing else.

Python takes two seconds to import torch, which few tests of a process are about.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from types import TracebackType

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["ebm_prior.cli.main", *(f"ebm_prior.{name}" for name in ("api", "runs.fit", "runs.pretrain", "runs.train"))]
)


class Forked:
    """`python WORDS` (a file, -m MODULE or -c PROGRAM) in a process of its own, with what tests use of Popen."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        (out, says), (err, complains) = FORKS.Pipe(duplex=False), FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=_run, args=(list(words), dict(environment), says, complains))
        self.process.start()
        for passed_on in (says, complains):
            passed_on.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(pipe.fileno()), "rb") for pipe in (out, err))
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal that ended it, or None as long as it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 240) -> tuple[bytes, bytes]:
        """What it has said on stdout and stderr, a pipe's 64 kB at most, when it has ended."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            raise TimeoutError(f"process {self.pid} has not ended within {timeout} s")
        return self.stdout.read(), self.stderr.read()

    def __enter__(self) -> Forked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.kill()
        self.process.join()
        self.stdout.close()
        self.stderr.close()


def _run(words: list[str], environment: dict[str, str], out: Connection, err: Connection) -> None:
    """In the new process: what the interpreter does with its command line."""
    os.environ.update(environment)
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # too late for torch to see by itself
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
