"""EBMPrior: draw i depends on (seed, i) alone, both ε-targets, tempering, and what a refiner refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from closed_form import P_LIMIT, flat
from listener import Listener
from scipy.stats import kstest
from torch import Tensor, nn
from toys import LinearGaussian, ToyConv

from ebm_prior.compute.randomness import BlockGenerator, derived_generator
from ebm_prior.errors import RegimeError
from ebm_prior.model.backbone import Backbone, Draw, Gaussian
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerConfig, start
from ebm_prior.model.samples import Samples

SAMPLERS = {
    "ancestral": ANCESTRAL,
    "sir": SamplerConfig(proposals=8),
    "pcn-langevin": SamplerConfig(proposals=2, steps=6, step_size=0.4, adapt_steps=3),
    "langevin": SamplerConfig(proposals=1, kernel="langevin", steps=5, step_size=0.05),
}


def trained(backbone: Backbone, scale: float = 0.5) -> JointEnergy:
    """Heads with random weights everywhere: an f that is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(60)
        energy = JointEnergy(backbone.groups, EnergyConfig(channels=4, hidden=8, joint=6))
        for name, parameter in energy.named_parameters():
            if "last" in name or name.startswith("joint.4"):
                nn.init.normal_(parameter, std=scale)
    return energy


def untrained(backbone: Backbone) -> JointEnergy:
    return JointEnergy(backbone.groups, EnergyConfig(channels=4, hidden=8, joint=6))


def columns(samples: Samples) -> list[Tensor]:
    return [*samples.z, *samples.eps, *samples[2:]]


@pytest.mark.parametrize("name", SAMPLERS)
def test_draw_i_is_the_same_for_any_chunk_and_number_of_draws(name: str) -> None:
    """In float64, where other orders of summation in a matrix product cannot turn an acceptance round."""
    backbone = ToyConv().double().eval()
    prior = EBMPrior(backbone, trained(backbone), sampler=SAMPLERS[name])
    whole = prior.sample(200, seed=3, chunk=512)
    for other in (prior.sample(200, seed=3, chunk=64), prior.sample(200, seed=3, chunk=150)):
        torch.testing.assert_close(columns(other), columns(whole), rtol=1e-10, atol=1e-10)
    for n in (64, 70):
        short = prior.sample(n, seed=3, chunk=512)
        torch.testing.assert_close(columns(short), [c[:n] for c in columns(whole)], rtol=1e-10, atol=1e-10)
    assert not torch.equal(prior.sample(64, seed=4).eps[0], whole.eps[0][:64])


def test_it_runs_on_the_backbone_for_inference_which_by_default_is_itself() -> None:
    class Twice(ToyConv):
        def for_inference(self) -> Backbone:
            return twin

    plain, twin, twice = ToyConv().eval(), ToyConv().eval(), Twice().eval()
    assert EBMPrior(plain, untrained(plain)).backbone is plain
    assert EBMPrior(twice, untrained(twice)).backbone is twin


class Elementwise(LinearGaussian):
    """No matrix product before the image: its rounding could depend on the number of rows."""

    def top_down(self, draw: Draw, batch_size: int) -> Tensor:
        top = self.b.new_zeros(1, 2)
        z2 = draw(0, Gaussian(top, top + 1), None)
        return draw(1, Gaussian(z2[:, :1] * self.b, self.log_s.exp()[None]), z2)


class Waves(nn.Module):
    config, inputs = EnergyConfig(conditional=False), JointEnergy.inputs

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        return z[0].sin().prod(1) + 2 * z[1][:, 1].sin()


@pytest.mark.parametrize("name", SAMPLERS)
def test_where_arithmetic_is_per_sample_the_same_draw_is_the_same_bits(name: str) -> None:
    prior = EBMPrior(Elementwise().eval(), Waves(), sampler=SAMPLERS[name])  # type: ignore[arg-type]
    runs = [prior.sample(n, seed=3, chunk=chunk) for n, chunk in [(256, 512), (256, 64), (256, 128), (128, 64)]]
    for run in runs[1:]:
        for mine, expected in zip([*run.z, *run.eps], [*runs[0].z, *runs[0].eps], strict=True):
            assert torch.equal(mine, expected[: len(mine)])


