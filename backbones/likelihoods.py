"""Image distributions p(x | z) for images in [0, 1]: each is an `ebm_prior.model.backbone.ImageDistribution`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_prior.compute.randomness import Generator, standard_normal, uniform
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Gaussian


class Bernoulli:
    """Independent binary pixels with the given logits, (B, C, H, W)."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @property
    def mean(self) -> Tensor:
        """The probability of a 1, (B, C, H, W)."""
        return self.logits.sigmoid()

    def log_prob(self, images: Tensor) -> Tensor:
        """Nats per image, (B,), of binary images (B, C, H, W): Σ x·l − log(1 + e^l)."""
        cross_entropy = F.binary_cross_entropy_with_logits(self.logits, images.expand_as(self.logits), reduction="none")
        return -cross_entropy.flatten(1).sum(1)

    def sample(self, *, generator: Generator = None) -> Tensor:
        """Binary images, (B, C, H, W)."""
        return binarize(self.mean, generator=generator)


def binarize(images: Tensor, *, generator: Generator = None) -> Tensor:
    """Bernoulli(pixel) draws of images (B, C, H, W) in [0, 1]: zeros and ones of the same shape and dtype."""
    u = uniform(images.shape, generator, dtype=images.dtype, device=images.device)
    return (u < images).to(images.dtype)


def dequantize(images: Tensor, *, generator: Generator = None) -> Tensor:
    """8-bit images (B, C, H, W) in [0, 1] as (255·x + u)/256 with u uniform: continuous, of the same shape."""
    u = uniform(images.shape, generator, dtype=images.dtype, device=images.device)
    return ((images * 255).round() + u) / 256


class GaussianPixels:
    """Independent normal pixels around a mean image: the plain likelihood of a VAE trained by squared error.

    mean: (B, C, H, W) in [0, 1].  std: one positive number, or a tensor that broadcasts to `mean`.
    clip: for an image head without a sigmoid, whose mean may leave [0, 1]: it is shown clipped, and the density keeps
    it as it is.
    """

    def __init__(self, mean: Tensor, std: float | Tensor = 0.1, *, clip: bool = False) -> None:
        self.mean = mean.clamp(0, 1) if clip else mean
        self.pixels = Gaussian(mean, torch.as_tensor(std, dtype=mean.dtype, device=mean.device))

    def log_prob(self, images: Tensor) -> Tensor:
        """Nats per image, (B,), of images (B, C, H, W)."""
        return self.pixels.log_prob(images)

    def sample(self, *, generator: Generator = None) -> Tensor:
        """Images (B, C, H, W), clipped to [0, 1]."""
        mean, std = self.pixels
        noise = standard_normal(mean.shape, generator, dtype=mean.dtype, device=mean.device)
        return (mean + std * noise).clamp(0, 1)


