"""Independent runs, several at a time: each in a process of its own, on one thread."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def run_all(
    function: Callable[..., Result],
    calls: Sequence[Mapping[str, Any]],
    *,
    jobs: int = 1,
    on_done: Callable[[Sequence[Result]], None] | None = None,
) -> list[Result]:
    """`[function(**call) for call in calls]`, `jobs` of them at a time; what one raises ends all.

    With one job they run in this process; with more, the function and all arguments are pickled. `on_done` gets the
    results so far, in the order of the calls, after each. Several jobs on a GPU fill the time in which a host prepares
    the small kernels of one.
    """
    found: dict[int, Result] = {}

    def keep(index: int, result: Result) -> None:
        found[index] = result
        if on_done:
            on_done([found[i] for i in sorted(found)])

    if jobs == 1:
        for index, call in enumerate(calls):
            keep(index, function(**call))
    else:
        # Threads that wait for work by spinning take the processors from those that have some: one each.
        with ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            running = {pool.submit(function, **call): index for index, call in enumerate(calls)}
            try:
                for future in as_completed(running):
                    keep(running[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [found[index] for index in range(len(calls))]


def clock(device: torch.device) -> float:
    """Seconds: of this process's own work on a CPU, which others do not lengthen; on the wall with a GPU."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()
