"""The evaluation (`ebm-prior eval`): is a prior closer to the data and to the posterior than the backbone's own?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.randomness import BLOCK, Purpose, derived_generator
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import ConfigurationError, DataError
from ebm_prior.evaluation.classifier import bundled_classifier, load_classifier
from ebm_prior.evaluation.fid import FidConfig
from ebm_prior.evaluation.gauge import GaugeConfig, GaugeResult, gauge_auc, networks
from ebm_prior.evaluation.metrics import (
    FeatureExtractor,
    FeatureStatistics,
    extract,
    frechet_distance,
    gap_closed,
    kernel_distance,
)
from ebm_prior.evaluation.paired import Paired, differences
from ebm_prior.evaluation.pixels import descriptors, spectrum_distance
from ebm_prior.evaluation.pixels import statistics as pixel_statistics
from ebm_prior.interfaces import SILENT, Images, Progress
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig, JointEnergy, values
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.samples import Samples, refusals
from ebm_prior.settings import require, require_kinds, require_positive, require_seed, setting
from ebm_prior.storage.records import FIT_RECORD, keeps_to
from ebm_prior.training.objectives import Gain, gain


@dataclass(frozen=True)
class EvalConfig:
    """Settings of an evaluation. Distances depend on N: compare them at equal N only."""

    samples: int = setting(10_000, "Number of held-out images (at most all) and of draws from each prior")
    chunk: int = setting(128, "Samples computed at a time, rounded to blocks of 64; no result depends on it")
    gauge: GaugeConfig = field(default_factory=GaugeConfig)
    fid: FidConfig = field(default_factory=FidConfig)
    auc: bool = setting(True, "Train classifiers of posterior against prior latents, and report their AUC per group")
    seed: int = setting(0, "Seed of all random numbers")

    def __post_init__(self) -> None:
        require_kinds(self)
        require(self, "samples", self.samples >= 2, "must be 2 or more")
        require_positive(self, "chunk")
        require_seed(self)


INSTEAD = (
    "--classifier FILE with one trained on such images (ebm-prior classifier makes it from labelled images), "
    "--features MODULE:FUNCTION with features of your own, or --fid for Inception's"
)


class Seen(NamedTuple):
    """The measurements of n images: pixel descriptors (n, K), and features (n, D) if there is an extractor."""

    pixels: Tensor
    features: Tensor | None

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """Parts one after another."""
        features = [part.features for part in parts if part.features is not None]
        return cls(torch.cat([part.pixels for part in parts]), torch.cat(features) if features else None)

    @property
    def rows(self) -> Tensor:
        """The features, of an evaluation that has them."""
        if self.features is None:
            raise ConfigurationError(f"no features were measured: pass {INSTEAD}")
        return self.features

    @property
    def statistics(self) -> FeatureStatistics:
        """The statistics of the features."""
        return FeatureStatistics.of(self.rows)


class Reference:
    """The parts of an evaluation that are the same for all priors of a backbone and are computed once.

    They are the pixel statistics, and the features if there is an extractor, of held-out images, of their
    reconstructions and of the backbone's samples. The `processes` share drawing, decoding and the parts of the AUC; the
    first one computes distances.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        extractor: FeatureExtractor | None,
        config: EvalConfig,
        *,
        training_images: Images | None = None,
        processes: Processes = ALONE,
        progress: Progress = SILENT,
    ) -> None:
        self.processes, self.progress = processes, progress
        self.backbone, self.extractor, self.config = backbone, extractor, config
        self.data = images.name
        self.n = min(config.samples, len(images))
        self._check()
        self.real, self.reconstructed, self.posterior, self.errors = self._reconstruct(images, stream=0)
        # The floor of FDrec is its value for reconstructions of other images. Without other images it is taken to be 0,
        # which flatters no prior. At a smaller N the floor would be biased upwards, and so would the gap closed.
        self.floor = 0.0
        if extractor is not None and training_images is not None and len(training_images) >= self.n:
            other = self._reconstruct(training_images, stream=1)[1]
            self.floor = processes.of_first(lambda: frechet_distance(other.statistics, self.reconstructed.statistics))
        untrained = EBMPrior(backbone, JointEnergy(backbone.groups, EnergyConfig()))
        self.backbone_latents, self.drawn = self.sampled(untrained, ANCESTRAL)[:2]

    @cached_property
    def real_statistics(self) -> FeatureStatistics:
        """The statistics of the features of the held-out images."""
        return self.real.statistics

    @cached_property
    def auc_before(self) -> GaugeResult:
        """The AUC with which a fresh classifier tells posterior latents from draws of the backbone's prior."""
        return self.auc(self.backbone_latents)

    def auc(self, latents: list[Tensor]) -> GaugeResult:
        """The AUC with which a fresh classifier tells posterior latents from the given ones, overall and per group."""
        device = next(self.backbone.parameters()).device
        told: dict[str, Any] = {"device": device, "progress": self.progress, "processes": self.processes}
        return gauge_auc(self.posterior, latents, self.backbone.groups, config=self.config.gauge, **told)

    def sampled(self, prior: EBMPrior, sampler: SamplerConfig) -> tuple[list[Tensor], Seen, dict[str, float]]:
        """Latents of n draws and what is seen of them (distances compare at equal N), and the sampler's diagnostics."""
        config = self.config

        def see(part: Samples) -> tuple[list[Tensor], Seen, Tensor]:
            found = [z.cpu() for z in part.z], self._seen(part.images), torch.stack(part[3:]).cpu()
            self.progress.advance(self.processes.count)  # the others are about as far
            return found

        parts = prior.map_chunks(
            see, self.n, seed=config.seed, sampler=sampler, chunk=config.chunk, processes=self.processes
        )
        latents, seen, info = zip(*parts, strict=True)
        columns = torch.cat(info, dim=1)
        acceptance, norm, ess = columns[:3].mean(1).tolist()
        z = [torch.cat(group) for group in zip(*latents, strict=True)]
        told = {"acceptance": acceptance, "norm": norm, "resampling_ess_fraction": ess}
        return z, Seen.joined(seen), told | refusals(columns[1], columns[3], sampler.norm_limit)

    def _check(self) -> None:
        """Raise DataError before the work for too few images, or a network of features that does not take them."""
        least = self.config.gauge.least
        if self.config.auc and self.n < least:
            raise DataError(
                f"the AUC needs at least {least} held-out images, found {self.n} of {self.data}: evaluate on more "
                "(--samples), or without it (--no-auc)"
            )
        if self.extractor is None:
            return
        try:
            like = next(self.backbone.parameters())
            extract(self.extractor, torch.zeros(1, *self.backbone.image_shape, device=like.device, dtype=like.dtype))
        except DataError as error:
            raise DataError(
                f"{self.extractor.distance_name} cannot be measured on the backbone's images: {error}. Pass {INSTEAD}"
            ) from error

    @torch.no_grad()
    def _reconstruct(self, images: Images, *, stream: int) -> tuple[Seen, Seen, list[Tensor], Tensor]:
        """What is seen of up to n images and of their decoded posterior draws, the draws, and (n,) squared errors.

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

        def see(chunk: list[tuple[int, Tensor]]) -> tuple[Seen, Seen, list[Tensor], Tensor]:
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
            real, decoded = torch.cat(batches), self.backbone.likelihood(posterior.features).mean
            errors = (real - decoded).double().square().flatten(1).mean(1).cpu()
            self.progress.advance(self.processes.count)  # the others are about as far
            return self._seen(real), self._seen(decoded), [z.cpu() for z in posterior.z], errors

        chunks = [blocks[first : first + size] for first in range(0, len(blocks), size)]
        real, decoded, latents, errors = zip(*self.processes.map(see, chunks), strict=True)
        z = [torch.cat(group) for group in zip(*latents, strict=True)]
        return Seen.joined(real), Seen.joined(decoded), z, torch.cat(errors)

    def _seen(self, images: Tensor) -> Seen:
        """Descriptors of pixels of a chunk of images, and features if there is an extractor."""
        features = None if self.extractor is None else extract(self.extractor, images)
        return Seen(descriptors(images), features)


def evaluate(prior: EBMPrior, reference: Reference, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Distances, gap closed, held-out gain and AUC of a prior. Plain numbers, ready for JSON; see `measure`."""
    return measure(prior, reference, progress=progress)[0]


