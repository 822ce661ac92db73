"""Groupwise ratios: held to closed forms on the linear-Gaussian toy, and fitted on a network with shared heads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from closed_form import SIZES, Z_LIMIT, ArrayImages, Problem, flat, images_of, posterior_draws
from small_fits import OBJECTIVES, small
from torch import Tensor
from toys import LinearGaussian

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.storage.checkpoint import load_prior
from ebm_prior.storage.records import FIT_RECORD, keeps_to
from ebm_prior.training.fit import fit
from ebm_prior.training.fit_config import FitConfig
from ebm_prior.training.groupwise import Normaliser, annealed_weights, calibration

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
    """Before the correction, within its standard error; and after it, of all groups together under p_β."""
    for group in fitted.record["groups"]:
        assert abs(group["log_z"]) < Z_LIMIT * group["log_z_error"] < 0.2
        assert 0.8 < group["tau"] < 1.2
    log_z, ess = fitted.log_normalizer(n=20_000, chunk=4096)
    assert abs(log_z) < 0.1
    assert ess > 0.1


def test_draws_by_group_have_the_posteriors_moments(problem: Problem, fitted: EBMPrior) -> None:
    assert fitted.sampler.by_group
    z = flat(fitted.sample(4_000, seed=1, chunk=4096).z).double()
    mean, covariance = problem.q
    sd = covariance.diagonal().sqrt()
    assert ((z.mean(0) - mean) / sd).abs().max() < 0.1  # the standard error is .016
    assert ((problem.p.mean - mean) / sd).abs().max() > 0.5
    assert (z.T.cov() - covariance).abs().max() < 0.12


def test_annealed_weights_estimate_a_normaliser_that_plain_ones_miss() -> None:
    """g = ⟨a, ε⟩ − ½⟨a, a⟩ has E[e^g] = 1; here the divergence of the tilted density from N(0, I) is 8 nats."""
    a = torch.full((4,), 2.0).double()

    def g(eps: list[Tensor]) -> Tensor:
        return eps[0] @ a - 0.5 * a @ a

    like = torch.zeros(1_000, 4).double()
    annealed = Normaliser.of(annealed_weights(g, like, derived_generator(7)))  # type: ignore[arg-type]
    plain = Normaliser.of(g([torch.randn(1_000, 4, generator=derived_generator(8)).double()]))
    assert abs(annealed.log_z) < Z_LIMIT * annealed.log_z_error < 1
    assert annealed.ess_fraction > 20 * plain.ess_fraction


def test_tempering_finds_the_factor_that_was_lost() -> None:
    generator = derived_generator(9)
    shift = 1.5
    f_q, f_p = (
        shift * (torch.randn(50_000, generator=generator).double() + move) - 0.5 * shift**2 for move in (shift, 0.0)
    )
    assert calibration(f_q, f_p) == pytest.approx(1, abs=0.05)
    assert calibration(2 * f_q, 2 * f_p) == pytest.approx(0.5, abs=0.03)
    assert calibration(-f_q, -f_p) == 0


def test_a_prior_of_groupwise_ratios_is_saved_and_read(backbone: Backbone, images: ImageSource, tmp_path: Path) -> None:
    prior = fit(backbone, images, OBJECTIVES["groupwise"])
    assert keeps_to(FIT_RECORD, prior.record)
    assert [group["name"] for group in prior.record["groups"]] == [group.name for group in backbone.groups]
    prior.save(tmp_path / "prior.safetensors")
    again = load_prior(tmp_path / "prior.safetensors", backbone)
    assert again.energy.config == prior.energy.config
    assert (again.energy.config.groupwise, again.energy.joint, again.sampler.by_group) == (True, None, True)
    assert torch.equal(again.sample(3).images, prior.sample(3).images)
    chains = SamplerConfig(proposals=2, steps=2)
    assert torch.equal(again.sample(3, sampler=chains).images, prior.sample(3, sampler=chains).images)


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
