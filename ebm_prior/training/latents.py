"""Latents for training and for evaluating the heads: posterior draws of images, and draws of p_β, as heads' inputs.

A list of latents here has entries (B, *shape) in generation order: z, or z and ε (`JointEnergy.inputs`). A draw depends
on the seed alone, not on the process that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_prior.compute.parallel import Processes
from ebm_prior.compute.randomness import Purpose, derived_generator
from ebm_prior.errors import ConfigurationError
from ebm_prior.interfaces import SILENT, Images, Progress
from ebm_prior.model.backbone import Backbone, Trace
from ebm_prior.model.energy import JointEnergy, values
from ebm_prior.model.samplers import norm
from ebm_prior.training.fit_config import FitConfig
from ebm_prior.training.objectives import Gain, gain, temper

PRIOR_DRAWS = 4  # held-out prior latents per posterior latent: log Z is the noisier part of the gain
HELD_OUT_BYTES = 2**31  # largest CPU memory for held-out latents


def held_out_count(backbone: Backbone, config: FitConfig, images: int) -> int:
    """The number of images that a fit to so many `images` holds out, within `HELD_OUT_BYTES` of latents."""
    dimensions = sum(math.prod(group.shape) for group in backbone.groups)
    bytes_each = dimensions * config.heads.views * next(backbone.parameters()).dtype.itemsize
    most = max(1, HELD_OUT_BYTES // (bytes_each * (1 + PRIOR_DRAWS)))
    return min(config.held_out, most, images // 10)


def split(backbone: Backbone, images: Images, config: FitConfig) -> tuple[Tensor, Tensor]:
    """Indices of the training and the held-out images, chosen by the seed, within `HELD_OUT_BYTES` of latents."""
    n = len(images)
    held_out = held_out_count(backbone, config, n)
    if held_out < 1:
        raise ConfigurationError(f"expected at least 10 images to fit a prior, found {n}")
    order = torch.randperm(n, generator=derived_generator(config.seed, Purpose.HELD_OUT_SPLIT))
    return order[held_out:], order[:held_out]


class HeldOut(NamedTuple):
    """Heads' inputs that training never sees: posterior draws of held-out images, and draws of p_β."""

    posterior: list[Tensor]
    prior: list[Tensor]

    def gains(self, energy: JointEnergy, ess_floor: float) -> tuple[Gain, Gain]:
        """The held-out gain of f itself, and that of τf with the best τ that keeps the ESS above the floor."""
        device = next(energy.parameters()).device
        f_q, f_p = values(energy, self.posterior, device), values(energy, self.prior, device)
        return gain(f_q, f_p), temper(f_q, f_p, ess_floor=ess_floor)


