"""Code lengths are those of PNG files; the density of terms is a shrunk Gaussian, with scikit-learn as an oracle."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.covariance import LedoitWolf

from ebm_prior.evaluation.normality import TermDensity, code_length, shrunk_covariance


@pytest.mark.parametrize("channels", [1, 3])
def test_a_code_is_a_png_file(channels: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, channels, 6, 9), dtype=np.uint8)
    images = torch.from_numpy(pixels).float() / 255
    for image, nats in zip(pixels, code_length(images), strict=True):
        array = image[0] if channels == 1 else image.transpose(1, 2, 0)
        Image.fromarray(array).save(tmp_path / "image.png", optimize=True)
        assert nats == pytest.approx(8 * math.log(2) * (tmp_path / "image.png").stat().st_size)
        assert (np.asarray(Image.open(tmp_path / "image.png")) == array).all()


def test_black_and_white_takes_one_bit_a_pixel() -> None:
    random = torch.Generator().manual_seed(6)
    binary = (torch.rand(2, 1, 40, 40, generator=random) < 0.5).float()
    shades = binary * 254 / 255
    packed, eight_bits = code_length(binary), code_length(shades)
    bound = 40 * 40 * math.log(2)
    assert (packed > bound).all()
    assert (packed < bound + 8 * math.log(2) * (40 + 100)).all()  # a byte per row, and less than 100 of headers
    assert (eight_bits > packed).all()


def test_simple_images_have_short_codes() -> None:
    generator = torch.Generator().manual_seed(1)
    noise, flat = torch.rand(1, 3, 32, 32, generator=generator), torch.full((1, 3, 32, 32), 0.3)
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    lengths = [float(code_length(images)[0]) for images in (flat, ramp, noise)]
    assert lengths == sorted(lengths)
    assert lengths[2] > 3 * 32 * 32 * math.log(256)  # noise cannot be compressed
    assert code_length(torch.rand(3, 2, 5, 5, generator=generator)).shape == (3,)  # two channels


@pytest.mark.parametrize(("n", "size"), [(400, 5), (12, 8)])
def test_shrinkage_is_that_of_ledoit_and_wolf(n: int, size: int) -> None:
    random = np.random.default_rng(2)
    x = random.normal(size=(n, size)) @ random.normal(size=(size, size))
    x -= x.mean(0)
    np.testing.assert_allclose(shrunk_covariance(x), LedoitWolf(assume_centered=True).fit(x).covariance_, rtol=1e-10)


def test_the_density_of_terms_is_the_oracles() -> None:
    random = np.random.default_rng(3)
    terms = random.normal(size=(300, 4)) @ random.normal(size=(4, 4)) * [1, 10, 100, 0.1] + [5, -900, 0, 1]
    others = terms[:50] + random.normal(size=(50, 4))
    mean, scale = terms.mean(0), terms.std(0)
    oracle = LedoitWolf().fit((terms - mean) / scale)
    distances = oracle.mahalanobis((others - mean) / scale)
    _, log_det = np.linalg.slogdet(oracle.covariance_)
    expected = -0.5 * (distances + log_det + 4 * math.log(2 * math.pi)) - np.log(scale).sum()
    np.testing.assert_allclose(TermDensity(terms).log_density(others), expected, rtol=1e-8)


def test_the_density_asks_neither_for_units_nor_for_terms_that_never_change() -> None:
    random = np.random.default_rng(4)
    terms, others = random.normal(size=(200, 3)), random.normal(size=(20, 3))
    found = TermDensity(terms).log_density(others)
    scaled = TermDensity(1e3 * terms).log_density(1e3 * others)
    np.testing.assert_allclose(scaled, found - 3 * math.log(1e3), rtol=1e-8)
    constant = TermDensity(np.c_[terms, np.full(200, 0.1)]).log_density(np.c_[others, np.full(20, 0.7)])
    np.testing.assert_allclose(constant, found)


@pytest.mark.parametrize("n", [2, 3])
def test_a_few_images_have_a_density(n: int) -> None:
    random = np.random.default_rng(7)
    terms = random.normal(size=(n, 6))
    density = TermDensity(terms)
    inside, outside = density.log_density(terms.mean(0, keepdims=True)), density.log_density(terms[:1] + 9)
    assert np.isfinite([inside, outside]).all()
    assert (inside > outside).all()


def test_images_unlike_the_normal_ones_in_either_direction_are_less_dense() -> None:
    """Two-sided, and blind to no correlation: (2, −2) lies within both terms' spread, and far from their line."""
    random = np.random.default_rng(5)
    common = random.normal(size=(500, 1))
    density = TermDensity(np.c_[common, common + 0.2 * random.normal(size=(500, 1))])
    normal, low, high, odd = density.log_density(np.array([[1.0, 1.0], [-6.0, -6.0], [6.0, 6.0], [2.0, -2.0]]))
    assert normal > low + 10
    assert normal > high + 10
    assert normal > odd + 10
