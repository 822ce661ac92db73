"""Which number of steps, and which role of a prior, draws the samples that are nearest to held-out images?

The distance is FDrec, the Fréchet distance to reconstructions, which are what a perfect prior would draw. It is taken
on the features of a bundled classifier, whatever the images: these are resized, and become grey unless they have three
channels. Simpler gauges do not see what is wrong: by means of areas, or by random features, the stages of the bundled
NVAE for CIFAR-10 close the whole gap, by a classifier a quarter of it.
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
from ebm_prior.evaluation.classifier import FeatureClassifier, bundled_classifier
from ebm_prior.evaluation.metrics import FeatureStatistics, extract, frechet_distance
from ebm_prior.interfaces import SILENT, Images, Progress
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import MOST_STEPS, SamplerConfig
from ebm_prior.training.fit_config import FitConfig, refining
from ebm_prior.training.latents import split

DRAWS = 256  # held-out images, and draws of each prior or sampler; a gauge needs two
COLOUR, GREY = (3, 32, 32), (1, 28, 28)  # shapes of the images that the bundled classifiers know


@dataclass(frozen=True)
class HeldOutGauge:
    """The features of reconstructions of `images` held-out images, and the seed of the draws to compare with them."""

    classifier: FeatureClassifier
    reference: FeatureStatistics
    images: int
    seed: int

    @classmethod
    @torch.no_grad()
    def of(cls, backbone: Backbone, images: Images, config: FitConfig) -> HeldOutGauge | None:
        """The gauge on up to `DRAWS` images that a fit with this configuration holds out; None for fewer than two."""
        like, parts = next(backbone.parameters()), []
        classifier = bundled_classifier(COLOUR if backbone.image_shape[0] == COLOUR[0] else GREY)
        held_out = split(backbone, images, config)[1][:DRAWS]
        if len(held_out) < 2:
            return None
        for number, indices in enumerate(torch.split(held_out, BLOCK)):
            generator = derived_generator(config.seed, Purpose.SAMPLER_IMAGES, number, device=like.device)
            x = backbone.observe(images.batch(indices).to(like.device, like.dtype), generator=generator)
            reconstructed = backbone.likelihood(backbone.infer(x, generator=generator).features).mean
            parts.append(features_of(reconstructed, classifier))
        return cls(classifier, FeatureStatistics.of(torch.cat(parts)), len(held_out), config.seed)

    def distance(self, prior: EBMPrior, sampler: SamplerConfig | None = None, processes: Processes = ALONE) -> float:
        """The Fréchet distance from as many draws of the prior by this sampler. Raises DivergenceError."""
        drawn = prior.map_chunks(
            lambda part: features_of(part.images, self.classifier),
            self.images,
            seed=derived_seed(self.seed, Purpose.SAMPLER_DRAWS),
            sampler=sampler,
            processes=processes,
        )
        return processes.of_first(lambda: frechet_distance(FeatureStatistics.of(torch.cat(drawn)), self.reference))


def features_of(images: Tensor, classifier: FeatureClassifier) -> Tensor:
    """Features (B, D) of images (B, C, H, W) in [0, 1] of any size, on the CPU in the classifier's precision."""
    x = images.detach().to("cpu", torch.float32)
    if len(x[0]) != classifier.shape[0]:
        x = x.mean(1, keepdim=True)
    if x.shape[2:] != classifier.shape[1:]:
        x = F.interpolate(x, list(classifier.shape[1:]), mode="bilinear", antialias=True)
    return extract(classifier, x)


def with_steps(
    prior: EBMPrior,
    images: Images,
    config: FitConfig,
    processes: Processes = ALONE,
    progress: Progress = SILENT,
) -> EBMPrior:
    """A fitted prior with the number of steps whose samples are nearest to held-out images, if `config` has it chosen.

    The candidates are the recorded number, its half and its double; their distances are recorded. One whose chains
    diverge is left out. The prior is changed in place.
    """
    chosen = config.choose_steps and config.sampler.steps is None
    gauge = HeldOutGauge.of(prior.backbone, images, config) if chosen else None
    if gauge is None:
        return prior
    recorded, found = prior.sampler.steps, dict[int, float]()
    candidates = [steps for steps in (recorded // 2, recorded, 2 * recorded) if 0 < steps <= MOST_STEPS]
    progress.begin("number of steps", len(candidates))
    for steps in candidates:
        with contextlib.suppress(DivergenceError):
            found[steps] = gauge.distance(prior, replace(prior.sampler, steps=steps), processes)
        progress.advance(1)
    if found:
        prior.sampler = replace(prior.sampler, steps=min(found, key=lambda steps: found[steps]))
    tried = [{"steps": steps, "distance": distance} for steps, distance in found.items()]
    prior.record["steps"] = {"images": gauge.images, "tried": tried}
    return prior


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
    gauge, found = HeldOutGauge.of(prior.backbone, images, config), dict[str, float]()
    if gauge is None:
        progress.remark("the prior has no refiner: a single held-out image cannot tell whose samples are nearer")
        return
    progress.remark(f"now a refiner, for nearer samples: {second.iterations:,} iterations (--refine 0: no refiner)")
    try:
        refiner = train(second)
        progress.begin("which role draws the samples", 2)
        for role in (prior, refiner):
            found[role.regime] = gauge.distance(role, processes=processes)
            progress.advance(1)
    except DivergenceError as error:
        progress.remark(f"the prior has no refiner: {error}")
        return
    prior.record["roles"] = {"images": gauge.images, **found}
    if found["refiner"] < found["calibrated"]:
        prior.refiner = refiner