def test_samples_have_the_shapes_and_the_latents_that_they_say() -> None:
    backbone = ToyConv().eval()
    told = Listener()
    samples = EBMPrior(backbone, trained(backbone)).sample(150, chunk=64, progress=told)
    assert [tuple(z.shape) for z in samples.z] == [(150, 4), (150, 2, 1, 1), (150, 3, 4, 4)]
    assert all(column.shape == (150,) for column in samples[3:])
    assert told.counts == [64, 64, 22]
    torch.testing.assert_close(backbone.reparameterize(samples.eps), samples.z)
    torch.testing.assert_close(backbone.decode(samples.z).mean, samples.images)
    assert samples.images.shape == (150, 1, 8, 8)
    assert 0 <= samples.images.min() < samples.images.max() <= 1


@pytest.mark.parametrize("build", [LinearGaussian, ToyConv])
def test_the_ancestral_sampler_gives_the_backbones_own_draws(build: type[Backbone]) -> None:
    """Trained or not: it ignores f."""
    backbone = build().eval()
    own = backbone.sample(200, generator=BlockGenerator(5, 0, 200))
    for energy in (untrained(backbone), trained(backbone)):
        drawn = EBMPrior(backbone, energy).sample(200, seed=5, sampler=ANCESTRAL)
        assert all(torch.equal(z, expected) for z, expected in zip(drawn.z, own, strict=True))
        assert (drawn.acceptance == 1).all()
        assert (drawn.ess_fraction == 1).all()


@pytest.mark.parametrize("name", ["ancestral", "sir", "pcn-langevin"])
def test_untrained_priors_are_the_backbone_under_every_exact_sampler(name: str) -> None:
    backbone = ToyConv().eval()
    drawn = EBMPrior(backbone, untrained(backbone)).sample(512, seed=6, sampler=SAMPLERS[name])
    assert kstest(flat(drawn.eps).flatten().double().numpy(), "norm").pvalue > P_LIMIT  # 512 · 54 entries
    assert (drawn.acceptance == 1).all()
    torch.testing.assert_close(drawn.ess_fraction, torch.ones(512))


# The two targets.


def test_a_density_has_the_exact_target() -> None:
    backbone = LinearGaussian().eval()
    with pytest.raises(RegimeError, match="target published needs regime refiner"):
        EBMPrior(backbone, trained(backbone), target="published")


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_gradients_of_both_targets(tau: float) -> None:
    """g − ½‖ε‖² is τf(T(ε)) + log N(ε) + const for the exact target, τf(T(ε)) + log p_β(T(ε)) for the published one."""
    backbone = ToyConv().double().eval()
    energy = trained(backbone)
    eps = [e.requires_grad_() for e in backbone.standard_normal(6, generator=derived_generator(61))]
    f = tau * energy.double().eval()(energy.inputs(backbone.reparameterize(eps), eps))
    log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(flat(eps)).sum(1)
    log_prior = backbone.log_prior(backbone.reparameterize(eps)).sum(1)
    densities: dict[Any, Tensor] = {"exact": f + log_normal, "published": f + log_prior}
    slopes = {}
    for target, density in densities.items():
        expected = torch.autograd.grad(density.sum(), eps, retain_graph=True)
        state = start(EBMPrior(backbone, energy, tau=tau, regime="refiner", target=target).potential, eps)
        slopes[target] = flat([g - e.detach() for g, e in zip(state.gradient, eps, strict=True)])
        torch.testing.assert_close(slopes[target], flat(expected))
        constant = 0.5 * flat(eps).shape[1] * math.log(2 * math.pi) if target == "exact" else 0.0
        torch.testing.assert_close(state.value - 0.5 * flat(eps).square().sum(1), density + constant)
    assert (slopes["exact"] - slopes["published"]).abs().max() > 0.01  # they are two densities


