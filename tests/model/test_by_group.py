"""The group-by-group sampler: its law where that is known, and what it leaves to a single pass of the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from closed_form import SIZES, Normal, flat
from torch import Tensor, nn
from toys import LinearGaussian, ToyConv

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Gaussian, Trace
from ebm_prior.model.by_group import draw_by_group
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.scores import Form

SAMPLER = SamplerConfig(by_group=True, proposals=8, steps=40, step_size=1.0)
SHIFT = (torch.tensor([0.9, -0.7]).double(), torch.tensor([0.8, -0.6, 0.5]).double())
FACTOR = 0.7  # on the standard deviations


class Ratio:
    """log q − log p of a q(z_i | z_<i) whose mean is `SHIFT` standard deviations away, with `FACTOR` times these."""

    def __init__(self) -> None:
        self.met: list[int] = []

    def f(self, index: int, z: Tensor, eps: Tensor, prior: Gaussian) -> Tensor:
        q = Gaussian(SHIFT[index], torch.full_like(SHIFT[index], FACTOR))
        return q.log_prob(eps) - Gaussian(torch.zeros_like(eps), torch.ones_like(eps)).log_prob(eps)

    def is_constant(self, index: int) -> bool:
        return False

    def go_on(self, index: int, z: Tensor, eps: Tensor, prior: Gaussian) -> None:
        torch.testing.assert_close(prior.standardize(z), eps)
        self.met.append(index)


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
    ratio = Ratio()
    trace, found = draw_by_group(linear, ratio, [], 4_000, SAMPLER, derived_generator(1))
    law(linear).check(flat(trace.z))
    assert ratio.met == [0, 1]
    torch.testing.assert_close(flat(trace.eps), flat(found.eps))
    assert all(each.shape == (4_000,) for each in (found.acceptance, found.norm, found.ess_fraction, found.step_size))
    assert 0.1 < float(found.ess_fraction.mean()) < 1


def test_lower_groups_are_drawn_given_fixed_ones(linear: LinearGaussian) -> None:
    z2 = linear.sample(4_000, generator=derived_generator(2))[0]
    trace, found = draw_by_group(linear, Ratio(), [z2], 4_000, SAMPLER, derived_generator(3))
    assert torch.equal(trace.z[0], z2)
    assert len(found.eps) == 1
    one = torch.ones(3).double()
    Normal(SHIFT[1], torch.diag(FACTOR**2 * one)).check(trace.eps[1])


# With heads.

CONFIG = EnergyConfig(channels=4, hidden=8, joint=6, groupwise=True)


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


def terms(prior: EBMPrior, trace: Trace) -> list[Tensor]:
    """τ f_i along a walk."""
    walk, found = prior.walk(), []
    for index, group in enumerate(zip(trace.z, trace.eps, trace.priors, strict=True)):
        found.append(walk.f(index, *group))
        walk.go_on(index, *group)
    return found


def traced(prior: EBMPrior, seed: int) -> Trace:
    return prior.backbone.transform(prior.backbone.standard_normal(5, generator=derived_generator(seed)))


def test_f_is_the_sum_of_the_terms_of_a_walk(prior: EBMPrior) -> None:
    trace = traced(prior, 4)
    torch.testing.assert_close(prior.f(trace.z), torch.stack(terms(prior, trace)).sum(0))
    torch.testing.assert_close(prior.f(trace.z, trace.eps, trace.priors), prior.f(trace.z))
    log_prior = prior.f(trace.z) + trace.log_prior.sum(1)
    torch.testing.assert_close(prior.log_prior(trace.z), log_prior)
    torch.testing.assert_close(prior.potential(trace.eps), prior.f(trace.z))


def test_a_head_sees_what_its_conditional_has(prior: EBMPrior) -> None:
    """f_i changes with mean_i and std_i, where z_i and ε_i stay."""
    trace = traced(prior, 5)
    z, eps, given = trace.z[0], trace.eps[0], trace.priors[0]
    first = prior.walk()
    first.go_on(0, z, eps, given)
    z, eps, given = trace.z[1], trace.eps[1], trace.priors[1]
    here = first.f(1, z, eps, given)
    for other in (Gaussian(given.mean + 1, given.std), Gaussian(given.mean, 2 * given.std)):
        assert (first.f(1, z, eps, other) != here).all()


def test_a_term_depends_on_the_groups_above_and_on_none_below(prior: EBMPrior) -> None:
    """Where the conditional of the middle group is held fixed, the walk alone tells its term of the top group."""
    trace, other = traced(prior, 6), traced(prior, 7)
    for changed in range(3):
        mixed = Trace(
            *(
                [mine if i != changed else theirs for i, (mine, theirs) in enumerate(zip(*pair, strict=True))]
                for pair in ((trace.z, other.z), (trace.priors, other.priors))
            ),
            None,
        )
        moved = [bool((a != b).all()) for a, b in zip(terms(prior, trace), terms(prior, mixed), strict=True)]
        same = [torch.equal(a, b) for a, b in zip(terms(prior, trace), terms(prior, mixed), strict=True)]
        assert moved == [index >= changed for index in range(3)]
        assert same == [index < changed for index in range(3)]


def test_negatives_take_the_groups_above_from_their_positives(prior: EBMPrior) -> None:
    """Row 5 + i of the batch is z_i' with the z_<i of row i, as training has it."""
    trace, redrawn = traced(prior, 8), traced(prior, 9)
    energy, rows = prior.energy, torch.arange(5).repeat(2)
    inputs = [energy.inputs(each.z, each.eps, each.priors) for each in (trace, redrawn)]
    found = energy.terms([torch.cat(pair) for pair in zip(*inputs, strict=True)], rows)
    walk = prior.walk()
    for index, group in enumerate(zip(redrawn.z, redrawn.eps, redrawn.priors, strict=True)):
        torch.testing.assert_close(prior.tau * found[5:, index], walk.f(index, *group))
        walk.go_on(index, trace.z[index], trace.eps[index], trace.priors[index])


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


