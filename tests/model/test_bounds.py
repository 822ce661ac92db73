"""Bounds from log weights: arithmetic by hand, and limits that hold for weights as heavy-tailed as one likes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ebm_prior.model.bounds import Bounds, Difference, bounds_of

FOUND = Bounds(
    *(-0.1, 0.1, 0.02, 0.03),
    repetitions=32,
    chains=8,
    spread=(0.9, 1.1),
    rungs=20,
    leapfrogs=5,
    moves=20,
    acceptance=0.7,
    drift=Difference(0.1, 0.1),
    apart=None,
)


def test_the_bounds_are_means_over_repetitions() -> None:
    weights = torch.tensor([1.0, 3.0, 2.0, 4.0])
    lower, upper, lower_error, upper_error = bounds_of(weights.log(), weights.log(), 2)
    assert lower == pytest.approx((math.log(2) + math.log(3)) / 2)
    harmonic = [2 / (1 + 1 / 3), 2 / (1 / 2 + 1 / 4)]
    assert upper == pytest.approx((math.log(harmonic[0]) + math.log(harmonic[1])) / 2)
    assert lower_error == pytest.approx(abs(math.log(3) - math.log(2)) / 2)
    assert upper_error == pytest.approx(abs(math.log(harmonic[1]) - math.log(harmonic[0])) / 2)


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_the_limits_hold_whatever_the_weights(spread: float) -> None:
    """Log-normal weights of mean 1; with a spread of 3, one in thousands has most of the mean."""
    generator, misses, trials, repetitions = torch.Generator().manual_seed(0), [0, 0], 2000, 4
    for _ in range(trials):
        up, down = (spread * torch.randn(repetitions * 2, generator=generator).double() - spread**2 / 2 for _ in "ud")
        bounds = replace(FOUND, repetitions=repetitions)
        low, high = replace(bounds, **dict(zip(("lower", "upper"), bounds_of(up, -down, 4), strict=False))).limits()
        misses[0] += low > 0
        misses[1] += high < 0
    assert max(misses) <= 0.025 * trials


def test_limits_widen_with_the_level_and_narrow_with_the_repetitions() -> None:
    low, high = FOUND.limits()
    assert (low, high) == (pytest.approx(-0.1 - math.log(40) / 32), pytest.approx(0.1 + math.log(40) / 32))
    assert FOUND.limits(0.99)[0] < low
    assert replace(FOUND, repetitions=64).limits()[0] > low


def test_what_is_closed_and_settled() -> None:
    assert FOUND.closed
    assert FOUND.settled
    assert not replace(FOUND, upper=0.41).closed
    assert not replace(FOUND, upper=-0.61).closed  # the wrong way round: its chains began elsewhere
    assert not replace(FOUND, drift=Difference(0.4, 0.1)).settled
    assert not replace(FOUND, apart=Difference(-0.4, 0.1)).settled
    assert replace(FOUND, apart=Difference(0.4, math.nan)).settled  # of one chain: nothing can be found


def test_a_difference_and_its_error() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 4.0])
    assert Difference.of(a) == (pytest.approx(2), pytest.approx(math.sqrt(1 / 3)))
    assert Difference.of(a, b) == (pytest.approx(0), pytest.approx(math.sqrt(1 / 3 + 8 / 2)))
