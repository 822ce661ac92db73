"""The group-by-group sampler: its law where that is known, and what it leaves to a single pass of the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closed_form import SIZES, Normal, flat
from torch import Tensor, nn
from toys import LinearGaussian, ToyConv

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Gaussian
from ebm_prior.model.by_group import draw_by_group
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.scores import Form

SAMPLER = SamplerConfig(by_group=True, proposals=8, steps=40, step_size=1.0)
SHIFT = (torch.tensor([0.9, -0.7]).double(), torch.tensor([0.8, -0.6, 0.5]).double())
FACTOR = 0.7  # on the standard deviations


def ratio(index: int, z: Tensor, eps: Tensor, prior: Gaussian) -> Tensor:
    """log q − log p of a q(z_i | z_<i) whose mean is `SHIFT` standard deviations away, with `FACTOR` times these."""
    return Gaussian(SHIFT[index], torch.full_like(SHIFT[index], FACTOR)).log_prob(eps) - Gaussian(
        torch.zeros_like(eps), torch.ones_like(eps)
    ).log_prob(eps)


def law(backbone: LinearGaussian) -> Normal:
    """q(z): z2 = m + cξ, z1 = A z2 + b + s (m' + cξ')."""
    A, b, s = backbone.A.detach(), backbone.b.detach(), backbone.log_s.detach().exp()
    top = SHIFT[0]
    M = torch.zeros(5, 5, dtype=b.dtype)
    M[:2, :2], M[2:, :2], M[2:, 2:] = torch.eye(2), A, torch.diag(s)
    return Normal(torch.cat([top, A @ top + b + s * SHIFT[1]]), FACTOR**2 * M @ M.T)


@pytest.fixture(scope="module")
def linear() -> LinearGaussian:
    return LinearGaussian(*SIZES).double().eval().requires_grad_(False)


def test_draws_have_the_product_of_the_conditionals_as_their_law(linear: LinearGaussian) -> None:
    trace, found = draw_by_group(linear, ratio, [], 4_000, SAMPLER, derived_generator(1))
    law(linear).check(flat(trace.z))
    torch.testing.assert_close(flat(trace.eps), flat(found.eps))
    assert all(each.shape == (4_000,) for each in (found.acceptance, found.norm, found.ess_fraction, found.step_size))
    assert 0.1 < float(found.ess_fraction.mean()) < 1


def test_lower_groups_are_drawn_given_fixed_ones(linear: LinearGaussian) -> None:
    z2 = linear.sample(4_000, generator=derived_generator(2))[0]
    trace, found = draw_by_group(linear, ratio, [z2], 4_000, SAMPLER, derived_generator(3))
    assert torch.equal(trace.z[0], z2)
    assert len(found.eps) == 1
    one = torch.ones(3).double()
    Normal(SHIFT[1], torch.diag(FACTOR**2 * one)).check(trace.eps[1])


# With heads.

CONFIG = EnergyConfig(channels=4, hidden=8, conditional=True, priors=True, joint=0)


@pytest.fixture(scope="module")
def prior() -> EBMPrior:
    """Heads with random weights in the last layers, too."""
    backbone = ToyConv().eval().requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = JointEnergy(backbone.groups, CONFIG)
        for name, parameter in energy.named_parameters():
            if "last" in name:
                nn.init.normal_(parameter)
    sampler = SamplerConfig(by_group=True, proposals=4, steps=3, step_size=0.3)
    return EBMPrior(backbone, energy, tau=0.8, sampler=sampler)


def test_f_is_the_sum_of_the_groups_own(prior: EBMPrior) -> None:
    trace = prior.backbone.transform(prior.backbone.standard_normal(5, generator=derived_generator(4)))
    own = [prior.own_f(i, *group) for i, group in enumerate(zip(trace.z, trace.eps, trace.priors, strict=True))]
    torch.testing.assert_close(prior.f(trace.z), torch.stack(own).sum(0))
    torch.testing.assert_close(prior.f(trace.z, trace.eps, trace.priors), prior.f(trace.z))
    log_prior = prior.f(trace.z) + trace.log_prior.sum(1)
    torch.testing.assert_close(prior.log_prior(trace.z), log_prior)
    torch.testing.assert_close(prior.potential(trace.eps), prior.f(trace.z))


def test_a_head_sees_what_its_conditional_has(prior: EBMPrior) -> None:
    """f changes with mean_i and std_i, where z_i and ε_i stay."""
    trace = prior.backbone.transform(prior.backbone.standard_normal(5, generator=derived_generator(5)))
    z, eps, given = trace.z[2], trace.eps[2], trace.priors[2]
    here = prior.own_f(2, z, eps, given)
    for other in (Gaussian(given.mean + 1, given.std), Gaussian(given.mean, 2 * given.std)):
        assert (prior.own_f(2, z, eps, other) != here).all()


def counted(prior: EBMPrior, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    passes: list[int] = []
    top_down: Callable[..., Any] = type(prior.backbone).top_down

    def counting(self: ToyConv, draw: Any, batch_size: int) -> Any:
        passes.append(batch_size)
        return top_down(self, draw, batch_size)

    monkeypatch.setattr(type(prior.backbone), "top_down", counting)
    return passes


def test_a_sample_takes_one_pass(prior: EBMPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counted(prior, monkeypatch)
    drawn = prior.sample(100, chunk=64)
    assert passes == [64, 36]
    again = prior.backbone.transform(drawn.eps)
    torch.testing.assert_close(flat(again.z), flat(drawn.z))
    torch.testing.assert_close(prior.backbone.likelihood(again.features).mean, drawn.images)


def test_a_draw_depends_on_its_number_alone(prior: EBMPrior) -> None:
    whole, parts = prior.sample(100, seed=3), prior.sample(100, seed=3, chunk=64)
    torch.testing.assert_close(flat(whole.z), flat(parts.z))
    torch.testing.assert_close(flat(prior.sample(10, seed=3).z), flat(whole.z)[:10])
    assert not torch.allclose(flat(prior.sample(10, seed=4).z), flat(whole.z)[:10])


def test_completion_and_scores_draw_by_group(prior: EBMPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    upper = prior.sample(5, seed=1).z[:1]
    passes = counted(prior, monkeypatch)
    completed = prior.complete(upper, seed=2)
    assert passes == [5]
    assert torch.equal(completed.z[0], upper[0])
    images = (torch.rand(6, 1, 8, 8, generator=derived_generator(6)) > 0.5).float()
    forms = [Form(1), Form(2, ratio=True), Form(1, energy=False)]
    found = prior.scores(images, forms, draws=2)
    assert all(values.isfinite().all() for values in found.values())
    assert (found[forms[0]] != found[forms[2]]).all()


def test_it_needs_a_sum_over_groups(prior: EBMPrior) -> None:
    backbone = prior.backbone
    joint = EBMPrior(backbone, JointEnergy(backbone.groups, EnergyConfig(channels=4, hidden=8)))
    clipped = EBMPrior(backbone, prior.energy, ceiling=3.0)
    refiner = EBMPrior(backbone, prior.energy, regime="refiner")
    for unfit in (joint, clipped, refiner):
        with pytest.raises(ConfigurationError, match="by_group needs a calibrated prior whose f is a sum over groups"):
            unfit.sample(2, sampler=prior.sampler)
        assert unfit.sample(2, sampler=SamplerConfig(proposals=2, steps=1)).images.isfinite().all()
