"""Independent runs: their order, what they report, and how one that fails ends all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ebm_prior.jobs import clock, run_all


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


def test_a_clock_goes_forward() -> None:
    cpu = torch.device("cpu")
    began = clock(cpu)
    sum(range(100_000))
    assert clock(cpu) > began