def measure(prior: EBMPrior, reference: Reference, *, progress: Progress = SILENT) -> tuple[dict[str, Any], Paired]:
    """Distances, gap closed, held-out gain and AUC of a prior as plain numbers, and what other priors are compared by.

    fd_*: Fréchet distance to held-out images; fdrec_*: to their decoded posterior samples; kid_*: kernel distance to
    held-out images. gap_closed*: share of the distance between backbone prior and reconstructions that is closed. They
    are left out where there is no extractor of features; statistics of pixels, gain and AUC need none. Where a
    calibrated prior has a refiner, the samples are the refiner's, and gain and f are the calibrated prior's.
    """
    config = reference.config
    progress.stage("sampling the prior")
    sampling = prior.sampling
    latents, drawn, info = reference.sampled(sampling, sampling.sampler)
    progress.stage("distances")
    result: dict[str, Any] = {
        "data": reference.data,
        "samples": reference.n,
        "held_out_images": reference.n,
        "seed": config.seed,
        "sampled_by": sampling.regime,
        "sampler": asdict(sampling.sampler),
        **reference.processes.of_first(lambda: _distances(reference, drawn) | _pixels(reference, drawn)),
        **info,
    }
    device = next(prior.energy.parameters()).device
    f_q, f_p, f_drawn = (values(prior.f, z, device) for z in (reference.posterior, reference.backbone_latents, latents))
    normalised = (prior.record.get("stages") or prior.record.get("groups")) and keeps_to(FIT_RECORD, prior.record)
    if normalised:
        # The fit has set log Z to 0. Here it cannot be estimated: draws of p_β alone do not reach that far.
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
    return result, Paired(f_q, None if normalised else f_p, drawn.features)


