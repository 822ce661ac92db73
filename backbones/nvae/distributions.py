"""The distributions of NVAE: its soft-clamped Gaussian, its two colour likelihoods, and its bit reduction."""

from __future__ import annotations

import torch
from ebm_prior.backbones.likelihoods import LogisticMixture
from torch import Tensor

from ebm_prior.compute.randomness import Generator, standard_normal
from ebm_prior.model.backbone import Gaussian


def soft_clamp(x: Tensor) -> Tensor:
    """5·tanh(x/5), of x's shape."""
    return 5 * torch.tanh(x / 5)


def soft_gaussian(raw: Tensor) -> Gaussian:
    """Mean 5·tanh(m/5) and std exp(5·tanh(l/5)) + 0.01 from raw (B, 2C, H, W) = (m, l); from zeros, 0 and 1.01."""
    mean, log_std = soft_clamp(raw).chunk(2, dim=1)
    return Gaussian(mean, log_std.exp() + 0.01)


def reduce_bits(images: Tensor, bits: int) -> Tensor:
    """Images (B, C, H, W) of 8 bits in [0, 1], at the depth of `bits`: ⌊255·x/2^(8−b)⌋/(2^b − 1). Idempotent."""
    return (images * 255 / 2.0 ** (8 - bits)).floor() / (2.0**bits - 1)


class NvaeMixture(LogisticMixture):
    """The discretised mixture of logistics of NVAE: another top edge, any bit depth, and another mean image.

    Above 0.99 on [−1, 1] a pixel counts as the top value. At 8 bits this includes 254, so the published likelihoods of
    all values add up to more than one.
    """

    TOP_EDGE = 0.99

    @property
    def mean(self) -> Tensor:
        """One chain of colours with the components' averaged means and coefficients, as published: (B, C, H, W)."""
        weights = self.logits.softmax(1).unsqueeze(1)
        own, c = ((weights * values).sum(2) for values in (self.means, self.coefficients))
        return (self._colours(own, c) + 1) / 2


class GaussianImage:
    """Gaussian pixels: a density on y = 2x − 1, from raw (B, 2C, H, W).

    `log_std_floor`: lower bound of the soft-clamped log σ in log p, but not in samples (VAEBM: −2).
    """

    def __init__(self, raw: Tensor, *, log_std_floor: float | None = None) -> None:
        self.pixels = soft_gaussian(raw)
        self.scored = self.pixels
        if log_std_floor is not None:
            log_std = soft_clamp(raw.chunk(2, dim=1)[1]).clamp(min=log_std_floor)
            self.scored = Gaussian(self.pixels.mean, log_std.exp() + 0.01)

    @property
    def mean(self) -> Tensor:
        """The mean, cut off at the range: (B, C, H, W) in [0, 1]."""
        return (self.pixels.mean.clamp(-1, 1) + 1) / 2

    def log_prob(self, images: Tensor) -> Tensor:
        """Nats per image, (B,), of images (B, C, H, W) in [0, 1]: the log density of 2x − 1."""
        return self.scored.log_prob(2 * images - 1)

    def sample(self, *, generator: Generator = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1], continuous, cut off at the range."""
        mean, std = self.pixels
        noise = standard_normal(mean.shape, generator, dtype=mean.dtype, device=mean.device)
        return ((mean + std * noise).clamp(-1, 1) + 1) / 2