def test_the_log_density_is_f_and_the_reference() -> None:
    """log_prior(T(ε)) − log_density(ε) is −log|det ∂T/∂ε| = −Σ log σ, whatever f is."""
    backbone = ToyConv().double().eval()
    prior = EBMPrior(backbone, trained(backbone), tau=0.7)
    trace = backbone.transform(backbone.standard_normal(6, generator=derived_generator(62)))
    log_sigma = sum(p.std.log().expand_as(z).flatten(1).sum(1) for p, z in zip(trace.priors, trace.z, strict=True))
    torch.testing.assert_close(prior.log_prior(trace.z) - prior.log_density(trace.eps), -log_sigma)
    torch.testing.assert_close(prior.log_prior(trace.z) - prior.f(trace.z), backbone.log_prior(trace.z).sum(1))
    torch.testing.assert_close(prior.f(trace.z), 0.7 * prior.energy(prior.energy.inputs(trace.z, trace.eps)))
    assert prior.f(trace.z).std() > 0.1


def test_log_z_of_the_backbone_is_zero_and_does_not_depend_on_the_chunk() -> None:
    backbone = ToyConv().eval()
    assert EBMPrior(backbone, untrained(backbone)).log_normalizer(n=500) == (pytest.approx(0), pytest.approx(1))
    assert EBMPrior(backbone, trained(backbone), tau=0).log_normalizer(n=500)[0] == pytest.approx(0)
    prior = EBMPrior(backbone, trained(backbone))
    assert prior.log_normalizer(n=500, chunk=64) == pytest.approx(prior.log_normalizer(n=500, chunk=512))
    assert abs(prior.log_normalizer(n=500)[0]) > 0.01


# Promises to the user.


def test_a_refiner_refuses_what_needs_a_log_density_ratio_and_still_samples() -> None:
    backbone = LinearGaussian().eval()
    prior = EBMPrior(backbone, trained(backbone), regime="refiner", target="published", sampler=SAMPLERS["langevin"])
    z = backbone.sample(3)
    for what, call in {
        "log_normalizer": prior.log_normalizer,
        "log_density": lambda: prior.log_density(z),
        "log_prior": lambda: prior.log_prior(z),
    }.items():
        with pytest.raises(RegimeError, match=f"{what} needs a calibrated prior, found a refiner.*--objective nce"):
            call()
    assert len(prior.sample(10).images) == 10
    assert prior.f(z).shape == (3,)


def test_sampling_leaves_no_gradient_and_no_trace_of_itself() -> None:
    backbone = ToyConv().eval()
    prior = EBMPrior(backbone, trained(backbone).train())
    state = torch.random.get_rng_state()
    first = prior.sample(64, sampler=SAMPLERS["pcn-langevin"])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for module in (backbone, prior.energy) for p in module.parameters())
    assert not any(column.requires_grad for column in columns(first))
    again = prior.sample(64, sampler=SAMPLERS["pcn-langevin"])
    assert all(torch.equal(a, b) for a, b in zip(columns(first), columns(again), strict=True))  # dropout is off


def test_no_f_is_above_the_ceiling() -> None:
    """The density is clipped with it: f, log Z and the gradient that chains follow."""
    backbone = LinearGaussian().eval()
    free = EBMPrior(backbone, trained(backbone, 3.0), tau=0.5)
    eps = backbone.standard_normal(400, generator=derived_generator(7))
    z = backbone.reparameterize(eps)
    ceiling = float(free.f(z).detach().mean())
    clipped = EBMPrior(backbone, free.energy, tau=0.5, ceiling=ceiling)
    torch.testing.assert_close(clipped.f(z), free.f(z).clamp(max=ceiling))
    torch.testing.assert_close(clipped.log_prior(z) - clipped.f(z), free.log_prior(z) - free.f(z))
    assert clipped.log_normalizer(n=2_000)[0] < free.log_normalizer(n=2_000)[0]
    above = free.f(z) > ceiling
    gradient = start(clipped.potential, eps).gradient[0]
    assert bool((gradient[above] == 0).all())
    torch.testing.assert_close(gradient[~above], start(free.potential, eps).gradient[0][~above])
