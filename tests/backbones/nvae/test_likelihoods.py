"""NVAE's likelihoods and bit reduction: the official code's numbers, branch by branch."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from ebm_prior.backbones import likelihoods
from ebm_prior.backbones.likelihoods import Bernoulli
from ebm_prior.backbones.nvae import distributions
from ebm_prior.backbones.nvae.distributions import GaussianImage, NvaeMixture, reduce_bits
from tiny_nvae import FIXTURES, needs_fixtures, tiny
from torch import Tensor

PRECISIONS = [("f64", torch.float64, 1e-9), ("f32", torch.float32, 1e-5)]


@cache
def arrays() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "extras" / "likelihoods.npz"))


def given(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(arrays()[name]).to(dtype)


def agree(found: Tensor, name: str, tolerance: float) -> None:
    expected = given(name, found.dtype)
    assert found.shape == expected.shape
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= tolerance, name


@needs_fixtures
@pytest.mark.parametrize(("precision", "dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", ["logistic_m10_8bit", "logistic_m10_5bit", "logistic_m3_8bit"])
def test_the_mixture_is_the_official_one(
    name: str, precision: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = int(name[-4])
    x = given(f"{name}/x", dtype)
    x = x if bits == 8 else reduce_bits(x, bits)
    agree(x, f"{precision}/{name}/x_in", tolerance)
    parameters = given(f"{name}/param", dtype).requires_grad_()
    mixture = NvaeMixture(parameters, bits=bits)
    log_prob = mixture.log_prob_of_pixels(x)
    agree(log_prob, f"{precision}/{name}/log_prob", max(tolerance, 1e-8))  # torch's softplus is linear above 20
    torch.testing.assert_close(mixture.log_prob(x), log_prob.sum((1, 2)))
    agree(mixture.mean, f"{precision}/{name}/mean", tolerance)
    if precision == "f64":
        (gradient,) = torch.autograd.grad(log_prob.sum(), parameters)
        agree(gradient, f"f64/{name}/grad_param_sum_log_prob", 1e-8)
        # `sample` maps its uniform numbers to (1e-5, 1 − 1e-5), where the recorded ones are.
        recorded = iter([(given(f"{name}/T1.0/u_{what}") - 1e-5) / (1 - 2e-5) for what in ("select", "logistic")])
        monkeypatch.setattr(likelihoods, "uniform", lambda shape, *_, **__: next(recorded).view(shape))
        agree(mixture.sample(), f"f64/{name}/T1.0/sample", 1e-9)


@needs_fixtures
@pytest.mark.parametrize(("precision", "dtype", "tolerance"), PRECISIONS)
def test_the_gaussian_is_the_official_one(
    precision: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, raw = given("gaussian/x", dtype), given("gaussian/param", dtype)
    monkeypatch.setattr(distributions, "standard_normal", lambda *_, **__: given("gaussian/eps_x", dtype))
    for kind, floor in (("", None), ("_vaebm", -2.0)):
        image = GaussianImage(raw, log_std_floor=floor)
        agree(image.scored.mean, f"{precision}/gaussian/mu", tolerance)
        agree(image.scored.std, f"{precision}/gaussian/sigma{kind}", tolerance)
        expected = given(f"{precision}/gaussian/log_prob{kind}", dtype).sum((1, 2, 3))
        torch.testing.assert_close(image.log_prob(x), expected, rtol=10 * tolerance, atol=0)
        agree(image.sample(), f"{precision}/gaussian/sample", tolerance)  # the floor is for log p alone


@needs_fixtures
def test_the_bernoulli_is_the_official_one() -> None:
    logits, x = given("bernoulli/logits"), given("bernoulli/x")
    agree(Bernoulli(logits).log_prob(x), "f64/bernoulli/log_px_uncropped", 1e-9)
    agree(Bernoulli(logits).mean, "f64/bernoulli/mean", 1e-9)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    agree(Bernoulli(logits[inner]).log_prob(x[inner]), "f64/bernoulli/log_px_cropped", 1e-9)


@needs_fixtures
@pytest.mark.parametrize(("precision", "dtype", "_"), PRECISIONS)
@pytest.mark.parametrize("bits", [1, 3, 5, 7])
def test_the_bit_reduction_is_the_official_one(bits: int, precision: str, dtype: torch.dtype, _: float) -> None:
    assert torch.equal(reduce_bits(given("bits/x", dtype), bits), given(f"{precision}/bits{bits}/out", dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bit_reduction_keeps_the_leading_bits_and_is_idempotent(dtype: torch.dtype) -> None:
    k = torch.arange(256)
    for bits in range(1, 9):
        reduced = reduce_bits(k.to(dtype) / 255, bits)
        assert torch.equal(reduced, (k >> (8 - bits)).to(dtype) / (2**bits - 1)), bits
        assert torch.equal(reduce_bits(reduced, bits), reduced), bits


def test_observations_have_the_depth_of_the_model() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(tiny().observe(images), images)
    assert torch.equal(tiny(bits=5).observe(images), reduce_bits(images, 5))
    binary = tiny(image_shape=[1, 6, 6], padding=1, likelihood="bernoulli")
    seen = [binary.observe(images[:, :1, 1:7, 1:7], generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert set(seen[0].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_probabilities_of_five_bits_sum_to_one() -> None:
    parameters = torch.zeros(1, 10, 1, 1, dtype=torch.float64)
    parameters[:, 1:] = torch.tensor([0.3, -1.5, 0.0] * 3, dtype=torch.float64).view(1, 9, 1, 1)
    grey = (torch.arange(32, dtype=torch.float64) / 31).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    log_prob = NvaeMixture(parameters.expand(32, -1, -1, -1), bits=5).log_prob(grey)
    assert (log_prob / 3).exp().sum().item() == pytest.approx(1)
