"""Two tiny backbones that keep the whole contract: one exactly solvable, one with every kind of latent group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ebm_prior.compute.randomness import Generator, standard_normal, uniform
from ebm_prior.model.backbone import Backbone, Draw, Gaussian, LatentGroup, PosteriorDraw


class GaussianImage(NamedTuple):
    """p(x | z) = N(mean, std²) per pixel; `mean` (B, C, H, W)."""

    mean: Tensor
    std: float

    def log_prob(self, images: Tensor) -> Tensor:
        element = -0.5 * ((images - self.mean) / self.std) ** 2 - math.log(self.std * math.sqrt(2 * math.pi))
        return element.flatten(1).sum(1)

    def sample(self, *, generator: Generator = None) -> Tensor:
        mean = self.mean
        return mean + self.std * standard_normal(mean.shape, generator, dtype=mean.dtype, device=mean.device)


class BernoulliImage(NamedTuple):
    """p(x | z) over binary pixels; `logits` (B, C, H, W)."""

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    def log_prob(self, images: Tensor) -> Tensor:
        return (images * self.logits - softplus(self.logits)).flatten(1).sum(1)

    def sample(self, *, generator: Generator = None) -> Tensor:
        return _flip(self.mean, generator)


def _flip(probability: Tensor, generator: Generator) -> Tensor:
    u = uniform(probability.shape, generator, dtype=probability.dtype, device=probability.device)
    return (u < probability).to(probability.dtype)


class LinearGaussian(Backbone):
    """z2 ~ N(0, I),  z1 | z2 ~ N(A z2 + b, diag(s²)),  x | z1 ~ N(½ + W z1, σ²), with the exact posterior.

    The posterior is exact, so log p(x|z) + log p(z) − log q(z|x) = `evidence(x)` for every z. Nothing is clamped: the
    sizes keep x in [0, 1] except with a probability that no test meets (about six standard deviations).
    """

    image_shape = (1, 2, 2)
    sigma = 0.03

    def __init__(self, top: int = 2, bottom: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.architecture = {"top": top, "bottom": bottom, "seed": seed}
        self.groups = (LatentGroup("z2", (top,)), LatentGroup("z1", (bottom,)))
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(0.7 * torch.randn(bottom, top, generator=generator) / math.sqrt(top))
        self.b = nn.Parameter(0.3 * torch.randn(bottom, generator=generator))
        self.log_s = nn.Parameter(-0.3 * torch.rand(bottom, generator=generator))
        direction = torch.randn(4, bottom, generator=generator)
        # One pixel's standard deviation under the prior is at most about 0.06.
        self.W = nn.Parameter(0.04 * direction / direction.norm(dim=1, keepdim=True))

    def top_down(self, draw: Draw, batch_size: int) -> Tensor:
        # A prior that depends on nothing above it may have batch axis 1.
        top = self.b.new_zeros(1, self.groups[0].shape[0])
        z2 = draw(0, Gaussian(top, top + 1), None)
        return draw(1, Gaussian(z2 @ self.A.T + self.b, self.log_s.exp()[None]), z2)

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        centred = images.flatten(1) - 0.5
        # x | z2 ~ N(½ + W(A z2 + b), W S Wᵀ + σ²I), hence p(z2 | x); then p(z1 | z2, x) by the same rule.
        pixels = self._pixel_covariance()

        def conditional(index: int, prior: Gaussian, context: Any) -> tuple[Tensor, Tensor]:
            if index == 0:
                map_, residual, covariance = self.W @ self.A, centred - self.W @ self.b, pixels
            else:
                map_, residual = self.W, centred - prior.mean @ self.W.T
                covariance = self.sigma**2 * torch.eye(4, dtype=pixels.dtype, device=pixels.device)
            variance = prior.std[0] ** 2
            gain = torch.linalg.solve(map_ @ (variance[:, None] * map_.T) + covariance, map_ * variance).T
            scale = torch.linalg.cholesky(torch.diag(variance) - gain @ map_ * variance)
            z = prior.mean + residual @ gain.T + noise[index] @ scale.T
            log_xi = -0.5 * (noise[index] ** 2 + math.log(2 * math.pi)).sum(1)
            return z, log_xi - scale.diagonal().log().sum()

        return PosteriorDraw(conditional)

    def likelihood(self, features: Tensor) -> GaussianImage:
        return GaussianImage(0.5 + (features @ self.W.T).view(-1, *self.image_shape), self.sigma)

    def evidence(self, images: Tensor) -> Tensor:
        """log p(x) in nats, (B,): the exact marginal likelihood."""
        map_ = self.W @ self.A
        covariance = map_ @ map_.T + self._pixel_covariance()
        marginal = torch.distributions.MultivariateNormal(0.5 + self.W @ self.b, covariance)
        return marginal.log_prob(images.flatten(1))

    def _pixel_covariance(self) -> Tensor:
        """The covariance of x given z2, (4, 4)."""
        noise = self.sigma**2 * torch.eye(4, dtype=self.W.dtype, device=self.W.device)
        return self.W @ ((2 * self.log_s).exp()[:, None] * self.W.T) + noise


class ToyConv(Backbone):
    """Dense top group (4,), then (2, 1, 1), then (3, 4, 4); binary 1×8×8 images; nonlinear and untrained.

    The posterior is top-down and residual to the prior: it uses the prior and the decoder state it is given.
    """

    image_shape = (1, 8, 8)

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.architecture = {"width": width, "seed": seed}
        self.groups = (LatentGroup("dense", (4,)), LatentGroup("point", (2, 1, 1)), LatentGroup("conv", (3, 4, 4)))
        self.dense = nn.Linear(4, width)
        self.point_prior = nn.Conv2d(width, 4, 1)
        self.point = nn.Conv2d(2, width, 1)
        self.grow = nn.ConvTranspose2d(width, width, 4)
        self.conv_prior = nn.Conv2d(width, 6, 3, padding=1)
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 1)
        )
        self.see = nn.Conv2d(1, width, 4, stride=2, padding=1)
        self.gather = nn.Conv2d(width, width, 4)
        self.dense_posterior = nn.Linear(width, 8)
        self.point_posterior = nn.Conv2d(2 * width, 4, 1)
        self.conv_posterior = nn.Conv2d(2 * width, 6, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))

    def top_down(self, draw: Draw, batch_size: int) -> tuple[Tensor, Tensor]:
        zero = self.dense.weight.new_zeros(batch_size, 4)
        z = draw(0, Gaussian(zero, zero + 1), None)
        h = self.dense(z).tanh()[:, :, None, None]
        h = h + self.point(draw(1, _gaussian(self.point_prior(h)), h))
        h = self.grow(h).tanh()
        return h, draw(2, _gaussian(self.conv_prior(h)), h)

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        seen = self.see(images).tanh()
        summary = self.gather(seen).tanh()

        def conditional(index: int, prior: Gaussian, context: Any) -> tuple[Tensor, Tensor]:
            if index == 0:
                delta = _gaussian(self.dense_posterior(summary.flatten(1)))
            elif index == 1:
                delta = _gaussian(self.point_posterior(torch.cat([summary, context], 1)))
            else:
                delta = _gaussian(self.conv_posterior(torch.cat([seen, context], 1)))
            posterior = Gaussian(prior.mean + prior.std * delta.mean, prior.std * delta.std)
            z = posterior.mean + posterior.std * noise[index]
            return z, posterior.log_prob(z)

        return PosteriorDraw(conditional)

    def likelihood(self, features: tuple[Tensor, Tensor]) -> BernoulliImage:
        h, z = features
        return BernoulliImage(self.head(h + self.conv(z)))

    def observe(self, images: Tensor, *, generator: Generator = None) -> Tensor:
        return _flip(images, generator)


def _gaussian(parameters: Tensor) -> Gaussian:
    """Mean and log standard deviation, the latter softly kept within (−1, 1), from 2C channels."""
    mean, log_std = parameters.chunk(2, dim=1)
    return Gaussian(mean, log_std.tanh().exp())
