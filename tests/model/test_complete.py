"""`EBMPrior.complete`: the first groups stay, the rest are draws of p_α given them."""

from __future__ import annotations

import math

import pytest
import torch
from ebm_prior.backbones.vdvae.adapter import VDVAE
from small_priors import bent
from tiny_vdvae import FIXTURES, needs_fixtures
from toys import LinearGaussian, ToyConv

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerConfig


@pytest.fixture(scope="module")
def toy() -> EBMPrior:
    return bent(ToyConv().double().eval())


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_groups_stay_and_the_rest_are_drawn(toy: EBMPrior, count: int) -> None:
    z = toy.sample(70, seed=1).z
    drawn = toy.complete(z[:count], seed=2)
    assert all(torch.equal(a, b) for a, b in zip(drawn.z[:count], z[:count], strict=True))
    assert all((a != b).all() for a, b in zip(drawn.z[count:], z[count:], strict=True))
    torch.testing.assert_close(drawn.images, toy.backbone.decode(drawn.z).mean)
    torch.testing.assert_close(drawn.eps, toy.backbone.standardize(drawn.z))
    again = toy.complete(z[:count], seed=2, chunk=64)
    torch.testing.assert_close([*again.z, *again[2:]], [*drawn.z, *drawn[2:]], rtol=1e-10, atol=1e-10)
    short = toy.complete([group[:5] for group in z[:count]], seed=2)
    torch.testing.assert_close(short.images, drawn.images[:5], rtol=1e-10, atol=1e-10)
    assert (toy.complete(z[:count], seed=3).z[-1] != drawn.z[-1]).all()


def test_nothing_to_complete_gives_nothing(toy: EBMPrior) -> None:
    drawn = toy.complete([torch.zeros(0, 4, dtype=torch.float64)])
    assert drawn.images.shape == (0, 1, 8, 8)
    assert [len(z) for z in drawn.z] == [0, 0, 0]


def test_draws_are_of_the_conditional() -> None:
    """Mean of z1 given one z2, against importance sampling from p_β(z1 | z2) with weights e^f."""
    backbone = LinearGaussian().double().eval()
    prior = bent(backbone, scale=0.6)
    code = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    n, many = 4_000, 100_000
    sampler = SamplerConfig(proposals=64, steps=20, step_size=0.4)
    found = prior.complete([code.expand(n, -1)], sampler=sampler, chunk=4096).z[1]
    proposed = prior.complete([code.expand(many, -1)], sampler=ANCESTRAL, chunk=many).z
    weights = prior.f(proposed).detach().softmax(0)
    expected = weights @ proposed[1]
    apart = (found.mean(0) - expected) / (found.std(0) / math.sqrt(n))
    assert apart.abs().max() < 4.5
    assert ((proposed[1].mean(0) - expected).abs() / (found.std(0) / math.sqrt(n))).max() > 6  # f matters


def test_what_cannot_be_completed_is_said(toy: EBMPrior) -> None:
    z = toy.sample(3).z
    for wrong in (z, [], z[0], "z"):
        with pytest.raises(ConfigurationError, match="from 1 to 2 tensors"):
            toy.complete(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="upper: expected a list"):
        toy.complete(z[1:])
    with pytest.raises(ConfigurationError, match="float32"):
        toy.complete([z[0].float()])


@needs_fixtures
def test_a_vdvae_is_completed() -> None:
    backbone = VDVAE.load_official(FIXTURES / "cifar10-mini" / "model.th", data_set="cifar10").double()
    prior = bent(backbone.requires_grad_(False), scale=0.1)
    prior.sampler = SamplerConfig(proposals=2, steps=1, step_size=0.1)
    z = prior.backbone.sample(1)
    drawn = prior.complete([group.expand(3, *group.shape[1:]) for group in z[:2]])
    assert torch.equal(drawn.z[1], z[1].expand_as(drawn.z[1]))
    assert len({image.numpy().tobytes() for image in drawn.images}) == 3
