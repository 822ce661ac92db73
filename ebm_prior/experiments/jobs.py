"""Independent runs, several at a time: each in a process of its own, on one thread."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from ebm_prior.errors import DivergenceError, ProcessError

Result = TypeVar("Result")


def run_all(
    function: Callable[..., Result],
    calls: Sequence[Mapping[str, Any]],
    *,
    jobs: int = 1,
    on_done: Callable[[Sequence[Result]], None] | None = None,
) -> list[Result]:
    """`[function(**call) for call in calls]`, with `jobs` of them at a time; an error in one ends all at once.

    With one job they run in this process; with more, the function and all arguments are pickled. `on_done` gets the
    results so far, in the order of the calls, after each. Raises ProcessError where a process was killed.
    """
    found: dict[int, Result] = {}

    def keep(index: int, result: Result) -> None:
        found[index] = result
        if on_done:
            on_done([found[i] for i in sorted(found)])

    if jobs == 1:
        for index, call in enumerate(calls):
            keep(index, function(**call))
        return [found[index] for index in range(len(calls))]
    others = set(multiprocessing.active_children())
    # One thread per process: threads that wait actively would take the processors from those that work.
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        with _deaf_children():
            running = {pool.submit(function, **call): index for index, call in enumerate(calls)}
        for future in as_completed(running):
            keep(running[future], future.result())
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise ProcessError(
                f"one of {jobs} jobs was killed, most often because memory ran out: give fewer --jobs"
            ) from error
        raise
    pool.shutdown()
    return [found[index] for index in range(len(calls))]


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that begin inside do not hear Ctrl-C, which a terminal sends to all: this one does, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # one that came meanwhile is heard now


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Inside the block, prefix a DivergenceError with `what`, and drop its model, which may not be picklable."""
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(f"{what}: {error}") from error


def clock(device: torch.device) -> float:
    """Seconds for timing: this process's CPU time on a CPU, which other processes do not affect; wall time on a GPU."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()