class Draws:
    """Draws the latents of a fit: posterior latents of its images, and ancestral draws of its backbone's prior."""

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        energy: JointEnergy,
        config: FitConfig,
        processes: Processes,
        progress: Progress = SILENT,
    ) -> None:
        self.backbone, self.images, self.energy = backbone, images, energy
        self.config, self.processes, self.progress = config, processes, progress
        self.like = next(backbone.parameters())

    def generators(self, *words: int) -> list[torch.Generator]:
        """One random generator for each part of a batch, derived from the seed and these integers."""
        parts = self.config.parts
        own = [()] if parts == 1 else [(part + 1,) for part in range(parts)]
        return [derived_generator(self.config.seed, *words, *word, device=self.like.device) for word in own]

    def observed(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Images as the likelihood models them, (B, C, H, W)."""
        images = self.images.batch(indices).to(self.like.device, self.like.dtype)
        return self.backbone.observe(images, generator=generator)

    def posterior(self, indices: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Posterior draws of images, as heads' inputs. They are fresh each time, as heads overfit to cached draws."""
        with torch.no_grad():
            if self.energy.config.views == 1:  # where the encoder can, no top-down pass
                return self.backbone.draw_posterior(self.observed(indices, generator), generator=generator)
            trace = self.traced(indices, generator)
            return self.energy.inputs(trace.z, trace.eps, trace.priors)

    def traced(self, indices: Tensor, generator: torch.Generator) -> Trace:
        """The traversal at a posterior draw of each image."""
        observed = self.observed(indices, generator)
        noise = self.backbone.standard_normal(len(observed), generator=generator)
        return self.backbone.trace(self.backbone.encode(observed, noise), len(observed))

    def own_conditionals(self, indices: Tensor, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Heads' inputs for posterior draws z, and the same with each z_i replaced by z_i' ~ p_β(z_i | z_<i)."""
        with torch.no_grad():
            observed = self.observed(indices, generator)
            noise, eps = (self.backbone.standard_normal(len(observed), generator=generator) for _ in range(2))
            trace = self.backbone.trace(self.backbone.encode(observed, noise), len(observed))
            redrawn = [prior.mean + prior.std * e for prior, e in zip(trace.priors, eps, strict=True)]
            positive = self.energy.inputs(trace.z, trace.eps, trace.priors)
            return positive, self.energy.inputs(redrawn, eps, trace.priors)

    def of_prior(self, eps: list[Tensor]) -> list[Tensor]:
        """Heads' inputs at the latents T_β(ε), for ε a list of (B, *group.shape)."""
        with torch.no_grad():
            trace = self.backbone.transform(eps)
            return self.energy.inputs(trace.z, eps, trace.priors)

    def held_out(self, indices: Tensor) -> HeldOut:
        """Posterior draws of the images at `indices`, and `PRIOR_DRAWS` times as many draws of p_β.

        For groupwise ratios these are as many draws of each p_β(z_i | z_<i), in order, under the z_<i of the former.
        """
        if self.config.ratios == "groupwise":
            return self._pairs(indices)

        def drawn(batch: tuple[int, Tensor]) -> list[list[Tensor]]:
            generator = derived_generator(self.config.seed, Purpose.HELD_OUT_PRIOR, batch[0], device=self.like.device)
            eps = (self.backbone.standard_normal(len(batch[1]), generator=generator) for _ in range(PRIOR_DRAWS))
            found = [[seen.cpu() for seen in self.of_prior(e)] for e in eps]
            self.progress.advance(self.processes.count * PRIOR_DRAWS * len(batch[1]))  # the others are about as far
            return found

        self.progress.begin("held-out latents", (PRIOR_DRAWS + 1) * len(indices))
        batches = self.processes.map(drawn, self._batches(indices))
        prior = [latents for batch in batches for latents in batch]
        posterior = self._of_images(indices, Purpose.HELD_OUT_POSTERIOR, lambda seen: [z.cpu() for z in seen])
        joined = ([torch.cat(group) for group in zip(*kind, strict=True)] for kind in (posterior, prior))
        return HeldOut(*joined)

    def _pairs(self, indices: Tensor) -> HeldOut:
        def drawn(batch: tuple[int, Tensor]) -> list[list[Tensor]]:
            generator = derived_generator(
                self.config.seed, Purpose.HELD_OUT_POSTERIOR, batch[0], device=self.like.device
            )
            found = [[seen.cpu() for seen in kind] for kind in self.own_conditionals(batch[1], generator)]
            self.progress.advance(self.processes.count * len(batch[1]))
            return found

        self.progress.begin("held-out latents", len(indices))
        batches = self.processes.map(drawn, self._batches(indices))
        return HeldOut(
            *([torch.cat(group) for group in zip(*kind, strict=True)] for kind in zip(*batches, strict=True))
        )

    def moments(self, indices: Tensor) -> list[Tensor]:
        """`JointEnergy.moments` of a posterior draw of each image."""
        self.progress.begin("moments of the latents", len(indices))
        return [
            torch.stack(group).sum(0)
            for group in zip(*self._of_images(indices, Purpose.MOMENTS, self.energy.moments), strict=True)
        ]

    def norms(self, indices: Tensor) -> Tensor:
        """‖ε‖/√D of a posterior draw of each image, (N,)."""

        def drawn(batch: tuple[int, Tensor]) -> Tensor:
            generator = derived_generator(self.config.seed, Purpose.TYPICAL_NORM, batch[0], device=self.like.device)
            with torch.no_grad():
                found = self.backbone.infer(self.observed(batch[1], generator), generator=generator)
                return norm(found.eps).cpu()

        return torch.cat(self.processes.map(drawn, self._batches(indices)))

    def _of_images(
        self, indices: Tensor, purpose: Purpose, read: Callable[[list[Tensor]], list[Tensor]]
    ) -> list[list[Tensor]]:
        """The results of `read` on the heads' inputs for posterior draws of the images at `indices`, batch by batch.

        `purpose`: the stream of random numbers for the draws.
        """

        def drawn(batch: tuple[int, Tensor]) -> list[Tensor]:
            generator = derived_generator(self.config.seed, purpose, batch[0], device=self.like.device)
            found = read(self.posterior(batch[1], generator))
            self.progress.advance(self.processes.count * len(batch[1]))
            return found

        return self.processes.map(drawn, self._batches(indices))

    def _batches(self, indices: Tensor) -> list[tuple[int, Tensor]]:
        """The indices in numbered batches, each as large as a part of a training batch."""
        return list(enumerate(torch.split(indices, self.config.batch_size // self.config.parts)))
