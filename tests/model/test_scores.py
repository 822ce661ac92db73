"""Scores: Eqs. 20 and 21 by hand, the backbone's own bound, exact expectations, and what no score depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from small_priors import bent
from torch import Tensor
from toys import LinearGaussian, ToyConv

from ebm_prior.compute.randomness import BlockGenerator, derived_seed
from ebm_prior.errors import ConfigurationError, RegimeError
from ebm_prior.model.backbone import Gaussian
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.scores import Form, scores

EXACT = SamplerConfig(proposals=8, steps=10, step_size=0.5)


@pytest.fixture(scope="module")
def toy() -> EBMPrior:
    return bent(ToyConv().double().eval())


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(70, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tilt(z: Sequence[Tensor], eps: Sequence[Tensor], priors: Sequence[Gaussian]) -> Tensor:
    """f(z) = a·z1, with which every conditional of p_α is a Gaussian of the same covariance, moved by Σ a."""
    return z[1] @ torch.tensor([0.8, -0.5, 0.3], dtype=torch.float64)


@pytest.fixture(scope="module")
def linear() -> tuple[LinearGaussian, Tensor]:
    backbone = LinearGaussian().double().eval()
    return backbone, backbone.decode(backbone.sample(3, generator=torch.Generator().manual_seed(5))).mean.detach()


def test_without_f_the_elbo_form_of_all_groups_is_the_backbones_own_bound(toy: EBMPrior, pictures: Tensor) -> None:
    found = toy.scores(pictures, [Form(0, mode="elbo", energy=False)], draws=1, seed=9)
    seeds = (derived_seed(9, 0x5C03E, 1), derived_seed(9, 0x5C03E, 2, 1))
    observation, noise = (BlockGenerator(seed, 0, len(pictures)) for seed in seeds)
    x = toy.backbone.observe(pictures, generator=observation)
    posterior = toy.backbone.infer(x, generator=noise)
    own = toy.backbone.likelihood(posterior.features).log_prob(x) + (posterior.log_p - posterior.log_q).sum(1)
    torch.testing.assert_close(next(iter(found.values())), own, rtol=0, atol=1e-10)


def test_an_exact_posterior_makes_every_draw_the_evidence(linear: tuple[LinearGaussian, Tensor]) -> None:
    backbone, images = linear
    forms = [Form(0, mode="elbo", energy=False), Form(0, mode="iw", energy=False)]
    for values in scores(backbone, tilt, images, forms, draws=2, sampler=EXACT).values():
        torch.testing.assert_close(values, backbone.evidence(images))


@pytest.mark.parametrize("energy", [True, False])
def test_the_prior_alone_is_eq_20_without_the_likelihood(toy: EBMPrior, pictures: Tensor, energy: bool) -> None:
    form = Form(0, mode="prior", energy=energy)
    found = toy.scores(pictures, [form], draws=1, seed=9)[form]
    seeds = (derived_seed(9, 0x5C03E, 1), derived_seed(9, 0x5C03E, 2, 1))
    observation, noise = (BlockGenerator(seed, 0, len(pictures)) for seed in seeds)
    posterior = toy.backbone.infer(toy.backbone.observe(pictures, generator=observation), generator=noise)
    expected = posterior.log_p.sum(1) + (toy.f(posterior.z) if energy else 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("energy", [True, False])
def test_eq_20_on_a_linear_gaussian_model(linear: tuple[LinearGaussian, Tensor], energy: bool) -> None:
    """k = 1: z2 ~ q, z1 ~ p_α(z1 | z2) = N(A z2 + b + S a, S), whose expectations are known in closed form given z2."""
    backbone, images = linear
    a, s2, n = torch.tensor([0.8, -0.5, 0.3], dtype=torch.float64), (2 * backbone.log_s).exp(), 4096
    x = images[:1].expand(n, 1, 2, 2)
    found = scores(backbone, tilt, x, [Form(1, energy=energy)], draws=1, sampler=EXACT, seed=4)[Form(1, energy=energy)]
    # The same z2.
    z2 = backbone.infer(x, generator=BlockGenerator(derived_seed(4, 0x5C03E, 2, 1), 0, n)).z[0]
    shift = energy * s2 * a
    mean = z2 @ backbone.A.T + backbone.b + shift
    residual = x.flatten(1) - 0.5 - mean @ backbone.W.T
    spread = (backbone.W**2 * s2).sum()  # E‖W(z1 − mean)‖²
    log_likelihood = -0.5 * ((residual**2).sum(1) + spread) / backbone.sigma**2
    log_likelihood = log_likelihood - 4 * math.log(backbone.sigma * math.sqrt(2 * math.pi))
    log_p2 = -0.5 * (z2**2 + math.log(2 * math.pi)).sum(1)
    log_p1 = -0.5 * (3 + (shift**2 / s2).sum() + s2.log().sum() + 3 * math.log(2 * math.pi))
    difference = (found - (log_likelihood + log_p2 + log_p1 + (mean @ a if energy else 0))).detach()
    error = float(difference.std()) / math.sqrt(n)
    assert error < 0.1
    assert abs(float(difference.mean())) < 4 * error


def test_lower_means_are_those_of_the_conditionals(linear: tuple[LinearGaussian, Tensor]) -> None:
    """z1 = A z2 + b, with z2 inferred from the mean of z1 where an encoder feeds that upwards; f is a term."""
    backbone, images = linear
    a = torch.tensor([0.8, -0.5, 0.3], dtype=torch.float64)
    forms = [Form(1, mode="elbo", lower="mean", energy=energy) for energy in (True, False)]
    found = scores(backbone, tilt, images, forms, draws=1, sampler=EXACT, seed=2)
    noise = backbone.standard_normal(3, generator=BlockGenerator(derived_seed(2, 0x5C03E, 2, 1), 0, 3))
    posterior = backbone.infer(images, noise=[noise[0], torch.zeros_like(noise[1])])
    z2 = posterior.z[0]
    z1 = z2 @ backbone.A.T + backbone.b
    expected = backbone.decode([z2, z1]).log_prob(images) + posterior.log_p[:, 0] - posterior.log_q[:, 0]
    torch.testing.assert_close(found[forms[1]], expected)
    torch.testing.assert_close(found[forms[0]], expected + z1 @ a)


def test_ratios_are_differences_on_shared_draws(toy: EBMPrior, pictures: Tensor) -> None:
    forms = [Form(k, r, m, w, e) for k in (1, 2) for r in (0, 1) for m in ("eq20", "iw") for w in ("sample", "mean")
             for e in (False, True)]  # fmt: skip
    forms = [form._replace(ratio=bool(form.ratio)) for form in forms]
    found = toy.scores(
        pictures[:6], [*forms, *(Form(0, mode=m, energy=e) for m in ("eq20", "iw") for e in (0, 1))], draws=2
    )
    for form in forms:
        if form.ratio:
            whole = found[Form(0, mode=form.mode, energy=form.energy)]
            torch.testing.assert_close(found[form], whole - found[form._replace(ratio=False)])
            alone = toy.scores(pictures[:6], [form], draws=2)[form]  # whatever else is asked for
            torch.testing.assert_close(found[form], alone, rtol=0, atol=0)
    assert all(values.isfinite().all() and values.std() > 0 for values in found.values())


def test_with_heads_at_zero_f_and_f_0_are_one(pictures: Tensor) -> None:
    """Without an energy the first proposal is kept wherever no chain follows."""
    prior = bent(ToyConv().double().eval(), scale=0.0)
    for form in (Form(2, True), Form(2, True, lower="mean"), Form(0)):
        pair = [form, form._replace(energy=False)]
        found = prior.scores(pictures[:5], pair, draws=2, sampler=SamplerConfig(proposals=1, steps=0))
        torch.testing.assert_close(found[pair[0]], found[pair[1]], rtol=0, atol=1e-12)


def test_one_free_group_needs_no_traversal(toy: EBMPrior, pictures: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short cut of k = 1 gives what the traversal gives."""
    short = toy.scores(pictures[:4], [Form(1)], draws=2)[Form(1)]
    monkeypatch.setattr("ebm_prior.model.scores.FreeGroups.alone", property(lambda self: False))
    torch.testing.assert_close(short, toy.scores(pictures[:4], [Form(1)], draws=2)[Form(1)])


