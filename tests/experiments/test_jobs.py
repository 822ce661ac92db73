"""Independent runs: their order, what they report, and how one that fails ends all."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from spawned_jobs import fail_or_leave_a_mark, kill

from ebm_prior.errors import DivergenceError, ProcessError
from ebm_prior.experiments.jobs import clock, named, run_all


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_are_in_the_order_of_the_calls(jobs: int) -> None:
    seen: list[list[complex]] = []

    def keep(found: Sequence[complex]) -> None:
        seen.append(list(found))

    calls = [{"real": real, "imag": 1} for real in range(4)]
    assert run_all(complex, calls, jobs=jobs, on_done=keep) == [1j, 1 + 1j, 2 + 1j, 3 + 1j]
    assert [len(found) for found in seen] == [1, 2, 3, 4]
    assert all(found == sorted(found, key=lambda z: z.real) for found in seen)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_is_raised_as_it_was(jobs: int) -> None:
    calls = [{"base": 3, "exp": -1, "mod": 4}, {"base": 2, "exp": -1, "mod": 4}]  # 2 has no inverse modulo 4
    found: list[int] = []
    with pytest.raises(ValueError, match="not invertible"):
        run_all(pow, calls, jobs=jobs, on_done=lambda results: found.extend(results))
    assert set(found) <= {3}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_ends_those_that_run_and_those_that_wait(jobs: int, tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match="the first one"):
        run_all(fail_or_leave_a_mark, [{"path": tmp_path / str(k), "fails": k == 0} for k in range(12)], jobs=jobs)
    while processes := set(multiprocessing.active_children()) - others:
        processes.pop().join(20)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_job_says_what_to_do() -> None:
    with pytest.raises(ProcessError, match="fewer --jobs"):
        run_all(kill, [{}, {}], jobs=2)


def test_a_divergence_says_of_what() -> None:
    with pytest.raises(DivergenceError, match=r"^digit 4: the loss is nan$") as caught, named("digit 4"):
        raise DivergenceError("the loss is nan", kept=torch.ones(3))
    assert caught.value.kept is None


def test_a_clock_goes_forward() -> None:
    cpu = torch.device("cpu")
    began = clock(cpu)
    sum(range(100_000))
    assert clock(cpu) > began