class LogisticMixture:
    """Discretised mixture of logistics over RGB or grey pixels (Salimans et al., PixelCNN++, 2017).

    `parameters` (B, 10·M, H, W): M mixture logits, then for each colour M means, M log-scales and M coefficients.
    Within a component the colours come in sequence: green's mean moves by c₀·red, blue's by c₁·red + c₂·green. With one
    colour (B, 3·M, H, W): M mixture logits, M means, M log-scales. C, the number of `colours`, is 3 or 1. The
    arithmetic is on [−1, 1], where the V + 1 = 2^bits values lie 2/V apart and the outermost bins reach to infinity.
    """

    LOG_SCALE_MIN = -7.0
    TOP_EDGE = 0.999  # values above lie in the uppermost bin

    def __init__(self, parameters: Tensor, *, bits: int = 8, colours: int = 3) -> None:
        batch, channels, height, width = parameters.shape
        own = 3 if colours == 3 else 2  # parameters of a colour in a component
        if colours not in (1, 3) or channels % (1 + colours * own):
            raise ConfigurationError(
                f"expected {1 + colours * own} channels per mixture component of {colours} colours (1 or 3), found "
                f"{channels} in all"
            )
        self.top = 2**bits - 1  # V
        self.components = channels // (1 + colours * own)
        self.logits = parameters[:, : self.components]  # (B, M, H, W)
        rest = parameters[:, self.components :].view(batch, colours, own, self.components, height, width)
        self.means = rest[:, :, 0]  # (B, C, M, H, W), before the move by the other colours
        self.log_scales = rest[:, :, 1].clamp(min=self.LOG_SCALE_MIN)
        self.coefficients = rest[:, :, 2].tanh() if colours == 3 else torch.zeros_like(self.means)

    def log_prob(self, images: Tensor) -> Tensor:
        """Nats per image, (B,), of images (B, C, H, W) in [0, 1]."""
        return self.log_prob_of_pixels(images).flatten(1).sum(1)

    def log_prob_of_pixels(self, images: Tensor) -> Tensor:
        """Nats per pixel, its colours together, (B, H, W), of images (B, C, H, W) in [0, 1]."""
        x = (2 * images - 1).unsqueeze(2)  # (B, C, 1, H, W)
        u = x - (self.means + self._shift(x))
        v = torch.exp(-self.log_scales)
        upper, lower = v * (u + 1 / self.top), v * (u - 1 / self.top)
        mass = upper.sigmoid() - lower.sigmoid()
        # Where the bin's mass underflows: the density at its centre times its width.
        density = v * u - self.log_scales - 2 * F.softplus(v * u) - math.log(self.top / 2)
        inside = torch.where(mass > 1e-5, mass.clamp(min=1e-12).log(), density)
        log_mass = torch.where(
            x < -0.999, upper - F.softplus(upper), torch.where(x > self.TOP_EDGE, -F.softplus(lower), inside)
        )
        return torch.logsumexp(log_mass.sum(1) + self.logits.log_softmax(1), dim=1)

    def _shift(self, x: Tensor) -> Tensor:
        """The shift of each colour's mean by the earlier colours, (B, C, M, H, W), for x (B, C, 1, H, W)."""
        c = self.coefficients
        if c.shape[1] == 1:
            return c  # zeros
        red, green = x[:, 0], x[:, 1]
        return torch.stack([torch.zeros_like(c[:, 0]), c[:, 0] * red, c[:, 1] * red + c[:, 2] * green], dim=1)

    @property
    def mean(self) -> Tensor:
        """The mixture's mean with every component's colours clipped to the range, (B, C, H, W)."""
        colours = self._colours(self.means, self.coefficients)  # (B, C, M, H, W)
        mean = (colours * self.logits.softmax(1).unsqueeze(1)).sum(2)
        return ((mean + 1) / 2).clamp(0, 1)  # rounding may leave the range by an ulp

    def sample(self, *, generator: Generator = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1], continuous (not rounded to 8 bits)."""
        dtype, device, colours = self.logits.dtype, self.logits.device, self.means.shape[1]
        u = 1e-5 + (1 - 2e-5) * uniform(self.logits.shape, generator, dtype=dtype, device=device)
        chosen = (self.logits - torch.log(-torch.log(u))).argmax(1)[:, None, None].expand(-1, colours, 1, -1, -1)
        mean, log_scale, coefficients = (
            t.gather(2, chosen) for t in (self.means, self.log_scales, self.coefficients)
        )  # (B, C, 1, H, W)
        u = 1e-5 + (1 - 2e-5) * uniform(mean.shape, generator, dtype=dtype, device=device)
        noise = log_scale.exp() * (u.log() - torch.log1p(-u))
        return (self._colours(mean + noise, coefficients).squeeze(2) + 1) / 2

    @staticmethod
    def _colours(own: Tensor, c: Tensor) -> Tensor:
        """Red, green, blue in sequence from their own terms and the coefficients (B, 3, M, H, W), or grey, clipped."""
        if own.shape[1] == 1:
            return own.clamp(-1, 1)
        red = own[:, 0].clamp(-1, 1)
        green = (own[:, 1] + c[:, 0] * red).clamp(-1, 1)
        blue = (own[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, 1)
        return torch.stack([red, green, blue], dim=1)
