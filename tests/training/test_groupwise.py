"""Groupwise ratios: held to closed forms on the linear-Gaussian toy, and fitted on a network with shared heads."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closed_form import SIZES, ArrayImages, Problem, flat, images_of, posterior_draws
from small_fits import OBJECTIVES, small
from torch import Tensor
from toys import LinearGaussian
from workshop import SMALL_FIT

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import Potential, SamplerConfig, effective_sample_size
from ebm_prior.storage.checkpoint import load_prior
from ebm_prior.storage.records import FIT_RECORD, keeps_to
from ebm_prior.training.fit import fit
from ebm_prior.training.fit_config import GROUPWISE_SAMPLER, FitConfig
from ebm_prior.training.groupwise import ANNEALING_STEPS, LARGEST_TAU, annealed_weights, likeliest

FIT = FitConfig(
    ratios="groupwise",
    iterations=400,
    evaluate_every=20,
    patience=100,
    ema=0.98,
    energy=EnergyConfig(hidden=32, joint=32),
)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.of(LinearGaussian(*SIZES).double().eval().requires_grad_(False))


@pytest.fixture(scope="module")
def fitted(problem: Problem) -> EBMPrior:
    images = images_of(LinearGaussian(*SIZES).double(), problem.source, 20_000, derived_generator(32)).detach()
    backbone = LinearGaussian(*SIZES).eval().requires_grad_(False)
    return fit(backbone, ArrayImages(images.float()), FIT)


def test_the_gains_of_the_groups_add_up_to_the_divergence(problem: Problem, fitted: EBMPrior) -> None:
    """By the chain rule KL(q ‖ p_β) is the sum of the conditional divergences, of which f finds nearly all."""
    possible, groups = problem.q.kl(problem.p), fitted.record["groups"]
    claimed = math.fsum(group["gain"] for group in groups)
    assert claimed == fitted.record["held_out"]["tempered"]["nats"]
    z = posterior_draws(LinearGaussian(*SIZES).double(), problem, 20_000, 5)
    found = float(fitted.f([group.float() for group in z]).mean().detach())
    assert found == pytest.approx(possible, rel=0.1)
    assert claimed == pytest.approx(found, abs=0.05)


def test_log_z_of_each_group_is_0(fitted: EBMPrior) -> None:
    """Before the correction it is near 0, since f is near the ratio; after it, of all groups together under p_β."""
    for group in fitted.record["groups"]:
        assert abs(group["log_z"]) < 0.3
        assert group["log_z_error"] < 0.1
        assert 0.8 < group["tau"] < 1.2
    log_z, ess = fitted.log_normalizer(n=20_000, chunk=4096)
    assert abs(log_z) < 0.1
    assert ess > 0.1


def test_f_has_the_same_mean_over_draws_as_over_posterior_latents(problem: Problem, fitted: EBMPrior) -> None:
    """The condition of the largest likelihood, which the default sampler's draws must be long enough to show."""
    z = posterior_draws(LinearGaussian(*SIZES).double(), problem, 20_000, 6)
    posterior, drawn = (
        fitted.f(found).detach() for found in ([group.float() for group in z], fitted.sample(4_000, seed=2).z)
    )
    assert float(drawn.mean() - posterior.mean()) == pytest.approx(0, abs=0.1 * float(posterior.mean()))


def test_draws_by_group_have_the_posteriors_moments(problem: Problem, fitted: EBMPrior) -> None:
    assert fitted.sampler.by_group
    z = flat(fitted.sample(4_000, seed=1, chunk=4096).z).double()
    mean, covariance = problem.q
    sd = covariance.diagonal().sqrt()
    assert ((z.mean(0) - mean) / sd).abs().max() < 0.1  # the standard error is .016
    assert ((problem.p.mean - mean) / sd).abs().max() > 0.5
    assert (z.T.cov() - covariance).abs().max() < 0.12


def tilt(size: float) -> Potential:
    """g = size · ⟨a, ε⟩ − ½⟨a, a⟩ with a = (2, 2, 2, 2); at size 1 the tilted density is 8 nats from N(0, I)."""
    a = torch.full((4,), 2.0).double()
    return lambda eps: size * eps[0] @ a - 0.5 * a @ a


