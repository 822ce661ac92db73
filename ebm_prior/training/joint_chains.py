"""The Langevin chains of joint training: posterior latents of images (Eq. 14) and latents of the prior (Eq. 13)."""

from __future__ import annotations

import torch
from torch import Tensor

from ebm_prior.model.backbone import Backbone
from ebm_prior.model.drawing import draw
from ebm_prior.model.energy import JointEnergy
from ebm_prior.model.samplers import Potential, graphed, where
from ebm_prior.training.joint_config import JointConfig
from ebm_prior.training.joint_loss import potential


class JointChains:
    """Draws latents z of `backbone` with the chains of `config`; it stores the ends of persistent chains.

    The methods take the `energy` of the prior, which must always be the same object; None as long as f = 0.
    """

    def __init__(self, backbone: Backbone, config: JointConfig, device: torch.device) -> None:
        self.backbone, self.config, self.device = backbone, config, device
        self.persistent: list[Tensor] = []  # the ends of the prior's persistent chains, in ε or z
        self._observed: Tensor | None = None  # images of the iteration, at a fixed address, as CUDA graphs need
        self._potentials: dict[tuple[bool, bool], Potential] = {}

    def of_images(self, x: Tensor, energy: JointEnergy | None, generator: torch.Generator) -> list[Tensor]:
        """Draw z from the posterior of observations x (B, C, H, W): one chain each."""
        self._observed = x.clone() if self._observed is None else self._observed.copy_(x)
        return self._run(len(x), energy, generator, of_prior=False)

    def of_prior(self, n: int, energy: JointEnergy | None, generator: torch.Generator) -> list[Tensor]:
        """Draw n latents z from the prior."""
        return self._run(n, energy, generator, of_prior=True)

    def _potential(self, energy: JointEnergy | None, *, of_prior: bool) -> Potential:
        """The chains' log density. Cached, because CUDA graphs are recorded for it.

        There is one with and one without the energy.
        """
        key = of_prior, energy is not None
        if key not in self._potentials:
            images = None if of_prior else self._observed
            g = potential(self.backbone, energy, self.config.space, images, bfloat16=self.config.bfloat16)
            self._potentials[key] = graphed(g, self.device)
        return self._potentials[key]

    def _run(self, n: int, energy: JointEnergy | None, generator: torch.Generator, *, of_prior: bool) -> list[Tensor]:
        """z at the ends of n chains. They start from the Gaussian prior; persistent ones start from their last ends."""
        config = self.config
        persistent = of_prior and config.chains == "persistent"

        def propose() -> list[Tensor]:
            start = self.backbone.standard_normal(n, generator=generator)
            if config.space == "z":
                start = self.backbone.reparameterize(start)
            if persistent and self.persistent:
                restart = torch.rand(n, generator=generator, device=self.device) < config.refresh
                start = where(restart, start, self.persistent)
            return start

        sampler = config.prior_chain if of_prior else config.posterior_chain
        ends = draw(self._potential(energy, of_prior=of_prior), propose, sampler, generator).eps
        if persistent:
            self.persistent = ends
        return ends if config.space == "z" else self.backbone.reparameterize(ends)
