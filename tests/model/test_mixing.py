"""Split R̂, effective sample sizes and autocorrelation times: known laws, and the figures of another implementation."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from closed_form import Problem
from numpy.typing import NDArray
from toys import LinearGaussian

from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.model import mixing, traces
from ebm_prior.model.mixing import Mixing
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import ChainState, SamplerConfig
from ebm_prior.model.traces import Diagnosis, diagnose, long_enough

Array = NDArray[np.float64]
STICKY = SamplerConfig(proposals=1, steps=40, step_size=0.002)


def autoregressive(phi: float, steps: int, chains: int, seed: int = 0) -> Array:
    """Stationary chains with correlation φ^k at lag k, and so an autocorrelation time of (1 + φ)/(1 − φ)."""
    noise = np.random.default_rng(seed).normal(size=(steps, chains))
    values = noise.copy()
    for step in range(1, steps):
        values[step] = phi * values[step - 1] + math.sqrt(1 - phi**2) * noise[step]
    return values


def found(values: Array) -> Mixing:
    return Mixing.of(torch.from_numpy(values))


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_the_autocorrelation_time_is_the_true_one(phi: float) -> None:
    known = (1 + phi) / (1 - phi)
    assert found(autoregressive(phi, 20_000, 8)).time == pytest.approx(known, rel=0.06)
    independent = found(autoregressive(0.0, 4_000, 4))
    assert independent.r_hat < 1.003
    assert independent.bulk_ess == pytest.approx(16_000, rel=0.1)


CASES = {
    "independent": autoregressive(0.0, 200, 4),
    "slow": autoregressive(0.9, 500, 4, 1),
    "alternating": autoregressive(-0.5, 100, 3, 2),
    "apart": autoregressive(0.5, 200, 4, 3) + 0.3 * np.arange(4),
    "ties": np.round(autoregressive(0.8, 300, 4, 4)),
    "short": autoregressive(0.95, 40, 16, 5),
    "heavy tails": np.random.default_rng(6).standard_cauchy((301, 4)),
}
# What arviz-stats 0.8.0 prints for them: rhat(method="rank"), ess bulk, ess tail (.05, .95).
PUBLISHED = {
    "independent": (0.998802, 790.507, 811.876),
    "slow": (1.054613, 93.502, 296.140),
    "alternating": (0.992399, 743.136, 257.458),
    "apart": (1.064793, 53.468, 504.540),
    "ties": (1.013435, 184.586, 331.299),
    "short": (1.819078, 28.676, 73.099),
    "heavy tails": (1.002123, 1270.647, 1135.384),
}


@pytest.mark.parametrize("name", CASES)
def test_the_figures_are_those_of_arviz(name: str) -> None:
    assert found(CASES[name])[:3] == pytest.approx(PUBLISHED[name], rel=1e-4)


def test_chains_apart_and_chains_of_other_width_are_seen() -> None:
    values = autoregressive(0.0, 400, 4)
    assert found(values + 2 * (np.arange(4) == 0)).r_hat > 1.2
    assert found(values * (1 + 3 * (np.arange(4) == 0))).r_hat > 1.05
    drift = np.linspace(0, 3, 400)[:, None]
    assert found(values + drift).r_hat > 1.2  # all chains alike: only halves can tell


def test_nothing_is_said_of_what_is_constant_or_too_short() -> None:
    for values in (np.ones((40, 4)), autoregressive(0.0, 7, 4), np.full((40, 4), np.inf)):
        assert all(math.isnan(number) for number in found(values))
        assert found(values).mixed(40)


def test_what_has_mixed() -> None:
    assert Mixing(1.04, 100, 100, 4.0).mixed(40)
    assert not Mixing(1.06, 100, 100, 4.0).mixed(40)
    assert not Mixing(1.04, 100, 100, 4.1).mixed(40)
    slow, quick = Mixing(1.2, 10, 10, 30.0), Mixing(1.2, 10, 10, 20.0)
    assert Diagnosis(4, 40, {"a": quick, "b": slow, "c": Mixing(1.0, 9, 9, 1.0)}).unmixed == ["b", "a"]


@pytest.fixture(scope="module")
def prior() -> EBMPrior:
    backbone = LinearGaussian().double().eval().requires_grad_(False)
    return EBMPrior(backbone, Problem.of(backbone).best)  # type: ignore[arg-type]


def test_chains_that_crawl_and_chains_that_jump(prior: EBMPrior) -> None:
    crawling = diagnose(prior, STICKY)
    assert set(crawling.mixing) == {"f", "‖ε‖ z2", "‖ε‖ z1"}
    assert "f" in crawling.unmixed
    jumping = diagnose(prior, replace(STICKY, step_size=0.3, leapfrogs=4, steps=400))
    assert jumping.unmixed == []
    assert diagnose(prior, STICKY) == crawling  # of a seed
    assert diagnose(prior, STICKY, seed=1) != crawling


def test_steps_that_are_long_enough(prior: EBMPrior) -> None:
    quick, by = long_enough(prior, replace(STICKY, step_size=1.0))
    assert by.unmixed == []
    assert quick.steps == math.ceil(10 * by.longest_time) <= by.steps
    slower, _ = long_enough(prior, replace(STICKY, step_size=0.1))
    assert slower.steps > 2 * quick.steps


def test_chains_that_leave_the_numbers_are_no_short_chains(prior: EBMPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a refiner may before they begin anew."""

    def exploding(potential: Any, propose: Any, sampler: SamplerConfig, generator: Any, keep: Any) -> None:
        for step in range(sampler.steps):
            value = torch.full((16,), math.inf if step == 30 else 0.0).double()
            keep(step, ChainState(propose(), value, []), None)

    monkeypatch.setattr(traces, "draw", exploding)
    with pytest.raises(DivergenceError, match="no longer finite numbers"):
        long_enough(prior, STICKY)


def test_samplers_without_chains_of_all_groups_are_refused(prior: EBMPrior) -> None:
    for sampler in (SamplerConfig(steps=0), SamplerConfig(by_group=True)):
        with pytest.raises(ConfigurationError, match="a diagnosis needs chains of all groups together"):
            diagnose(prior, sampler)


def test_the_example_runs() -> None:
    assert doctest.testmod(mixing).failed == 0
    assert doctest.testmod(mixing).attempted > 0
    assert traces.CHAINS > 4
