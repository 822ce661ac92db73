"""The shallow multi-layer generator of the paper (Table 12): a convolutional p(x | z_1) under MLP conditionals.

    z_L ~ N(0, I),  z_i | z_{i+1} ~ N(μ(z_{i+1}), σ²(z_{i+1})),  x | z_1 ~ N(g(z_1), σ²I)

and an inference network of the same shape, bottom-up (Eq. 4): q(z_1 | x) convolutional, q(z_{i+1} | z_i) MLPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from ebm_prior.backbones.options import require_count, require_list, require_number
from torch import Tensor, nn

from ebm_prior.compute.randomness import Generator, standard_normal
from ebm_prior.errors import ConfigurationError, shown
from ebm_prior.model.backbone import Backbone, Draw, Gaussian, ImageDistribution, LatentGroup, PosteriorDraw

SLOPE = 0.2  # of the leaky ReLU


class ShallowGenerator(Backbone):
    """L = 1, 2, … layers of latent vectors. The defaults are Table 12's CelebA-64.

    image_shape: (C, S, S), S halved while it is even and at least 8: 64 and 32 down to 4, 28 down to 7.
    latents: dimensions of z_1, …, z_L, from the image up.  width: channels beside the image, doubled at each halving.
    hidden: of the MLPs.  sigma: the fixed standard deviation of a pixel on [-1, 1].
    Raises ConfigurationError for what cannot be built.
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (3, 64, 64),
        latents: Sequence[int] = (100, 100),
        width: int = 128,
        hidden: int = 200,
        sigma: float = 0.3,
    ) -> None:
        super().__init__()
        for what, counts in (("image_shape", image_shape), ("latents", latents)):
            require_list(what, counts, of="count")
            for count in counts:
                require_count(what, count)
        if len(image_shape) != 3 or image_shape[1] != image_shape[2]:
            raise ConfigurationError(f"image_shape: expected (C, S, S), found {shown(image_shape)}")
        require_count("width", width)
        require_count("hidden", hidden)
        require_number("sigma", sigma, 1e-6, 1e3)
        self.image_shape = (image_shape[0], image_shape[1], image_shape[2])
        self.architecture = {
            "image_shape": list(image_shape),
            "latents": list(latents),
            "width": width,
            "hidden": hidden,
            "sigma": sigma,
        }
        self.sigma = float(sigma)
        self.groups = tuple(LatentGroup(f"z{i + 1}", (size,)) for i, size in enumerate(latents))[::-1]
        pairs = list(pairwise(latents))  # (z_i, z_{i+1}), from the image up
        self.prior = nn.ModuleList(_mlp(above, hidden, 2 * below) for below, above in pairs[::-1])
        self.posterior = nn.ModuleList(_mlp(below, hidden, 2 * above) for below, above in pairs)
        self.generator, self.encoder = _convolutions(self.image_shape, latents[0], width)

    def top_down(self, draw: Draw, batch_size: int) -> Tensor:
        """z_L, …, z_1. The top prior has batch axis 1; the context of every draw is None. Returns z_1."""
        zero = next(self.parameters()).new_zeros(1, *self.groups[0].shape)
        z = draw(0, Gaussian(zero, zero + 1), None)
        for index, conditional in enumerate(self.prior):
            z = draw(index + 1, _gaussian(conditional(z)), None)
        return z

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        """q(z_1 | x) Π q(z_{i+1} | z_i) (Eq. 4): samples bottom-up, at once."""
        z: list[Tensor] = []
        log_q: list[Tensor] = []
        seen = self.encoder(2 * images - 1).flatten(1)
        for index, xi in enumerate(reversed(noise)):
            q = _gaussian(seen if index == 0 else self.posterior[index - 1](z[-1]))
            z.append(q.mean + q.std * xi)
            log_q.append(q.log_prob(z[-1]))
        return PosteriorDraw.given(z[::-1], log_q[::-1])

    def likelihood(self, features: Tensor) -> ImageDistribution:
        """p(x | z_1) from z_1 (B, D)."""
        mean = self.generator(features[:, :, None, None])
        return CentredGaussianPixels(mean.to(features.dtype), self.sigma)  # under autocast the network alone is coarser


class CentredGaussianPixels:
    """N(mean, σ²) per pixel: a density on y = 2x − 1, from the mean of y (B, C, H, W) in [−1, 1]."""

    def __init__(self, mean: Tensor, sigma: float) -> None:
        self.pixels = Gaussian(mean, mean.new_full((), sigma))

    @property
    def mean(self) -> Tensor:
        """The mean image, (B, C, H, W) in [0, 1]."""
        return (self.pixels.mean + 1) / 2

    def log_prob(self, images: Tensor) -> Tensor:
        """Nats per image, (B,), of images (B, C, H, W) in [0, 1]: the log density of 2x − 1."""
        return self.pixels.log_prob(2 * images - 1)

    def sample(self, *, generator: Generator = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1], cut off at the range."""
        mean, std = self.pixels
        noise = standard_normal(mean.shape, generator, dtype=mean.dtype, device=mean.device)
        return ((mean + std * noise).clamp(-1, 1) + 1) / 2


def _convolutions(image_shape: tuple[int, int, int], latent: int, width: int) -> tuple[nn.Sequential, nn.Sequential]:
    """g: (B, latent, 1, 1) -> (B, C, S, S) in (−1, 1), and its mirror image: (B, C, S, S) -> (B, 2·latent, 1, 1)."""
    colours, side, _ = image_shape
    channels: list[int] = []  # from the image up
    while side % 2 == 0 and side >= 8:
        channels.append(width * 2 ** len(channels))
        side //= 2
    if not channels:
        raise ConfigurationError(f"image_shape: expected an even side of at least 8, found {image_shape}")
    up: list[nn.Module] = [nn.ConvTranspose2d(latent, channels[-1], side)]
    down: list[nn.Module] = [nn.Conv2d(channels[-1], 2 * latent, side)]
    for inner, outer in zip(channels[::-1], [*channels[-2::-1], colours], strict=True):
        up += [nn.LeakyReLU(SLOPE), nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1)]
        down[:0] = [nn.Conv2d(outer, inner, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]  # in front: beside the image
    return nn.Sequential(*up, nn.Tanh()), nn.Sequential(*down)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers (Table 12)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.LeakyReLU(SLOPE),
        nn.Linear(hidden, hidden),
        nn.LeakyReLU(SLOPE),
        nn.Linear(hidden, outputs),
    )


def _gaussian(parameters: Tensor) -> Gaussian:
    """Mean and log σ, side by side along axis 1 (Table 12: split); |log σ| stays below 5, or training overflows."""
    mean, log_std = torch.chunk(parameters, 2, dim=1)
    return Gaussian(mean, (5 * torch.tanh(log_std / 5)).exp())
