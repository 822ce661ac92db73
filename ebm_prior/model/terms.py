"""The terms of an image's log posterior, one by one, from which users can make scores of their own.

    L^{>0} = E_q[log p(x|z) + Σ_i log p_β(z_i | z_<i) − Σ_i log q(z_i | …) + τ f(z)]

is their sum (`Form(0, mode="elbo")` in `scores`, on the same draws). The sum weighs all groups alike; a score of the
terms can weigh them by their values at images of the known kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ebm_prior.model.arguments import require_calibrated
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import JointEnergy
from ebm_prior.model.scores import Batch, Form, Whole

LIKELIHOOD, ENERGY, CEILING = "log p(x|z)", "f", "f(ceiling)"
"""Names of terms: of the likelihood, the beginning of those of the energy, and of the nats that a ceiling takes."""


class ImageTerms:
    """The part of a prior that takes the log posterior of images apart."""

    backbone: Backbone
    energy: JointEnergy
    tau: float
    ceiling: float
    regime: Literal["calibrated", "refiner"]

    if TYPE_CHECKING:

        def scores(
            self,
            images: Tensor,
            forms: Iterable[Form],
            *,
            draws: int = 8,
            seed: int = 0,
            first: int = 0,
            chunk: int = 256,
            watch: Callable[[Batch, int], None] | None = None,
        ) -> dict[Form, Tensor]: ...

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
        return self.scores_and_terms(images, [], draws=draws, seed=seed, first=first, chunk=chunk)[1]

    def scores_and_terms(
        self,
        images: Tensor,
        forms: Iterable[Form],
        *,
        draws: int = 8,
        seed: int = 0,
        first: int = 0,
        chunk: int = 256,
    ) -> tuple[dict[Form, Tensor], dict[str, Tensor]]:
        """What `scores` and `terms` return for the same arguments, from the same passes through the network."""
        require_calibrated(self.regime, "the terms of a score")
        found: dict[int, list[Tensor]] = {}  # number of a chunk's first image -> the terms at each draw

        def read(batch: Batch, number: int) -> None:
            found.setdefault(batch.first, []).append(self._terms(batch.whole(number)))

        scored = self.scores(images, forms, draws=draws, seed=seed, first=first, chunk=chunk, watch=read)
        names = self._names()
        parts = [torch.stack(of_draws).mean(0) for of_draws in found.values()]
        columns = torch.cat(parts).unbind(1) if parts else [images.new_empty(0) for _ in names]
        return scored, dict(zip(names, columns, strict=True))

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
    def _terms(self, draw: Whole) -> Tensor:
        """The terms at one draw of the latents of a batch, (B, number of terms)."""
        posterior, trace, log_likelihood = draw
        summands = self.tau * self.energy.terms(self.energy.inputs(trace.z, trace.eps, trace.priors))
        columns = [log_likelihood[:, None], trace.log_prior, -posterior.log_q, summands]
        if self.ceiling < math.inf:
            columns.append((self.ceiling - summands.sum(1, keepdim=True)).clamp(max=0))
        return torch.cat(columns, dim=1)
