"""The derived passes of a backbone: one traversal read in several ways tells one story, in closed form on the toys."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from closed_form import Normal, flat, images_of, latent_map, latent_prior
from torch import Tensor
from toys import LinearGaussian, ToyConv

from ebm_prior.compute.randomness import BlockGenerator, derived_generator
from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.model.backbone import Backbone, Gaussian

TOYS = [LinearGaussian, ToyConv]


def toy(build: type[Backbone]) -> Backbone:
    return build().double().eval().requires_grad_(False)


def eps_of(backbone: Backbone, n: int = 6, seed: int = 0) -> list[Tensor]:
    return backbone.standard_normal(n, generator=derived_generator(70, seed))


def pictures(backbone: Backbone, n: int = 6) -> Tensor:
    return torch.rand(n, *backbone.image_shape, generator=derived_generator(71), dtype=torch.float64)


@pytest.mark.parametrize("build", TOYS)
def test_standardize_inverts_reparameterize(build: type[Backbone]) -> None:
    backbone = toy(build)
    eps = eps_of(backbone)
    z = backbone.reparameterize(eps)
    torch.testing.assert_close(backbone.standardize(z), eps)
    torch.testing.assert_close(backbone.reparameterize(backbone.standardize(z)), z)


def test_reparameterize_is_the_written_out_map() -> None:
    backbone = LinearGaussian().double()
    mean, M = latent_map(backbone)
    eps = eps_of(backbone)
    torch.testing.assert_close(flat(backbone.reparameterize(eps)), mean + flat(eps) @ M.T)


@pytest.mark.parametrize("build", TOYS)
def test_change_of_variables(build: type[Backbone]) -> None:
    """log p_β(T(ε)) = log N(ε) − log|det ∂T/∂ε|, with the Jacobian by automatic differentiation of the whole map."""
    backbone = toy(build)
    eps = eps_of(backbone, 2)
    shapes = [(1, *group.shape) for group in backbone.groups]
    sizes = [math.prod(shape) for shape in shapes]

    def flat_map(e: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(e.split(sizes), shapes, strict=True)]
        return flat(backbone.reparameterize(parts))[0]

    log_det = [torch.linalg.slogdet(torch.autograd.functional.jacobian(flat_map, e)).logabsdet for e in flat(eps)]
    log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(flat(eps)).sum(1)
    log_prior = backbone.log_prior(backbone.reparameterize(eps))
    assert log_prior.shape == (2, len(backbone.groups))
    torch.testing.assert_close(log_prior.sum(1), log_normal - torch.stack(log_det))


def test_log_prior_is_the_joint_gaussian() -> None:
    backbone = LinearGaussian().double().requires_grad_(False)
    z = [2 * e for e in eps_of(backbone)]  # any point, not only likely ones
    joint = latent_prior(backbone)
    torch.testing.assert_close(backbone.log_prior(z).sum(1), joint.distribution.log_prob(flat(z)))
    top = Normal(joint.mean[:2], joint.covariance[:2, :2])
    torch.testing.assert_close(backbone.log_prior(z)[:, 0], top.distribution.log_prob(z[0]))
    latent_prior(backbone).check(flat(backbone.sample(20_000, generator=derived_generator(72))))


@pytest.mark.parametrize("build", TOYS)
def test_infer_tells_one_story(build: type[Backbone]) -> None:
    backbone, noise = toy(build), eps_of(toy(build), seed=1)
    images = pictures(backbone)
    posterior = backbone.infer(images, noise=noise)
    again = backbone.infer(images, noise=noise)
    assert all(torch.equal(a, b) for a, b in zip(posterior.z, again.z, strict=True))
    torch.testing.assert_close(posterior.eps, backbone.standardize(posterior.z))
    torch.testing.assert_close(posterior.log_p, backbone.log_prior(posterior.z))
    decoded = backbone.likelihood(posterior.features).log_prob(images)
    torch.testing.assert_close(decoded, backbone.decode(posterior.z).log_prob(images))
    drawn = backbone.infer(images, generator=derived_generator(73))
    given = backbone.infer(images, noise=backbone.standard_normal(6, generator=derived_generator(73)))
    assert all(torch.equal(a, b) for a, b in zip(drawn.z, given.z, strict=True))
    assert not torch.equal(drawn.z[0], posterior.z[0])


def test_the_evidence_is_exact_with_the_exact_posterior() -> None:
    """log p(x|z) + log p_β(z) − log q(z|x) = log p(x) for every z: no ELBO gap."""
    backbone = LinearGaussian().double().requires_grad_(False)
    images = images_of(backbone, latent_prior(backbone), 50, derived_generator(74))
    for seed in range(3):
        posterior = backbone.infer(images, generator=derived_generator(75, seed))
        likelihood = backbone.likelihood(posterior.features).log_prob(images)
        elbo = likelihood + (posterior.log_p - posterior.log_q).sum(1)
        torch.testing.assert_close(elbo, backbone.evidence(images))


@pytest.mark.parametrize("build", TOYS)
def test_temperature_scales_the_noise(build: type[Backbone]) -> None:
    """z_i(t) = mean_i(z_<i) + t·std_i·ε_i: so its standardised latents are tε."""
    backbone = toy(build)
    eps = eps_of(backbone)
    cold = backbone.reparameterize(eps, temperature=0.6)
    torch.testing.assert_close(backbone.standardize(cold), [0.6 * e for e in eps])
    frozen = backbone.reparameterize(eps, temperature=0.0)
    assert all(torch.equal(z, z[:1].expand_as(z)) for z in frozen)
    draws = [backbone.sample(6, temperature=t, generator=derived_generator(76)) for t in (1.0, 0.6)]
    torch.testing.assert_close(draws[1], backbone.reparameterize(backbone.standardize(draws[0]), temperature=0.6))


@pytest.mark.parametrize("build", TOYS)
def test_ancestral_samples_are_the_map_of_standard_normals(build: type[Backbone]) -> None:
    backbone = toy(build)
    drawn = backbone.sample(70, generator=BlockGenerator(9, 0, 70))
    expected = backbone.reparameterize(backbone.standard_normal(70, generator=BlockGenerator(9, 0, 70)))
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_a_trace_holds_what_was_met() -> None:
    backbone = toy(ToyConv)
    eps = eps_of(backbone)
    trace = backbone.transform(eps)
    torch.testing.assert_close(trace.eps, eps)
    torch.testing.assert_close(trace.log_prior, backbone.log_prior(trace.z))
    for z, prior, e in zip(trace.z, trace.priors, eps, strict=True):
        torch.testing.assert_close(prior.mean + prior.std * e, z)
    torch.testing.assert_close(backbone.likelihood(trace.features).mean, backbone.decode(trace.z).mean)


@pytest.mark.parametrize("broadcast", [False, True])
def test_a_gaussian_is_the_product_of_its_entries(broadcast: bool) -> None:
    """Also where mean and std have fewer entries than z: each entry of z counts once."""
    generator = derived_generator(77)
    z = torch.randn(5, 2, 3, 3, generator=generator)
    shape = (1, 2, 1, 1) if broadcast else z.shape
    mean, std = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1
    expected = torch.distributions.Normal(mean.expand_as(z), std.expand_as(z)).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian(mean, std).log_prob(z), expected)
    torch.testing.assert_close(Gaussian(mean, std).standardize(z), (z - mean) / std)


def test_latents_of_the_wrong_shape_are_named() -> None:
    backbone = toy(ToyConv)
    eps = eps_of(backbone)
    wrong = [
        eps[:2],  # a group is missing
        eps[::-1],  # bottom first
        [eps[0], eps[1], eps[2][:3]],  # other batch
        [eps[0][:, :, None], eps[1], eps[2]],
    ]
    for z in wrong:
        for call in (backbone.reparameterize, backbone.standardize, backbone.log_prior, backbone.decode):
            with pytest.raises(
                ConfigurationError, match=r"expected one tensor per latent group.*'dense', \(4,\).*found"
            ):
                call(z)
    with pytest.raises(ConfigurationError, match="noise: expected one tensor per latent group"):
        backbone.infer(pictures(backbone), noise=eps[:2])
    with pytest.raises(ConfigurationError, match=r"expected images of shape \(B, \(1, 8, 8\)\), found \(6, 1, 8, 9\)"):
        backbone.infer(torch.rand(6, 1, 8, 9, dtype=torch.float64))


def test_an_adapter_without_an_official_format_says_so() -> None:
    with pytest.raises(
        CheckpointError, match=r"net\.pt is not a backbone in ebm-prior's own safetensors form.*reads no"
    ):
        LinearGaussian.load_official(Path("net.pt"))
