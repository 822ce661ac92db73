"""Closed forms for the linear-Gaussian toy: its latents, a Gaussian tilt of them, and checks of draws against them.

Latents and ε are here flat: the groups side by side in generation order, (B, D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from scipy.stats import kstest
from torch import Tensor, nn
from toys import LinearGaussian

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.model.energy import EnergyConfig, JointEnergy

Z_LIMIT = 4.5
"""Standard errors allowed: beyond them by chance 7 times in a million per comparison."""
SIZES = (2, 3)
"""Of the toy's groups."""
P_LIMIT = 1e-4
"""Smallest p-value allowed. The seeds are fixed, so a test that passes once passes always."""


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten(1) for t in tensors], dim=1)


class Normal(NamedTuple):
    """N(mean, covariance), (D,) and (D, D)."""

    mean: Tensor
    covariance: Tensor

    @property
    def distribution(self) -> torch.distributions.MultivariateNormal:
        return torch.distributions.MultivariateNormal(self.mean, self.covariance)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        xi = torch.randn(n, len(self.mean), generator=generator, dtype=self.mean.dtype)
        return self.mean + xi @ torch.linalg.cholesky(self.covariance).T

    def kl(self, other: Normal) -> float:
        """KL(self ‖ other) in nats."""
        return float(torch.distributions.kl_divergence(self.distribution, other.distribution))

    def check(self, draws: Tensor) -> None:
        """Assert that independent draws (N, D) have this mean, covariance and law.

        Tolerances: standard errors sd/√N of the mean and √((Σᵢᵢ Σⱼⱼ + Σᵢⱼ²)/N) of the covariance; Kolmogorov-Smirnov
        on the whitened entries, which are N·D independent N(0, 1).
        """
        n, (mean, cov) = len(draws), self
        variance = cov.diagonal()
        z_mean = (draws.mean(0) - mean) / (variance / n).sqrt()
        z_cov = (draws.T.cov() - cov) / ((variance[:, None] * variance + cov**2) / n).sqrt()
        assert z_mean.abs().max() < Z_LIMIT, z_mean
        assert z_cov.abs().max() < Z_LIMIT, z_cov
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (draws - mean).T, upper=False)
        p_value = kstest(white.flatten().numpy(), "norm").pvalue
        assert p_value > P_LIMIT, p_value


class Quadratic(nn.Module):
    """f(z) = c + ⟨b, z⟩ − ½⟨z, Qz⟩ with the interface of JointEnergy: z, a list of groups -> (B,)."""

    config = EnergyConfig(conditional=False)
    inputs = JointEnergy.inputs

    def __init__(self, c: Tensor, b: Tensor, Q: Tensor) -> None:
        super().__init__()
        self.c, self.b, self.Q = nn.Parameter(c), nn.Parameter(b), nn.Parameter(Q)

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        z_ = flat(z)
        return self.c + z_ @ self.b - 0.5 * ((z_ @ self.Q) * z_).sum(1)

    def scaled(self, tau: float) -> Quadratic:
        return Quadratic(*(tau * parameter.detach() for parameter in self.parameters())).requires_grad_(False)


def tilt(reference: Normal, f: Quadratic) -> tuple[Normal, Tensor]:
    """The law ∝ exp(f)·reference, and log Z = log E_reference[exp f]: completing the square."""
    precision = torch.linalg.inv(reference.covariance)
    information = precision @ reference.mean
    covariance = torch.linalg.inv(precision + f.Q)
    mean = covariance @ (information + f.b)
    log_z = (
        f.c
        + 0.5 * mean @ (information + f.b)
        - 0.5 * reference.mean @ information
        - 0.5 * torch.linalg.slogdet(torch.eye(len(mean), dtype=mean.dtype) + f.Q @ reference.covariance).logabsdet
    )
    return Normal(mean, covariance), log_z


def log_ratio(q: Normal, p: Normal) -> Quadratic:
    """f* = log q − log p."""
    precisions = [torch.linalg.inv(n.covariance) for n in (q, p)]
    informations = [precision @ n.mean for n, precision in zip((q, p), precisions, strict=True)]
    zero = torch.zeros_like(q.mean)
    level = q.distribution.log_prob(zero) - p.distribution.log_prob(zero)
    return Quadratic(level, informations[0] - informations[1], precisions[0] - precisions[1])