def test_no_score_depends_on_the_batch(toy: EBMPrior, pictures: Tensor) -> None:
    form = Form(2, ratio=True, mode="elbo")
    whole = toy.scores(pictures, [form], draws=2)[form]
    torch.testing.assert_close(toy.scores(pictures, [form], draws=2, chunk=64)[form], whole)
    torch.testing.assert_close(toy.scores(pictures[64:], [form], draws=2, first=64)[form], whole[64:])
    torch.testing.assert_close(toy.scores(pictures[:10], [form], draws=2)[form], whole[:10])
    assert not torch.allclose(toy.scores(pictures[64:], [form], draws=2)[form], whole[64:])


def test_calls_repeat_and_seeds_matter(toy: EBMPrior, pictures: Tensor) -> None:
    def one(seed: int) -> Tensor:
        form = Form(1, ratio=True)
        return toy.scores(pictures[:5], [form], draws=2, seed=seed)[form]

    assert torch.equal(one(3), one(3))
    assert not torch.equal(one(3), one(4))


def test_more_draws_go_on_where_fewer_stopped(toy: EBMPrior, pictures: Tensor) -> None:
    form = Form(2, mode="elbo")
    two, four = (toy.scores(pictures[:5], [form], draws=n)[form] for n in (2, 4))
    assert (two - four).abs().max() > 1e-3
    first, second = (
        scores(toy.backbone, toy.f, pictures[:5], [form], draws=n, sampler=toy.sampler)[form] for n in (1, 2)
    )
    assert torch.allclose(2 * second - first, 2 * two - first)


@pytest.mark.parametrize(
    "form",
    [Form(3), Form(-1), Form(0, ratio=True), Form(1, mode="iwae"), Form(0, mode="composite"), Form(1, lower="mode")],
)  # type: ignore[arg-type]
def test_a_form_that_is_none_is_refused(toy: EBMPrior, pictures: Tensor, form: Form) -> None:
    with pytest.raises(ConfigurationError, match="expected"):
        toy.scores(pictures[:2], [form])


def test_a_refiner_has_no_scores_but_its_backbone_does(toy: EBMPrior, pictures: Tensor) -> None:
    refiner = EBMPrior(toy.backbone, toy.energy, regime="refiner")
    with pytest.raises(RegimeError, match="refiner"):
        refiner.scores(pictures[:2], [Form(0)])
    form = Form(1, energy=False)
    torch.testing.assert_close(refiner.scores(pictures[:2], [form])[form], toy.scores(pictures[:2], [form])[form])
