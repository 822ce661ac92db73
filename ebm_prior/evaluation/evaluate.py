"""The evaluation (`ebm-prior eval`): is a prior closer to the data and to the posterior than the backbone's own?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.randomness import BLOCK, Purpose, derived_generator
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import ConfigurationError, DataError
from ebm_prior.evaluation.classifier import bundled_classifier, load_classifier
from ebm_prior.evaluation.fid import FidConfig
from ebm_prior.evaluation.gauge import GaugeConfig, GaugeResult, gauge_auc
from ebm_prior.evaluation.metrics import (
    FeatureExtractor,
    FeatureStatistics,
    extract,
    frechet_distance,
    gap_closed,
    kernel_distance,
)
from ebm_prior.interfaces import SILENT, Images, Progress
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig, JointEnergy, values
from ebm_prior.model.prior import ANCESTRAL, EBMPrior, Samples
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.settings import require_kinds, require_seed, setting
from ebm_prior.training.objectives import Gain, gain


@dataclass(frozen=True)
class EvalConfig:
    """Settings of an evaluation. Distances depend on N: compare them at equal N only."""

    samples: int = setting(10_000, "held-out images (at most all), and draws of each prior")
    chunk: int = setting(128, "samples at a time, rounded to blocks of 64; changes no result")
    gauge: GaugeConfig = field(default_factory=GaugeConfig)
    fid: FidConfig = field(default_factory=FidConfig)
    auc: bool = setting(True, "train fresh classifiers on posterior vs prior latents")
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self) -> None:
        require_kinds(self)
        if self.samples < 2 or self.chunk < 1:
            raise ConfigurationError(f"expected samples >= 2 and chunk >= 1, found {self.samples}, {self.chunk}")
        require_seed(self)


class Reference:
    """The parts of an evaluation that are the same for all priors of a backbone, made once.

    These are features of held-out images, of their reconstructions and of the backbone's samples. `processes` share
    the drawing and decoding; each measures for itself.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        extractor: FeatureExtractor,
        config: EvalConfig,
        *,
        training_images: Images | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.backbone, self.extractor, self.config = backbone, extractor, config
        self.data = images.name
        self.n = min(config.samples, len(images))
        self._check()
        real, self.posterior, reconstructed = self._reconstruct(images, stream=0)
        self.real, self.reconstructed = FeatureStatistics.of(real), FeatureStatistics.of(reconstructed)
        self.real_features, self.reconstructed_features = real, reconstructed
        # The floor of FDrec: reconstructions of other images. Without any, it is taken to be 0, which flatters nobody.
        # At a smaller N it would be biased upwards, and the gap closed with it.
        self.floor = 0.0
        if training_images is not None and len(training_images) >= self.n:
            other = self._reconstruct(training_images, stream=1)[2]
            self.floor = frechet_distance(FeatureStatistics.of(other), self.reconstructed)
        untrained = EBMPrior(backbone, JointEnergy(backbone.groups, EnergyConfig()))
        self.backbone_latents, self.backbone_features = self.sampled(untrained, ANCESTRAL)[:2]

    @cached_property
    def auc_before(self) -> GaugeResult:
        """The AUC with which a fresh classifier tells posterior latents from draws of the backbone's prior."""
        return self.auc(self.backbone_latents)

    def auc(self, latents: list[Tensor]) -> GaugeResult:
        """The AUC with which a fresh classifier tells posterior latents from the given ones, overall and per group."""
        device = next(self.backbone.parameters()).device
        return gauge_auc(self.posterior, latents, self.backbone.groups, config=self.config.gauge, device=device)

    def sampled(self, prior: EBMPrior, sampler: SamplerConfig) -> tuple[list[Tensor], Tensor, dict[str, float]]:
        """Latents and features of n draws (distances compare at equal N), and the sampler's mean diagnostics."""
        config = self.config

        def see(part: Samples) -> tuple[list[Tensor], Tensor, Tensor]:
            return [z.cpu() for z in part.z], extract(self.extractor, part.images), torch.stack(part[3:]).cpu()

        parts = prior.map_chunks(
            see, self.n, seed=config.seed, sampler=sampler, chunk=config.chunk, processes=self.processes
        )
        latents, features, info = zip(*parts, strict=True)
        acceptance, norm, ess = torch.cat(info, dim=1).mean(1).tolist()
        z = [torch.cat(group) for group in zip(*latents, strict=True)]
        return z, torch.cat(features), {"acceptance": acceptance, "norm": norm, "resampling_ess_fraction": ess}

    def _check(self) -> None:
        """Raise DataError before the work for too few images, or a network of features that does not take them."""
        least = self.config.gauge.least
        if self.config.auc and self.n < least:
            raise DataError(
                f"the AUC needs at least {least} held-out images, found {self.n} of {self.data}: evaluate on more "
                "(--samples), or without it (--no-auc)"
            )
        try:
            like = next(self.backbone.parameters())
            extract(self.extractor, torch.zeros(1, *self.backbone.image_shape, device=like.device, dtype=like.dtype))
        except DataError as error:
            raise DataError(
                f"{self.extractor.distance_name} cannot be measured on the backbone's images: {error}. Pass "
                "--classifier with one trained on such images (ebm-prior classifier makes it), or --fid"
            ) from error

    @torch.no_grad()
    def _reconstruct(self, images: Images, *, stream: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Features of up to n images, one posterior draw each, and features of the decoded draws.

        Randomness is drawn in blocks, as that of samples is: no result depends on the size of a chunk.
        """
        like = next(self.backbone.parameters())
        chosen = torch.arange(len(images))
        if len(images) > self.n:
            chosen = torch.randperm(
                len(images), generator=derived_generator(self.config.seed, Purpose.EVALUATION_CHOICE, stream)
            )[: self.n]
        blocks = list(enumerate(torch.split(chosen, BLOCK)))
        size = max(1, self.config.chunk // BLOCK)

        def seen(chunk: list[tuple[int, Tensor]]) -> tuple[Tensor, list[Tensor], Tensor]:
            batches, observed, noise = [], [], []
            for number, indices in chunk:
                generator = derived_generator(
                    self.config.seed, Purpose.EVALUATION_POSTERIOR, stream, number, device=like.device
                )
                batches.append(images.batch(indices).to(like.device, like.dtype))
                observed.append(self.backbone.observe(batches[-1], generator=generator))
                noise.append(self.backbone.standard_normal(len(indices), generator=generator))
            joined = [torch.cat(group) for group in zip(*noise, strict=True)]
            posterior = self.backbone.infer(torch.cat(observed), noise=joined)
            real = extract(self.extractor, torch.cat(batches))
            decoded = extract(self.extractor, self.backbone.likelihood(posterior.features).mean)
            return real, [z.cpu() for z in posterior.z], decoded

        chunks = [blocks[first : first + size] for first in range(0, len(blocks), size)]
        real, latents, decoded = zip(*self.processes.map(seen, chunks), strict=True)
        return torch.cat(real), [torch.cat(group) for group in zip(*latents, strict=True)], torch.cat(decoded)


def evaluate(prior: EBMPrior, reference: Reference, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Distances, gap closed, held-out gain and AUC of a prior. Plain numbers, ready for JSON.

    fd_*: Fréchet distance to held-out images; fdrec_*: to decoded posterior samples of these; kid_*: kernel distance to
    held-out images. gap_closed*: share of the distance between backbone prior and reconstructions that is closed.
    """
    config = reference.config
    progress.stage("sampling the prior")
    latents, features, info = reference.sampled(prior, prior.sampler)
    progress.stage("distances")
    rows = {
        "backbone": reference.backbone_features,
        "prior": features,
        "reconstruction": reference.reconstructed_features,
    }
    statistics = {name: FeatureStatistics.of(row) for name, row in rows.items()}
    fd = {name: frechet_distance(s, reference.real) for name, s in statistics.items()}
    kid = {name: kernel_distance(row, reference.real_features, seed=config.seed) for name, row in rows.items()}
    fdrec = {name: frechet_distance(s, reference.reconstructed) for name, s in statistics.items()}
    fdrec["reconstruction"] = reference.floor
    result: dict[str, Any] = {
        "data": reference.data,
        "samples": reference.n,
        "held_out_images": reference.n,
        "extractor": reference.extractor.distance_name,
        "statistics": reference.real.digest,
        "seed": config.seed,
        "sampler": asdict(prior.sampler),
        **{f"fd_{name}": value for name, value in fd.items()},
        "gap_closed": gap_closed(fd["backbone"], fd["prior"], fd["reconstruction"]),
        **{f"fdrec_{name}": value for name, value in fdrec.items()},
        "gap_closed_rec": gap_closed(fdrec["backbone"], fdrec["prior"], fdrec["reconstruction"]),
        **{f"kid_{name}": value for name, value in kid.items()},
        **info,
    }
    device = next(prior.energy.parameters()).device
    f_q, f_p, f_drawn = (values(prior.f, z, device) for z in (reference.posterior, reference.backbone_latents, latents))
    if prior.record.get("stages"):
        # The fit of stages has set log Z to 0. Here it cannot be estimated: draws of p_β alone do not reach that far.
        held_out = Gain(float(f_q.mean()), prior.record["held_out"]["tempered"]["ess_fraction"], 1.0)
    else:
        held_out = gain(f_q, f_p)
    result |= {"gain_nats": held_out.nats, "ess_fraction": held_out.ess_fraction, "tau": prior.tau}
    result |= {"f_posterior": float(f_q.mean()), "f_backbone": float(f_p.mean()), "f_prior": float(f_drawn.mean())}
    if config.auc:
        progress.stage("AUC of posterior against prior latents")
        before, after = reference.auc_before, reference.auc(latents)
        result |= {
            "auc_before": before.overall,
            "auc_after": after.overall,
            "auc_before_per_group": before.per_group,
            "auc_after_per_group": after.per_group,
            "auc_budget": after.budget,
        }
    return result


def feature_classifier(images: ImageSource, path: Path | None, device: torch.device) -> FeatureExtractor:
    """The classifier on whose features FD is measured: from the file `path`, else the bundled one for such `images`."""
    return (load_classifier(path) if path else bundled_classifier(images.shape, images.name)).to(device)


def evaluate_all(
    priors: Sequence[EBMPrior],
    names: Sequence[str],
    test: ImageSource,
    train: ImageSource,
    extractor: FeatureExtractor,
    config: EvalConfig,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Evaluate priors of one backbone against the same reference; one result per prior, in order.

    names: of the priors, for the results.  train: images for the floor of FDrec, unless they are the `test` images.
    """
    progress.stage("held-out images and backbone samples")
    shown = test.fingerprint()
    same = train.fingerprint() == shown  # a source without splits: its own images are no floor
    other = None if same else train
    reference = Reference(priors[0].backbone, test, extractor, config, training_images=other, processes=processes)
    return [
        {
            "prior": name,
            "held_out": not _trained_on(prior, test.name, shown),
            **evaluate(prior, reference, progress=progress),
        }
        for name, prior in zip(names, priors, strict=True)
    ]


def _trained_on(prior: EBMPrior, name: str, images: str) -> bool:
    """Whether a prior says that it was trained on the images with this fingerprint, or failing that with this name."""
    known = prior.record.get("data") or {}
    return bool(known["fingerprint"] == images if "fingerprint" in known else known.get("name") == name)