def latent_map(backbone: LinearGaussian) -> tuple[Tensor, Tensor]:
    """T_β(ε) = μ + Mε of the toy, written out: z2 = ε2, z1 = b + A ε2 + s ε1."""
    top, bottom = (group.shape[0] for group in backbone.groups)
    M = torch.zeros(top + bottom, top + bottom, dtype=backbone.b.dtype)
    M[:top, :top] = torch.eye(top)
    M[top:, :top] = backbone.A.detach()
    M[top:, top:] = torch.diag(backbone.log_s.detach().exp())
    return torch.cat([torch.zeros(top, dtype=M.dtype), backbone.b.detach()]), M


def latent_prior(backbone: LinearGaussian) -> Normal:
    """p_β(z) of the toy."""
    mean, M = latent_map(backbone)
    return Normal(mean, M @ M.T)


def aggregate_posterior(backbone: LinearGaussian, source: Normal) -> Normal:
    """q(z) = E_x[p(z | x)] for images x = ½ + W z1 + σξ of latents z ~ `source`, by conditioning of Gaussians."""
    prior = latent_prior(backbone)
    C = torch.cat([torch.zeros(4, backbone.groups[0].shape[0], dtype=prior.mean.dtype), backbone.W.detach()], dim=1)
    noise = backbone.sigma**2 * torch.eye(4, dtype=prior.mean.dtype)
    K = prior.covariance @ C.T @ torch.linalg.inv(C @ prior.covariance @ C.T + noise)
    mean = prior.mean + K @ C @ (source.mean - prior.mean)
    covariance = prior.covariance - K @ C @ prior.covariance + K @ (C @ source.covariance @ C.T + noise) @ K.T
    return Normal(mean, 0.5 * (covariance + covariance.T))


def images_of(backbone: LinearGaussian, source: Normal, n: int, generator: torch.Generator) -> Tensor:
    """n images x = ½ + W z1 + σξ of latents z ~ `source`, (n, 1, 2, 2)."""
    z1 = source.sample(n, generator)[:, backbone.groups[0].shape[0] :]
    xi = torch.randn(n, 4, generator=generator, dtype=z1.dtype)
    return (0.5 + z1 @ backbone.W.detach().T + backbone.sigma * xi).view(-1, *backbone.image_shape)


class ArrayImages:
    """Images in memory, as `fit` takes them."""

    name = "closed form"

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Any) -> Tensor:
        return self.images[torch.as_tensor(indices)]


class Problem(NamedTuple):
    p: Normal  # p_β(z)
    source: Normal  # latents of the images
    q: Normal  # aggregate posterior
    best: Quadratic  # f* = log q − log p_β

    @classmethod
    def of(cls, backbone: LinearGaussian) -> Problem:
        """Images whose latents p_β does not have."""
        p = latent_prior(backbone)
        shift = torch.tensor([1.0, -0.8, 1.1, -1.0, 0.9], dtype=torch.float64)
        source = Normal(p.mean + shift, 0.3 * p.covariance)
        q = aggregate_posterior(backbone, source)
        return cls(p, source, q, log_ratio(q, p).requires_grad_(False))


def posterior_draws(backbone: LinearGaussian, problem: Problem, n: int, seed: int) -> list[Tensor]:
    """Posterior draws of fresh images, as the library makes them."""
    generator = derived_generator(25, seed)
    return backbone.infer(images_of(backbone, problem.source, n, generator), generator=generator).z


def gain_error(f_q: Tensor, f_p: Tensor, tau: float) -> float:
    """Standard error of the gain of τf: of τE_q[f], and by the delta method of log E_p[e^{τf}]."""
    weights = (tau * f_p - (tau * f_p).max()).exp()
    relative = float(weights.var() / weights.mean() ** 2)
    return math.sqrt(tau**2 * float(f_q.var()) / len(f_q) + relative / len(f_p))
