"""Targets e^{g(ε)} N(ε; 0, I) in any dimension whose log Z is known, and from which exact draws can be made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_prior.compute.randomness import Generator
from ebm_prior.model.backbone import Backbone, Draw, Gaussian, LatentGroup, PosteriorDraw

LEVEL = 0.7
"""What is added to each g, so that log Z is not 0."""


class Standard(Backbone):
    """One group of D standard normal latents, so that z = ε; it has no images to speak of."""

    image_shape = (1, 1, 1)

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.architecture = {"dimensions": dimensions}
        self.groups = (LatentGroup("z", (dimensions,)),)
        self.zero = torch.nn.Parameter(torch.zeros(1, dimensions, dtype=torch.float64), requires_grad=False)

    def top_down(self, draw: Draw, batch_size: int) -> Tensor:
        return draw(0, Gaussian(self.zero, self.zero + 1), None)

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        raise NotImplementedError

    def likelihood(self, features: Tensor) -> Gaussian:  # type: ignore[override]
        raise NotImplementedError


class Known(NamedTuple):
    """A target in D dimensions."""

    g: Callable[[Sequence[Tensor]], Tensor]
    log_z: float
    exact: Callable[[int, Generator], list[Tensor]]


def gaussian(dimensions: int) -> Known:
    """N(m, diag(v)), with ‖m‖ = 3 and v from ½ to 2 in at most ten coordinates, near 1 in the others.

    g(ε) = c + Σ b ε − ½ q ε², so that v = 1/(1 + q), m = v b and log Z = c + ½ Σ (v b² + log v).
    """
    variance = torch.ones(dimensions, dtype=torch.float64)
    far = min(10, dimensions)
    variance[:far] = torch.logspace(-1, 1, far, base=2, dtype=torch.float64)
    variance[far:] = 1 + 0.5 * (-1.0) ** torch.arange(dimensions - far) / math.sqrt(dimensions)
    mean = torch.full_like(variance, 3 / math.sqrt(dimensions))
    b, q = mean / variance, 1 / variance - 1
    log_z = LEVEL + 0.5 * float((variance * b**2 + variance.log()).sum())

    def g(eps: Sequence[Tensor]) -> Tensor:
        return LEVEL + eps[0] @ b - 0.5 * eps[0] ** 2 @ q

    def exact(n: int, generator: torch.Generator) -> list[Tensor]:
        return [mean + variance.sqrt() * torch.randn(n, dimensions, generator=generator, dtype=torch.float64)]

    return Known(g, log_z, exact)  # type: ignore[arg-type]


def mixture(dimensions: int) -> Known:
    """.7 N(m, I) + .3 N(−m, I) with ‖m‖ = 3: two modes six standard deviations apart, with g = log of the ratio."""
    mean = torch.full((dimensions,), 3 / math.sqrt(dimensions), dtype=torch.float64)

    def g(eps: Sequence[Tensor]) -> Tensor:
        along = eps[0] @ mean
        return LEVEL - 4.5 + torch.logaddexp(math.log(0.7) + along, math.log(0.3) - along)

    def exact(n: int, generator: torch.Generator) -> list[Tensor]:
        sign = 2 * (torch.rand(n, 1, generator=generator, dtype=torch.float64) < 0.7).double() - 1
        return [sign * mean + torch.randn(n, dimensions, generator=generator, dtype=torch.float64)]

    return Known(g, LEVEL, exact)  # type: ignore[arg-type]


TARGETS = {"gaussian": gaussian, "mixture": mixture}
