"""Run by torchrun in test_parallel: commands of ebm-prior one after another, some of them under hard conditions.

Each process has a cache of its own, FILE.cache{rank}, Inception is a small network, and few batches re-adjust batch
norms.

python two_processes.py FILE: JSON with lists of words. "commands" are run as they are. In "slow", the second process
takes ten times as long as the first for its share of a step, and longer than all time-outs. In "killed", the second
process dies while the first one is busy with its share. FILE.codes{rank} gets the exit codes of all but the last, and
FILE.killed the time of the death. Without "slow" and "killed" it ends after the commands.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from small_inception import stand_in
from torch.distributed import distributed_c10d

from ebm_prior.cli import use
from ebm_prior.cli.main import main
from ebm_prior.compute import heartbeat
from ebm_prior.compute.parallel import launched
from ebm_prior.runs import fit as fit_runs
from ebm_prior.training import fit

TIME_OUT = 3.0  # seconds, of torch's exchanges and of the signs of life
SLOW, QUICK = 6.0, 0.6  # seconds of the two shares of a step
SLOW_STEP, LAST_STEP = 1, 5  # iterations with a slow share, and with a death
REPLACED: list[tuple[Any, str, Any]] = [
    (fit_runs, "ITERATIONS", 20),
    (use, "load_inception", lambda _, mode, **__: stand_in(mode)),
]
"""What is replaced by something quicker: a module, a name in it, and its new value."""
VAIN = 60.0  # seconds of work that the death of the other process makes useless


def work(seconds: float) -> None:
    """Compute for some time, as networks do: outside of Python for most of it."""
    end, square = time.monotonic() + seconds, torch.full((200, 200), 0.001)
    while time.monotonic() < end:
        square @ square


@contextlib.contextmanager
def slow_second() -> Iterator[None]:
    """Inside the block the second process takes long for its share of one step."""

    def before(fitting: fit.Fitting) -> None:
        if fitting.iteration == SLOW_STEP:
            work(SLOW if fitting.processes.rank == 1 else QUICK)

    with _before_each_part(before):
        yield


@contextlib.contextmanager
def mortal_second(told: Path) -> Iterator[None]:
    """Inside the block the second process is killed in the midst of a fit, when the first one has long work to do."""

    def before(fitting: fit.Fitting) -> None:
        if fitting.iteration == LAST_STEP and fitting.processes.rank == 1:
            time.sleep(0.5)  # the other one is at work by now
            told.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        if fitting.iteration == LAST_STEP:
            work(VAIN)

    with _before_each_part(before):
        yield


@contextlib.contextmanager
def _before_each_part(before: Any) -> Iterator[None]:
    whole = fit.Fitting.part

    def part(self: Any, *arguments: Any) -> fit.Part:
        before(self)
        return whole(self, *arguments)

    with mock.patch.object(fit.Fitting, "part", part):
        yield


if __name__ == "__main__":
    faulthandler.dump_traceback_later(240, exit=True)  # processes that wait for one another would wait for long
    distributed_c10d.default_pg_timeout = timedelta(seconds=TIME_OUT)
    heartbeat.SILENCE = TIME_OUT
    file = Path(sys.argv[1])
    given = json.loads(file.read_text())
    os.environ["XDG_CACHE_HOME"] = str(file.with_suffix(f".cache{os.environ['RANK']}"))
    for module, name, replaced in REPLACED:
        setattr(module, name, replaced)
    with launched() as processes:
        codes = [main(words, standalone_mode=False) or 0 for words in given["commands"]]
        if "slow" in given:
            with slow_second():
                codes.append(main(given["slow"], standalone_mode=False) or 0)
        file.with_suffix(f".codes{processes.rank}").write_text(json.dumps(codes))
        if "killed" in given:
            with mortal_second(file.with_suffix(".killed")):
                sys.exit(main(given["killed"], standalone_mode=False))
