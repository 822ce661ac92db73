"""The shallow generator: Table 12 layer by layer, the contract, Eq. 4, and that the commands' passes work on it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ebm_prior.backbones.shallow import ShallowGenerator
from tiny_shallow import small
from torch import nn

from ebm_prior.errors import ConfigurationError
from ebm_prior.testing.contract import check_backbone


@pytest.mark.parametrize("latents", [(3,), (5, 4, 3, 2, 1)])
def test_contract(latents: tuple[int, ...]) -> None:
    report = check_backbone(small(latents=latents).eval())
    assert not report.skipped
    assert [group.shape for group in small(latents=latents).groups] == [(n,) for n in latents[::-1]]


def layers(network: nn.Sequential, shape: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """(kind, kernel, channels out, stride) or (kind, features out), and the output's shape, of every layer."""
    x, found = torch.zeros(1, *shape), []
    for layer in network:
        x = layer(x)
        kind = type(layer).__name__
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            found.append((kind, layer.kernel_size[0], layer.out_channels, layer.stride[0], x.shape[-1]))
        elif isinstance(layer, nn.Linear):
            found.append((kind, layer.out_features))
        else:
            found.append((kind,))
            assert kind != "LeakyReLU" or layer.negative_slope == 0.2
    return found


def test_table_12_for_celeba_64() -> None:
    backbone = ShallowGenerator()
    up, down, act = "ConvTranspose2d", "Conv2d", ("LeakyReLU",)
    assert layers(backbone.generator, (100, 1, 1)) == [
        (up, 4, 1024, 1, 4),
        act,
        (up, 4, 512, 2, 8),
        act,
        (up, 4, 256, 2, 16),
        act,
        (up, 4, 128, 2, 32),
        act,
        (up, 4, 3, 2, 64),
        ("Tanh",),
    ]
    assert layers(backbone.encoder, (3, 64, 64)) == [
        (down, 4, 128, 2, 32),
        act,
        (down, 4, 256, 2, 16),
        act,
        (down, 4, 512, 2, 8),
        act,
        (down, 4, 1024, 2, 4),
        act,
        (down, 4, 200, 1, 1),
    ]
    for conditional in (backbone.prior[0], backbone.posterior[0]):
        assert layers(conditional, (100,)) == [("Linear", 200), act, ("Linear", 200), act, ("Linear", 200)]


@pytest.mark.parametrize(("shape", "inner"), [((3, 32, 32), (64, 4)), ((1, 28, 28), (32, 7))])
def test_other_sizes(shape: tuple[int, int, int], inner: tuple[int, int]) -> None:
    backbone = ShallowGenerator(shape, latents=(8, 4), width=16)
    images = torch.rand(2, *shape)
    posterior = backbone.infer(images)
    assert backbone.likelihood(posterior.features).mean.shape == images.shape
    assert layers(backbone.generator, (8, 1, 1))[0][1:] == (inner[1], inner[0], 1, inner[1])


def test_parameters_grow_with_the_square_of_the_width() -> None:
    counts = [sum(p.numel() for p in ShallowGenerator(width=w).generator.parameters()) for w in (64, 128)]
    assert 3.5 < counts[1] / counts[0] < 4


def test_the_likelihood_is_gaussian_on_minus_one_to_one() -> None:
    backbone, images = small(sigma=0.3).double().eval(), torch.rand(3, 1, 28, 28, dtype=torch.float64)
    z = backbone.sample(3)
    mean = 2 * backbone.decode(z).mean - 1
    squares = (2 * images - 1 - mean).square().flatten(1).sum(1)
    expected = -squares / (2 * 0.3**2) - 784 * math.log(0.3 * math.sqrt(2 * math.pi))  # Eq. 9
    torch.testing.assert_close(backbone.decode(z).log_prob(images), expected)


def test_the_posterior_is_bottom_up() -> None:
    """Eq. 4: z_2 sees the image through z_1 alone, and with equal z_1 it is the same whatever the image."""
    backbone = small().double().eval()
    with torch.no_grad():
        for parameter in backbone.encoder[-1].parameters():
            parameter.zero_()  # q(z_1 | x) = N(0, 1): the same z_1 from any image
    noise = backbone.standard_normal(2)
    one, other = (backbone.infer(torch.rand(2, 1, 28, 28, dtype=torch.float64), noise=noise) for _ in range(2))
    torch.testing.assert_close(one.z, other.z)
    torch.testing.assert_close(one.z[1], noise[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"image_shape": (1, 28, 14)},
        {"image_shape": (1, 7, 7)},
        {"latents": ()},
        {"latents": (0,)},
        {"width": 0},
        {"hidden": 1.5},
        {"sigma": 0.0},
    ],
)
def test_what_cannot_be_built(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(changes))):
        small(**changes)
