"""Which samples are nearest to the data? Choices on held-out images that need no classifier and no other f.

The draws of a prior are compared with reconstructions of held-out images, which a perfect prior would match. Both are
decoded, because nats in latent space say little about pictures, and reduced to means of at most `SIDE` × `SIDE` areas.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.randomness import BLOCK, Purpose, derived_generator, derived_seed
from ebm_prior.errors import DivergenceError
from ebm_prior.interfaces import SILENT, Images, Progress
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import MOST_STEPS, SamplerConfig
from ebm_prior.training.fit_config import FitConfig, refining
from ebm_prior.training.latents import split

DRAWS = 256  # held-out images, and draws of each prior or sampler
SIDE = 8
LENGTHS = 3  # candidates for the number of steps: those of the training, twice and four times as many


@dataclass(frozen=True)
class HeldOutViews:
    """Views of reconstructions of held-out images, (n, D) float64, and the seed of the draws to compare them with."""

    views: Tensor
    seed: int

    @classmethod
    @torch.no_grad()
    def of(cls, backbone: Backbone, images: Images, config: FitConfig) -> HeldOutViews:
        """The views of up to `DRAWS` images that a fit with this configuration holds out."""
        like, parts = next(backbone.parameters()), []
        for number, indices in enumerate(torch.split(split(backbone, images, config)[1][:DRAWS], BLOCK)):
            generator = derived_generator(config.seed, Purpose.SAMPLER_IMAGES, number, device=like.device)
            x = backbone.observe(images.batch(indices).to(like.device, like.dtype), generator=generator)
            parts.append(viewed(backbone.likelihood(backbone.infer(x, generator=generator).features).mean))
        return cls(torch.cat(parts), config.seed)

    def distance(self, prior: EBMPrior, sampler: SamplerConfig | None = None, processes: Processes = ALONE) -> float:
        """The `energy_distance` between these views and those of as many draws of the prior by this sampler."""
        seed = derived_seed(self.seed, Purpose.SAMPLER_DRAWS)
        drawn = prior.map_chunks(
            lambda part: viewed(part.images), len(self.views), seed=seed, sampler=sampler, processes=processes
        )
        return energy_distance(self.views, torch.cat(drawn))


def choose_steps(
    prior: EBMPrior, held_out: HeldOutViews, processes: Processes = ALONE, progress: Progress = SILENT
) -> None:
    """Give a refiner the number of steps whose samples are nearest to held-out images, and record all distances.

    The candidates are the recorded number, its half and its double. One whose chains diverge is left out.
    """
    recorded, found = prior.sampler.steps, dict[int, float]()
    for steps in (recorded // 2, recorded, 2 * recorded):
        if 0 < steps <= MOST_STEPS:
            with contextlib.suppress(DivergenceError):
                found[steps] = held_out.distance(prior, replace(prior.sampler, steps=steps), processes)
        progress.advance(1)
    if found:
        prior.sampler = replace(prior.sampler, steps=min(found, key=lambda steps: found[steps]))
    tried = [{"steps": steps, "distance": distance} for steps, distance in found.items()]
    prior.record["steps"] = {"images": len(held_out.views), "tried": tried}


def add_refiner(
    prior: EBMPrior,
    images: Images,
    config: FitConfig,
    train: Callable[[FitConfig], EBMPrior],
    processes: Processes = ALONE,
    progress: Progress = SILENT,
) -> None:
    """Fit the refiner that follows a calibrated prior, if one does, and let it draw the samples if they are nearer.

    config: the settings of the prior's fit.  train: fits a refiner with the settings that it is given.  The distances
    of both roles to held-out images are recorded. A refiner that diverges is left out, with a remark.
    """
    second = refining(config, prior.record)
    if second is None:
        return
    progress.remark(f"now a refiner, for nearer samples: {second.iterations:,} iterations (--refine 0: no refiner)")
    try:
        refiner = train(second)
        held_out, found = HeldOutViews.of(prior.backbone, images, config), dict[str, float]()
        progress.begin("which role draws the samples", 2)
        for role in (prior, refiner):
            found[role.regime] = held_out.distance(role, processes=processes)
            progress.advance(1)
    except DivergenceError as error:
        progress.remark(f"the prior has no refiner: {error}")
        return
    prior.record["roles"] = {"images": len(held_out.views), **found}
    if found["refiner"] < found["calibrated"]:
        prior.refiner = refiner


def energy_distance(a: Tensor, b: Tensor) -> float:
    """The energy distance 2 E|a − b| − E|a − a′| − E|b − b′| of two samples (n, D), (m, D), without bias.

    It is 0 for equal distributions and positive for others; the estimate may be slightly negative (Székely & Rizzo
    2013).
    """
    within = (torch.cdist(x, x).sum() / (len(x) * max(1, len(x) - 1)) for x in (a, b))
    return float(2 * torch.cdist(a, b).mean() - sum(within))


def viewed(images: Tensor) -> Tensor:
    """Images (B, C, H, W) as means of areas, (B, D) float64 on the CPU."""
    sides = min(SIDE, images.shape[2]), min(SIDE, images.shape[3])
    return F.adaptive_avg_pool2d(images.detach().to("cpu", torch.float64), sides).flatten(1)
