"""A whole fit on the linear-Gaussian toy, where what there is to gain has a closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from closed_form import (
    SIZES,
    Z_LIMIT,
    ArrayImages,
    Normal,
    Problem,
    aggregate_posterior,
    flat,
    gain_error,
    images_of,
    latent_prior,
    log_ratio,
    posterior_draws,
)
from torch import Tensor
from toys import LinearGaussian

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerChanges, SamplerConfig
from ebm_prior.training.fit import fit
from ebm_prior.training.fit_config import FitConfig
from ebm_prior.training.objectives import gain
from ebm_prior.training.stages import StageConfig


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.of(LinearGaussian(*SIZES).double().eval().requires_grad_(False))


HEADS = EnergyConfig(hidden=32, joint=32, dropout=0.0)
FITS = {
    "nce": FitConfig(iterations=300, evaluate_every=20, patience=100, ema=0.98, energy=HEADS),
    "nce, M = 5": FitConfig(noise_weight=5.0, iterations=300, evaluate_every=20, patience=100, ema=0.98, energy=HEADS),
    "mle": FitConfig(
        objective="mle",
        iterations=200,
        evaluate_every=20,
        patience=100,
        ema=0.98,
        learning_rate=2e-3,
        energy=HEADS,
        chains="persistent",
        chain=SamplerConfig(proposals=1, steps=4, step_size=0.4),
        sampler=SamplerChanges(proposals=1, steps=20, step_size=0.4),
    ),
}


def sampled(prior: EBMPrior, n: int, sampler: SamplerConfig) -> Tensor:
    return flat(prior.sample(n, seed=36, sampler=sampler, chunk=n).z).double()


@pytest.mark.parametrize("objective", FITS)
def test_fit_gains_what_there_is_to_gain(problem: Problem, objective: str) -> None:
    """On images of the toy a fit approaches KL(q ‖ p_β) on fresh latents, from below, and its samples approach q."""
    backbone = LinearGaussian(*SIZES).eval().requires_grad_(False)
    double = LinearGaussian(*SIZES).double().requires_grad_(False)
    images = images_of(double, problem.source, 20_000, derived_generator(32)).float()
    fresh = images_of(double, problem.source, 20_000, derived_generator(33)).float()
    z_q = backbone.infer(fresh, generator=derived_generator(34)).z
    z_p = backbone.sample(20_000, generator=derived_generator(35))
    possible = problem.q.kl(problem.p)
    course: list[float] = []

    def measure(shown: Mapping[str, Any]) -> None:
        prior = shown["prior"]
        course.append(gain(prior.f(z_q), prior.f(z_p)).nats)

    prior = fit(backbone, ArrayImages(images), FITS[objective], on_evaluate=measure)
    f_q, f_p = prior.f(z_q), prior.f(z_p)
    final, error = gain(f_q, f_p).nats, gain_error(f_q, f_p, 1.0)
    assert 0.9 * possible < final < possible + Z_LIMIT * error
    assert course[0] < 0.8 * final  # after 20 iterations there is still some way to go
    assert abs(prior.record["held_out"]["tempered"]["nats"] - final) < 0.2  # 2,000 held-out posterior draws

    draws = [sampled(prior, 2_000, sampler) for sampler in (ANCESTRAL, prior.sampler)]
    distance = [float((z.mean(0) - problem.q.mean).norm()) for z in draws]
    assert distance[1] < 0.2 * distance[0]


def far_apart(far: float) -> tuple[LinearGaussian, Normal, Normal, Normal, ArrayImages]:
    """A backbone, its p_β, the law of images, their q, and images: q lies too far from p_β for one ratio."""
    double = LinearGaussian(*SIZES).double().requires_grad_(False)
    p = latent_prior(double)
    shift = far * torch.tensor([4.8, -4.0, 4.8, -4.4, 4.0], dtype=torch.float64)
    source = Normal(p.mean + shift, 0.3 * p.covariance)
    images = images_of(double, source, 20_000, derived_generator(37)).float()
    return double, p, source, aggregate_posterior(double, source), ArrayImages(images)


def test_where_one_ratio_saturates_the_default_goes_on_in_stages() -> None:
    """The gains add up to most of KL(q ‖ p_β), of which one ratio finds little, and samples come near to q."""
    _, p, _, q, images = far_apart(1)
    backbone = LinearGaussian(*SIZES).eval().requires_grad_(False)
    stage = StageConfig(step_size=0.2, leapfrogs=3, every=1)
    prior = fit(backbone, images, FitConfig(iterations=600, evaluate_every=20, stage=stage))
    assert prior.record["saturated"]
    assert prior.regime == "calibrated"
    assert prior.record["held_out"]["tempered"]["nats"] > 0.8 * q.kl(p)
    drawn = sampled(prior, 2_000, replace(prior.sampler, steps=60))
    assert (drawn.mean(0) - q.mean).norm() < 0.1 * (p.mean - q.mean).norm()


def test_few_held_out_draws_show_that_a_ratio_saturates() -> None:
    """160 draws of p_β: an ESS of one of them is no less than 0.6 %, and says the same."""
    images = ArrayImages(far_apart(2)[-1].images[:400])
    backbone = LinearGaussian(*SIZES).eval().requires_grad_(False)
    saturated = fit(backbone, images, FitConfig(iterations=160, warmup=20, evaluate_every=20)).record["saturated"]
    assert saturated
    assert saturated["ess_fraction"] > 1 / 160


def test_a_short_fit_keeps_its_ratio_where_there_is_no_time_for_stages() -> None:
    backbone = LinearGaussian(*SIZES).eval().requires_grad_(False)
    prior = fit(backbone, far_apart(2)[-1], FitConfig(iterations=80))
    assert (prior.record["saturated"], prior.record["iterations"], prior.regime) == (None, 80, "calibrated")
    assert prior.record["held_out"]["plain"]["ess_fraction"] < 1e-3  # it has saturated
    assert prior.tau < 1


@pytest.mark.parametrize(("far", "least"), [(1, 12), pytest.param(2, 48, marks=pytest.mark.long)])
def test_stages_add_up_to_a_gain_that_one_ratio_cannot_show(far: int, least: int) -> None:
    """q lies so far from p_β that one ratio saturates; the gains of the stages sum to nearly KL(q ‖ p_β)."""
    double, p, source, q, images = far_apart(far)
    possible = q.kl(p)
    assert possible > least
    backbone = LinearGaussian(*SIZES).eval().requires_grad_(False)
    stage = StageConfig(moves=2, step_size=0.2, leapfrogs=3, every=1, groupwise=0.25)
    config = replace(FITS["nce"], iterations=400, ratios="staged", stage=stage)
    prior = fit(backbone, images, config)

    stages = prior.record["stages"]
    assert len(stages) > 5
    assert all(stage["gain"] > 0 and stage["ess_fraction"] > 0.2 for stage in stages)
    claimed = prior.record["held_out"]["tempered"]["nats"]
    assert claimed == pytest.approx(sum(stage["gain"] for stage in stages) + prior.record["clipped"]["gain"])
    # The true gain is KL(q ‖ p_β) − KL(q ‖ p_α), and log Z = log E_q[exp(f) p_β/q] needs no draws of p_α.
    z = flat(posterior_draws(double, Problem(p, source, q, log_ratio(q, p)), 50_000, 5))
    f = prior.f([group.float() for group in z.split(SIZES, dim=1)]).double()
    excess = f + p.distribution.log_prob(z) - q.distribution.log_prob(z)
    missing = float(excess.logsumexp(0)) - math.log(len(z)) - float(excess.mean())
    assert 0 < missing < 0.1 * possible
    assert abs(claimed - (possible - missing)) < 0.03 * possible
    assert abs(float(f.mean()) - claimed) < 0.05 * possible  # log Z is 0
    drawn = sampled(prior, 1_000, replace(prior.sampler, steps=100))  # from p_β, up to 49 nats away
    assert (drawn.mean(0) - q.mean).norm() < 0.05 * (p.mean - q.mean).norm()
