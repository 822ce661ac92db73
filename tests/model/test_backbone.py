"""The derived passes of a backbone: one traversal read in several ways tells one story, in closed form on the toys."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_form import Normal, flat, images_of, latent_map, latent_prior
from torch import Tensor
from toys import LinearGaussian, ToyConv

from ebm_prior.compute.randomness import BlockGenerator, derived_generator
from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.model.backbone import Backbone, Gaussian, LatentGroup
from ebm_prior.model.drawing import draw
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.latents import require_latents
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import start

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


# Latents of the wrong shape, made of right ones, and what is said of them.
WRONG: dict[str, tuple[Callable[[list[Tensor]], Any], str]] = {
    "a group is missing": (lambda e: e[:2], r"found 2 tensors: \(6, 4\), \(6, 2, 1, 1\)$"),
    "a group too many": (lambda e: [*e, e[0]], r"found 4 tensors: \(6, 4\), "),
    "bottom first": (lambda e: e[::-1], r"dense has \(6, 3, 4, 4\).*they are in reverse order"),
    "another batch": (lambda e: [e[0], e[1], e[2][:3]], "with one B; found B = 6, 6, 3$"),
    "an axis more": (lambda e: [e[0][:, :, None], *e[1:]], r"found that dense has \(6, 4, 1\)$"),
    "an axis less": (lambda e: [e[0], e[1][:, 0], e[2]], r"found that point has \(6, 1, 1\)$"),
    "one draw": (lambda e: [each[0] for each in e], r"dense has \(4,\), point has \(2, 1, 1\), conv has \(3, 4, 4\)$"),
    "two of them": (lambda e: [e[0][:, :3], e[1], e[2][..., :2]], r"dense has \(6, 3\), conv has \(6, 3, 4, 2\)$"),
    "no axis": (lambda e: [e[0].sum(), *e[1:]], r"found that dense has \(\)$"),
    "one tensor": (lambda e: e[0], r"found a float64 tensor of shape \(6, 4\)$"),
    "lists": (lambda e: [e[0].tolist(), *e[1:]], "number 0 is a list$"),
    "nothing": (lambda _: None, "found None$"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_latents_of_the_wrong_shape_are_named(mistake: str) -> None:
    """By every pass of a backbone, every function of a prior, and the chains on it."""
    backbone = toy(ToyConv)
    prior = EBMPrior(backbone, JointEnergy(backbone.groups, EnergyConfig(channels=4, hidden=8, joint=8)))
    make, said = WRONG[mistake]
    wrong = make(eps_of(backbone))
    calls: list[Callable[[Any], object]] = [
        *(backbone.transform, backbone.reparameterize, backbone.standardize, backbone.log_prior, backbone.decode),
        *(backbone.given, prior.f, prior.potential, prior.log_density, prior.log_prior),
    ]
    if wrong is not None:  # which these take for what is not known yet
        calls.append(lambda eps: prior.f(eps_of(backbone), eps))
        calls.append(lambda noise: backbone.infer(pictures(backbone), noise=noise))
    if isinstance(wrong, list) and all(isinstance(each, Tensor) for each in wrong):
        calls += [
            lambda eps: start(prior.potential, eps),
            lambda eps: draw(prior.potential, lambda: eps, prior.sampler),
        ]
    for call in calls:
        with pytest.raises(
            ConfigurationError, match="^(z|eps|noise): expected a list of one tensor per .*" + said
        ) as caught:
            call(wrong)
        assert "dense (B, 4), point (B, 2, 1, 1), conv (B, 3, 4, 4)" in str(caught.value)


def test_a_number_is_no_latent_of_a_group_without_axes() -> None:
    with pytest.raises(ConfigurationError, match=r"^z: expected .*: a \(B\); found that a has \(\)$"):
        require_latents("z", [torch.tensor(1.0)], [LatentGroup("a", ())])


@pytest.mark.parametrize("of", ["infer", "draw_posterior"])
def test_images_of_the_wrong_shape_are_named(of: str) -> None:
    use = getattr(toy(ToyConv), of)
    for wrong, said in ((torch.rand(6, 1, 8, 9), r"\(6, 1, 8, 9\)"), (torch.tensor(1.0), r"\(\)"), (None, "None")):
        with pytest.raises(ConfigurationError, match=rf"expected images of shape \(B, 1, 8, 8\), found {said}$"):
            use(wrong)


def test_an_adapter_without_an_official_format_says_so() -> None:
    with pytest.raises(
        CheckpointError, match=r"net\.pt is not a backbone in ebm-prior's own safetensors form.*reads no"
    ):
        LinearGaussian.load_official(Path("net.pt"))