def test_a_group_whose_f_is_constant_is_drawn_from_the_backbones_prior(prior: EBMPrior) -> None:
    energy = copy.deepcopy(prior.energy)
    for index in range(3):
        assert not energy.is_constant(index)
        energy.correct(index, 0.0, 0.7)
        assert energy.is_constant(index)
    flat_prior = EBMPrior(prior.backbone, energy, sampler=prior.sampler)
    drawn = flat_prior.sample(5, seed=2)
    torch.testing.assert_close(flat_prior.f(drawn.z), torch.full((5,), 2.1))
    assert (drawn.acceptance == 1).all()
    assert (drawn.ess_fraction == 1).all()
    plain = flat_prior.sample(5, seed=2, sampler=replace(prior.sampler, proposals=1, steps=0))
    assert torch.equal(drawn.images, plain.images)


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


def test_it_has_no_limit_of_the_norm() -> None:
    """The limit is one of all groups together, and here each group is drawn for itself."""
    with pytest.raises(ConfigurationError, match="norm_limit must be 0 with by_group"):
        SamplerConfig(by_group=True, norm_limit=1.1)


def test_it_needs_a_sum_over_groups(prior: EBMPrior) -> None:
    backbone = prior.backbone
    joint = EBMPrior(backbone, JointEnergy(backbone.groups, EnergyConfig(channels=4, hidden=8)))
    clipped = EBMPrior(backbone, prior.energy, ceiling=3.0)
    refiner = EBMPrior(backbone, prior.energy, regime="refiner")
    for unfit in (joint, clipped, refiner):
        with pytest.raises(ConfigurationError, match="by_group needs a calibrated prior whose f is a sum over groups"):
            unfit.sample(2, sampler=prior.sampler)
        assert unfit.sample(2, sampler=SamplerConfig(proposals=2, steps=1)).images.isfinite().all()
