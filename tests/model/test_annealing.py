"""Annealed chains: on any ladder their weights have the means that theory says; a pilot finds a ladder that fits."""

from __future__ import annotations

import math

import pytest
import torch
from closed_form import Z_LIMIT
from known_log_z import TARGETS, Known
from torch import Tensor

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.errors import DivergenceError
from ebm_prior.model.annealing import QUARTER, Ladder, climb, descend, find_ladder, stay
from ebm_prior.model.samplers import start

COARSE = Ladder((0.2, 0.4, 0.6, 0.8, 1.0), (0.3, 0.3, 0.2, 0.2, 0.1), 2)
N = 20_000


def normal(n: int, dimensions: int, seed: int) -> list[Tensor]:
    return [torch.randn(n, dimensions, generator=derived_generator(80, seed), dtype=torch.float64)]


def require_mean(log_weights: Tensor, log_mean: float) -> None:
    """The mean of the weights lies within `Z_LIMIT` standard errors of the mean that they should have."""
    ratio = (log_weights - log_mean).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.1
    assert abs(float(ratio.mean()) - 1) < Z_LIMIT * error


@pytest.fixture(params=sorted(TARGETS))
def target(request: pytest.FixtureRequest) -> Known:
    return TARGETS[request.param](3)


def test_the_mean_weight_of_climbing_chains_is_z(target: Known) -> None:
    """On a ladder so coarse that chains arrive far from the target."""
    begun = start(target.g, normal(N, 3, 1))
    end, log_weights = climb(target.g, begun, COARSE, derived_generator(81))
    require_mean(log_weights, target.log_z)
    assert float(log_weights.mean()) < target.log_z - 0.2
    torch.testing.assert_close(end.value, target.g(end.eps))


def test_the_mean_inverse_weight_of_descending_chains_is_one_over_z(target: Known) -> None:
    exact = target.exact(N, derived_generator(82))
    log_weights = descend(target.g, start(target.g, exact), COARSE, derived_generator(83))
    require_mean(-log_weights, -target.log_z)
    assert float(log_weights.mean()) > target.log_z + 0.2


def test_chains_that_stay_keep_the_target(target: Known) -> None:
    begun = start(target.g, target.exact(N, derived_generator(84)))
    end, acceptance = stay(target.g, begun, COARSE, 5, derived_generator(85))
    assert 0.5 < float(acceptance.mean()) < 1
    a, b = begun.value, end.value
    assert abs(float(a.mean() - b.mean())) < Z_LIMIT * float((a.var() + b.var()).sqrt()) / math.sqrt(N)


def test_a_constant_has_no_spread() -> None:
    def constant(eps: list[Tensor]) -> Tensor:
        return 0 * eps[0].sum(1) - 1.5

    state = start(constant, normal(10, 2, 0))
    for log_weights in (
        climb(constant, state, COARSE, derived_generator(0))[1],
        descend(constant, state, COARSE, derived_generator(0)),
    ):
        torch.testing.assert_close(log_weights, torch.full((10,), -1.5, dtype=torch.float64))
    ladder = find_ladder(constant, normal(64, 2, 0), derived_generator(0), ess=0.9, leapfrogs=1, most=100)
    assert ladder.taus == (1.0,)


def test_a_ladder_follows_the_conditional_ess(target: Known) -> None:
    found = {}
    for ess in (0.8, 0.95, 0.99):
        found[ess] = find_ladder(target.g, normal(64, 3, 2), derived_generator(86), ess=ess, leapfrogs=3, most=500)
        taus = found[ess].taus
        assert taus[-1] == 1
        assert all(low < high for low, high in zip((0.0, *taus), taus, strict=False))
        assert sum(found[ess].increments()) == pytest.approx(1)
    assert found[0.8].rungs < found[0.95].rungs < found[0.99].rungs
    # A trajectory of three turns by 2 arctan √(δ/2) each goes no further than a quarter of a period.
    assert max(3 * 2 * math.atan(math.sqrt(0.5 * size)) for size in found[0.99].step_sizes) <= QUARTER + 1e-9
    short = find_ladder(target.g, normal(64, 3, 2), derived_generator(86), ess=0.99, leapfrogs=3, most=4)
    assert short.rungs <= 4


def test_step_sizes_follow_the_acceptance() -> None:
    """Narrow in one direction of two, the target needs steps that are shorter than a quarter of a period."""

    def narrow(eps: list[Tensor]) -> Tensor:
        return -500 * eps[0][:, 0] ** 2

    ladder = find_ladder(narrow, normal(64, 2, 3), derived_generator(87), ess=0.9, leapfrogs=3, most=500)
    assert ladder.step_sizes[-1] < 0.1 * ladder.step_sizes[0]
    begun = start(narrow, [normal(500, 2, 4)[0] * torch.tensor([1 / math.sqrt(1001), 1.0])])
    assert 0.4 < float(stay(narrow, begun, ladder, 10, derived_generator(88))[1].mean()) < 0.85


def test_an_energy_that_is_not_finite_is_named() -> None:
    def broken(eps: list[Tensor]) -> Tensor:
        return eps[0].sum(1) / 0

    with pytest.raises(DivergenceError, match="not finite along annealed chains"):
        find_ladder(broken, normal(64, 2, 0), derived_generator(0), ess=0.9, leapfrogs=1, most=10)