def _distances(reference: Reference, drawn: Seen) -> dict[str, Any]:
    """Distances between features, of samples `drawn` from a prior among others; nothing without an extractor."""
    if reference.extractor is None:
        return {}
    sets = {"backbone": reference.drawn, "prior": drawn, "reconstruction": reference.reconstructed}
    real, seed = reference.real_statistics, reference.config.seed
    statistics = {name: each.statistics for name, each in sets.items()}
    fd = {name: frechet_distance(each, real) for name, each in statistics.items()}
    kid = {name: kernel_distance(each.rows, reference.real.rows, seed=seed) for name, each in sets.items()}
    fdrec = {name: frechet_distance(each, statistics["reconstruction"]) for name, each in statistics.items()}
    fdrec["reconstruction"] = reference.floor
    return {
        "extractor": reference.extractor.distance_name,
        "statistics": real.digest,
        **{f"fd_{name}": value for name, value in fd.items()},
        "gap_closed": gap_closed(fd["backbone"], fd["prior"], fd["reconstruction"]),
        **{f"fdrec_{name}": value for name, value in fdrec.items()},
        "gap_closed_rec": gap_closed(fdrec["backbone"], fdrec["prior"], fdrec["reconstruction"]),
        **{f"kid_{name}": value for name, value in kid.items()},
    }


def _pixels(reference: Reference, drawn: Seen) -> dict[str, float]:
    """Statistics of pixels per set of images, how far their spectra are from the data's, and the reconstruction error.

    The error is the root of the mean squared difference of a pixel in [0, 1].
    """
    sets = {
        "data": reference.real,
        "backbone": reference.drawn,
        "prior": drawn,
        "reconstruction": reference.reconstructed,
    }
    found = {name: pixel_statistics(each.pixels) for name, each in sets.items()}
    return {
        "reconstruction_error": float(reference.errors.mean().sqrt()),
        **{f"pixel_mean_{name}": each.mean for name, each in found.items()},
        **{f"pixel_std_{name}": each.std for name, each in found.items()},
        **{
            f"spectrum_{name}": spectrum_distance(each, found["data"]) for name, each in found.items() if name != "data"
        },
    }


def feature_classifier(images: ImageSource, path: Path | None, device: torch.device) -> FeatureExtractor:
    """The classifier that gives the features of FD: from the file `path`, else the bundled one for such `images`."""
    return (load_classifier(path) if path else bundled_classifier(images.shape, images.name)).to(device)


def evaluate_all(
    priors: Sequence[EBMPrior],
    names: Sequence[str],
    test: ImageSource,
    train: ImageSource,
    extractor: FeatureExtractor | None,
    config: EvalConfig,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Evaluate priors of one backbone against the same reference; one result per prior, in order.

    Each but the first is also compared with the first: "paired" holds differences with 95 % intervals.

    names: of the priors, for the results.  train: images for the floor of FDrec, unless they are the `test` images.
    extractor: None leaves out what needs features.  progress: gets `parts` in all.
    """
    progress.stage("held-out images and backbone samples")
    shown = test.fingerprint()
    same = train.fingerprint() == shown  # a source without splits: its own images are no floor
    other = None if same else train
    reference = Reference(
        priors[0].backbone, test, extractor, config, training_images=other, processes=processes, progress=progress
    )
    results, compared = list[dict[str, Any]](), list[Paired]()
    for name, prior in zip(names, priors, strict=True):
        found, paired = measure(prior, reference, progress=progress)
        compared.append(paired)
        results.append({"prior": name, "held_out": not _trained_on(prior, test.name, shown), **found})
        if len(compared) > 1:
            results[-1]["paired"] = {"with": names[0], **differences(paired, compared[0], reference.real.features)}
    return results


def parts(priors: int, groups: int, images: int, config: EvalConfig) -> int:
    """Number of parts into which `evaluate_all` cuts its work, for its progress: at most, of `images` at most."""
    n = min(config.samples, images)
    passes = -(-n // max(BLOCK, config.chunk // BLOCK * BLOCK))
    gauged = priors + networks(groups, config.gauge) * (1 + priors) if config.auc else 0
    return 1 + passes * (3 + priors) + 2 * priors + gauged


def _trained_on(prior: EBMPrior, name: str, images: str) -> bool:
    """Whether a prior says that it was trained on the images with this fingerprint, or failing that with this name."""
    known = prior.record.get("data")
    if not isinstance(known, Mapping):  # a library user may record anything
        return False
    return bool(known["fingerprint"] == images if "fingerprint" in known else known.get("name") == name)