def test_annealed_weights_estimate_a_normaliser_that_plain_ones_miss() -> None:
    """log E[e^{τg}] = 8 (τ² − τ)."""
    weights = annealed_weights(tilt(1.0), torch.zeros(1_000, 4).double(), derived_generator(7))
    for step in (ANNEALING_STEPS // 4, ANNEALING_STEPS // 2):
        tau, column = LARGEST_TAU * step / ANNEALING_STEPS, weights[:, step - 1]
        log_z = float(column.logsumexp(0)) - math.log(len(column))
        assert log_z == pytest.approx(8 * (tau**2 - tau), abs=0.25)
    plain = tilt(1.0)([torch.randn(1_000, 4, generator=derived_generator(8)).double()])
    assert effective_sample_size(column) > 20 * effective_sample_size(plain)


@pytest.mark.parametrize("lost", [0.7, 1.0, 1.6])
def test_tempering_finds_the_factor_that_was_lost(lost: float) -> None:
    """Of a g with a factor too much or too little: posterior draws are at mean a, where E[⟨a, ε⟩] = 16."""
    weights = annealed_weights(tilt(lost), torch.zeros(1_000, 4).double(), derived_generator(9))
    found = likeliest(lost * 16 - 8, weights)
    assert found.tau == pytest.approx(1 / lost, abs=0.1)
    assert found.gain == pytest.approx(8, abs=0.3)
    assert found.log_z == pytest.approx(8 * (1 - found.tau), abs=0.5)
    assert 0 < found.log_z_error < 0.2


def test_tempering_leaves_a_useless_f_out_and_keeps_to_the_floor_of_the_ess() -> None:
    weights = annealed_weights(tilt(1.0), torch.zeros(200, 4).double(), derived_generator(10))
    assert likeliest(-8.0, weights) == (0, 0, 0, 0, 1)
    bold = likeliest(40.0, weights, 0.8)
    assert bold.ess_fraction >= 0.8
    assert 0 < bold.tau < likeliest(40.0, weights).tau


def test_a_prior_of_groupwise_ratios_is_saved_and_read(backbone: Backbone, images: ImageSource, tmp_path: Path) -> None:
    prior = fit(backbone, images, OBJECTIVES["groupwise"])
    assert keeps_to(FIT_RECORD, prior.record)
    assert [group["name"] for group in prior.record["groups"]] == [group.name for group in backbone.groups]
    prior.save(tmp_path / "prior.safetensors")
    again = load_prior(tmp_path / "prior.safetensors", backbone)
    assert again.energy.config == prior.energy.config
    assert (again.energy.config.groupwise, again.energy.config.local, again.energy.joint) == (True, True, None)
    assert again.sampler == prior.sampler == replace(GROUPWISE_SAMPLER, **SMALL_FIT["sampler"])
    assert torch.equal(again.sample(3).images, prior.sample(3).images)
    chains = SamplerConfig(proposals=2, steps=2)
    assert torch.equal(again.sample(3, sampler=chains).images, prior.sample(3, sampler=chains).images)


def test_heads_see_their_inputs_within_a_bound(backbone: Backbone, images: ImageSource) -> None:
    """As in stages, so that no single far-out element raises f; or within the one that is asked for."""
    assert fit(backbone, images, OBJECTIVES["groupwise"]).energy.config.bound >= 3
    own = replace(OBJECTIVES["groupwise"], energy=replace(OBJECTIVES["groupwise"].energy, bound=7.0))
    assert fit(backbone, images, own).energy.config.bound == 7


def test_what_groupwise_ratios_cannot_be(backbone: Backbone, images: ImageSource) -> None:
    with pytest.raises(ConfigurationError, match="must be one or auto unless the objective is nce"):
        small(ratios="groupwise", objective="mle")
    with pytest.raises(ConfigurationError, match=r"energy.groupwise must be off: ratios groupwise turns it on"):
        small(energy=EnergyConfig(groupwise=True))
    with pytest.raises(ConfigurationError, match=r"chain.by_group must be off"):
        small(objective="mle", chain=SamplerConfig(by_group=True))

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Parameter(torch.zeros(()))

        def forward(self, inputs: list[Tensor]) -> Tensor:
            return self.last * inputs[0].flatten(1).sum(1)

    with pytest.raises(ConfigurationError, match="groupwise needs heads of single groups"):
        fit(backbone, images, small(ratios="groupwise"), energy=Whole())
