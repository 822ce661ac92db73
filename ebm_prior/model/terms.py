"""The terms of an image's log posterior, one by one, from which users can make scores of their own.

    L^{>0} = E_q[log p(x|z) + Σ_i log p_β(z_i | z_<i) − Σ_i log q(z_i | …) + τ f(z)]

is their sum (`Form(0, mode="elbo")` in `scores`, on the same draws). The sum weighs all groups alike; a score of the
terms can weigh them by their values at images of the known kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ebm_prior.compute.isolation import isolated
from ebm_prior.compute.randomness import chunks
from ebm_prior.model.arguments import require_calibrated, require_count, require_images
from ebm_prior.model.backbone import Backbone, Gaussian
from ebm_prior.model.energy import JointEnergy
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.scores import Batch

LIKELIHOOD, ENERGY, CEILING = "log p(x|z)", "f", "f(ceiling)"
"""Names of terms: of the likelihood, the beginning of those of the energy, and of the nats that a ceiling takes."""


class ImageTerms:
    """The part of a prior that takes the log posterior of images apart."""

    backbone: Backbone
    energy: JointEnergy
    sampler: SamplerConfig
    tau: float
    ceiling: float
    regime: Literal["calibrated", "refiner"]

    if TYPE_CHECKING:

        def f(
            self, z: Sequence[Tensor], eps: Sequence[Tensor] | None = None, priors: Sequence[Gaussian] | None = None
        ) -> Tensor: ...

    @isolated()
    def terms(
        self, images: Tensor, *, draws: int = 8, seed: int = 0, first: int = 0, chunk: int = 256
    ) -> dict[str, Tensor]:
        """The terms of L^{>0} of images, as means over draws of q(z | x): by name, (B,) in nats.

        Args:
            images: (B, C, H, W) in [0, 1].
            draws: number of draws of the latents per image.
            seed: the draws of image i depend on (seed, first + i) alone; `scores` has the same ones.
            first: number of the first image in its set, a multiple of 64.
            chunk: number of images computed at a time; no result depends on it.

        Returns:
            "log p(x|z)"; for each latent group "log p(NAME)" and "-log q(NAME)"; for each summand of τ f "f(NAME)" and
            "f(joint)", or "f" for an energy that is no sum; and, where the prior has a ceiling, "f(ceiling)", the nats
            that it takes from τ f. Their sum is L^{>0} of the mode elbo.

        Raises:
            RegimeError: for a refiner, because its f is no density ratio.
            ConfigurationError: for images or numbers out of their range.

        >>> terms = prior.terms(images.batch(range(4)), draws=2)
        >>> terms["log p(x|z)"].shape
        torch.Size([4])
        """
        require_images(images, self.backbone.image_shape)
        require_calibrated(self.regime, "the terms of a score")
        draws, seed = require_count("draws", draws, least=1), require_count("seed", seed)
        parts = [
            self._terms(images[start : start + count], draws, seed, first + start)
            for start, count in chunks(len(images), require_count("chunk", chunk, least=1))
        ]
        names = self._names()
        columns = torch.cat(parts).unbind(1) if parts else [images.new_empty(0) for _ in names]
        return dict(zip(names, columns, strict=True))

    def _names(self) -> list[str]:
        groups, energy = [group.name for group in self.backbone.groups], self.energy
        summands = [f"{ENERGY}({name})" for name in [*groups, *(["joint"] if energy.joint is not None else [])]]
        return [
            LIKELIHOOD,
            *(f"log p({name})" for name in groups),
            *(f"-log q({name})" for name in groups),
            *(summands if energy.per_group else [ENERGY]),
            *([CEILING] if self.ceiling < math.inf else []),
        ]

    @torch.no_grad()
    def _terms(self, images: Tensor, draws: int, seed: int, first: int) -> Tensor:
        """The terms of one chunk, (B, number of terms), as means over the draws."""
        batch = Batch(self.backbone, self.f, images, self.sampler, None, seed, first)
        found = []
        for number in range(draws):
            posterior = batch.posterior(number, 0)
            trace = self.backbone.given(posterior.z)
            summands = self.tau * self.energy.terms(self.energy.inputs(trace.z, trace.eps, trace.priors))
            likelihood = self.backbone.likelihood(trace.features).log_prob(batch.x)
            columns = [likelihood[:, None], trace.log_prior, -posterior.log_q, summands]
            if self.ceiling < math.inf:
                columns.append((self.ceiling - summands.sum(1, keepdim=True)).clamp(max=0))
            found.append(torch.cat(columns, dim=1))
        return torch.stack(found).mean(0)
