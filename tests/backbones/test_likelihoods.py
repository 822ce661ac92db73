"""Image likelihoods: they sum to one, agree with their samples, and observe as they should."""

from __future__ import annotations

import pytest
import torch
from ebm_prior.backbones.likelihoods import Bernoulli, GaussianPixels, LogisticMixture, binarize, dequantize
from tiny_hvae import tiny
from torch import Tensor

from ebm_prior.compute.randomness import derived_generator


def test_bernoulli_probabilities_sum_to_one() -> None:
    logits = torch.randn(1, 1, 2, 2, dtype=torch.float64).expand(16, -1, -1, -1)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4).view(16, 1, 2, 2)
    assert Bernoulli(logits).log_prob(images).exp().sum().item() == pytest.approx(1)


def test_mixture_probabilities_sum_to_one() -> None:
    # Equal, independent colours: log p of the grey image k is three times log p(k).
    parameters = torch.zeros(1, 10, 1, 1, dtype=torch.float64)
    parameters[:, 1:] = torch.tensor([0.7, -1.5, 0.0] * 3, dtype=torch.float64).view(1, 9, 1, 1)
    grey = (torch.arange(256, dtype=torch.float64) / 255).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    log_prob = LogisticMixture(parameters.expand(256, -1, -1, -1)).log_prob(grey)
    assert (log_prob / 3).exp().sum().item() == pytest.approx(1)


def test_mixture_mean_and_density_are_those_of_its_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(20, dtype=torch.float64, generator=generator)
    parameters[2:].view(3, 3, 2)[:, 0] *= 0.2  # means and scales are small: nothing reaches the ends of the range
    parameters[2:].view(3, 3, 2)[:, 1] = -3.5

    def mixture(values: Tensor) -> LogisticMixture:
        return LogisticMixture(values.view(1, 20, 1, 1).expand(20_000, -1, -1, -1))

    distribution = mixture(parameters)
    samples = distribution.sample(generator=generator)
    assert samples.shape == (20_000, 3, 1, 1)
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - distribution.mean[0]).abs() < 4 * error).all()

    parameters[2:].view(3, 3, 2)[:, 1] -= 0.3  # a narrower density p': under p, p'/p has mean 1
    ratio = (mixture(parameters).log_prob(samples) - distribution.log_prob(samples)).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / len(samples) ** 0.5)


def test_mixture_images_lie_in_the_range() -> None:
    wild = LogisticMixture(5 * torch.randn(50, 20, 4, 4, generator=torch.Generator().manual_seed(0)))
    for images in (wild.sample(generator=torch.Generator().manual_seed(1)), wild.mean):
        assert 0 <= images.min() < 0.1
        assert 0.9 < images.max() <= 1


def test_observations() -> None:
    x = torch.arange(256.0).view(1, 1, 16, 16) / 255
    seeded = torch.Generator().manual_seed
    continuous = dequantize(x, generator=seeded(3))
    assert torch.equal((continuous * 256).floor(), x * 255)
    assert continuous.max() < 1
    many = x.expand(4000, -1, -1, -1)
    binary = binarize(many, generator=seeded(3))
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(binary.mean(0), x[0], atol=0.04, rtol=0)
    assert torch.equal(binarize(many, generator=seeded(3)), binary)
    for likelihood, image_shape, expected in (
        ("bernoulli", (1, 8, 8), binarize),
        ("logistic_mixture", (3, 8, 8), dequantize),
    ):
        images = torch.rand(2, *image_shape)
        model = tiny(image_shape=image_shape, likelihood=likelihood)
        assert torch.equal(model.observe(images, generator=seeded(1)), expected(images, generator=seeded(1)))


def test_gaussian_pixels_have_the_density_of_torchs_normal() -> None:
    mean, images = (torch.rand(3, 2, 4, 4, generator=derived_generator(n), dtype=torch.float64) for n in (1, 2))
    std = 0.05 + torch.rand(2, 1, 1, generator=derived_generator(3), dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(GaussianPixels(mean, std).log_prob(images), expected)
    outside = GaussianPixels(3 * mean - 1, std, clip=True)  # of a head without a sigmoid
    assert torch.equal(outside.mean, (3 * mean - 1).clamp(0, 1))
    assert torch.equal(outside.log_prob(images), GaussianPixels(3 * mean - 1, std).log_prob(images))
    drawn = GaussianPixels(torch.full((20_000, 1, 1, 1), 0.5), 0.1).sample(generator=derived_generator(4))
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.003)
    assert float(drawn.std()) == pytest.approx(0.1, rel=0.02)
