"""FID, KID and the Inception Score as they are published: 50,000 samples against the statistics of all training images.

They depend on the weights, the preprocessing (clean-fid's modes), both numbers of images and the split. So every figure
is reported together with these, and beside that of the backbone's own prior. With other than the official weights the
same figures have other names (`Inception.distance_name`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.randomness import Purpose, derived_generator
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import CheckpointError, few, shown
from ebm_prior.evaluation.inception import Inception
from ebm_prior.evaluation.metrics import FeatureStatistics, extract, frechet_distance, inception_score, kernel_distance
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.model.samples import Samples
from ebm_prior.plain import parse_json
from ebm_prior.settings import require, require_kinds, setting
from ebm_prior.storage.atomic import remove_leftovers, user_cache, write_atomically
from ebm_prior.storage.records import fields, whole

SPLITS = 10  # of the Inception Score
KERNEL_ROWS = 10_000  # largest number of images with features kept for KID, which uses subsets of 1,000
FORMAT = 1
_ARRAYS = ("mean", "covariance", "features")
_PROVENANCE = fields({"images": whole(2)})


@dataclass(frozen=True)
class FidConfig:
    """Numbers of samples, and the images to compare with.

    Published figures compare 50,000 samples (CelebA-HQ-256: 30,000) with all images of the training split.
    """

    samples: int = setting(50_000, "Draws of each prior from which FID, KID and Inception Score are computed")
    split: Literal["train", "test"] = setting(
        "train", "Split of the data set that FID and KID compare with; all of its images are used"
    )

    def __post_init__(self) -> None:
        require_kinds(self)
        least = f"must be at least {2 * SPLITS} (the Inception Score splits them in {SPLITS})"
        require(self, "samples", self.samples >= 2 * SPLITS, least)


class ReferenceStatistics(NamedTuple):
    """The statistics of a set of images: the moments of its features, and a part of the features for KID."""

    moments: FeatureStatistics
    features: Tensor  # (min(N, KERNEL_ROWS), D), float32: a random part of all features
    provenance: dict[str, Any]
    path: Path


def reference_statistics(
    images: ImageSource,
    split: str,
    network: Inception,
    *,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> ReferenceStatistics:
    """Statistics of all `images`: from the cache, else computed and kept there, as .npz with their provenance.

    `cache_dir`: by default `statistics` in ebm-prior's cache directory. progress: advances by the images. The file
    is found by the content of the images and the weights, so neither a renamed data set nor other weights are taken for
    it. Raises CheckpointError for a damaged file, OutputError where none can be written.
    """
    provenance = {
        "format": FORMAT,
        "data": images.name,
        "split": split,
        "images": len(images),
        "images_sha256": images.fingerprint(),
        "mode": network.mode,
        "weights": network.weights,
        "weights_sha256": network.sha256,
    }
    name = f"{len(images)}-{network.mode}-{str(provenance['images_sha256'])[:16]}-{network.sha256[:16]}.npz"
    path = (cache_dir or user_cache() / "statistics") / name
    found = processes.of_first(lambda: _read(path, provenance) if path.is_file() else None)
    if found is not None:
        progress.advance(len(images))
        return found

    def seen(rows: Tensor) -> Tensor:
        progress.advance(processes.count * len(rows))  # the others are about as far
        return extract(network, images.batch(rows))

    features = processes.gather(seen, torch.split(torch.arange(len(images)), 250))
    return processes.of_first(lambda: _written(torch.cat(features), path, provenance))


def _written(features: Tensor, path: Path, provenance: dict[str, Any]) -> ReferenceStatistics:
    """The statistics of features (N, D), which are written to the file `path`."""
    chosen = torch.randperm(len(features), generator=derived_generator(0, Purpose.KERNEL_ROWS))[:KERNEL_ROWS]
    moments = FeatureStatistics.of(features)
    buffer = BytesIO()
    arrays: dict[str, Any] = {
        "mean": moments.mean,
        "covariance": moments.covariance,
        "features": features[chosen].numpy(),
    }
    text = json.dumps(provenance, sort_keys=True)
    np.savez(buffer, **arrays, provenance=np.array(text), sha256=np.array(_digest(arrays, text)))
    remove_leftovers(path.parent, of=path.name)
    write_atomically(path, buffer.getvalue())
    return ReferenceStatistics(moments, features[chosen], provenance, path)


def _read(path: Path, provenance: dict[str, Any]) -> ReferenceStatistics:
    """The statistics in a file, whose images, mode and weights must be those of `provenance`; names may differ."""
    try:
        with np.load(path) as file:
            if strange := set(file.files) - {*_ARRAYS, "provenance", "sha256"}:  # the checksum's name can break, too
                raise ValueError(f"it holds {few(sorted(map(shown, strange)))}")
            text = str(file["provenance"])
            arrays = {name: file[name] for name in _ARRAYS}
            if "sha256" in file and str(file["sha256"]) != _digest(
                arrays, text
            ):  # older files have the zip's CRC alone
                raise ValueError("its content does not match its checksum")
            recorded = _PROVENANCE(parse_json(text), "its provenance")
        _require_statistics(**arrays)
        moments = FeatureStatistics(arrays["mean"], arrays["covariance"], recorded["images"])
        features = torch.from_numpy(arrays["features"])
    except Exception as error:  # an archive that is damaged, or none of ours, can raise nearly anything
        raise CheckpointError(f"{path} is damaged ({error}): delete it, and it will be computed again") from error
    compared = ("format", "images", "images_sha256", "mode", "weights_sha256")
    wrong = [key for key in compared if recorded.get(key) != provenance[key]]
    if wrong:
        what = few(f"{key} {provenance[key]!r}, found {shown(recorded.get(key))}" for key in wrong)
        raise CheckpointError(f"{path}: expected {what}: delete it, and it will be computed again")
    return ReferenceStatistics(moments, features, provenance, path)


def _require_statistics(mean: Any, covariance: Any, features: Any) -> None:
    """Moments (D,), (D, D) and rows (N, D) of floating-point numbers, all finite, or ValueError."""
    shapes, size = [each.shape for each in (mean, covariance, features)], mean.shape[-1:]
    if shapes[:2] != [size, size * 2] or len(shapes[2]) != 2 or shapes[2][1:] != size:
        raise ValueError(f"expected shapes (D,), (D, D) and (N, D), found {few(map(str, shapes))}")
    for name, each in (("mean", mean), ("covariance", covariance), ("features", features)):
        if each.dtype.kind != "f" or not np.isfinite(each).all():
            raise ValueError(f"expected finite numbers in {name}")


def _digest(arrays: Mapping[str, Any], provenance: str) -> str:
    """SHA-256 over arrays and provenance."""
    digest = hashlib.sha256(provenance.encode())
    for name, each in sorted(arrays.items()):
        digest.update(f"{name} {each.shape} {each.dtype} ".encode())
        digest.update(np.ascontiguousarray(each).tobytes())
    return digest.hexdigest()


def figures(features: Tensor, network: Inception, reference: ReferenceStatistics, seed: int) -> dict[str, float]:
    """Fréchet and kernel distance to the reference, and the Inception Score where the network has classes.

    features: (N, D), of samples.
    """
    found = {
        "fid": frechet_distance(FeatureStatistics.of(features), reference.moments),
        "kid": kernel_distance(features, reference.features, seed=seed),
    }
    logits = network.logits(features)
    if logits is not None:
        found["inception_score"], found["inception_score_sd"] = inception_score(logits, splits=SPLITS)
    return found


def published(
    priors: Sequence[EBMPrior],
    networks: Sequence[Inception],
    images: ImageSource,
    config: FidConfig,
    *,
    seed: int = 0,
    chunk: int = 512,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> list[list[dict[str, Any]]]:
    """One card per prior and network: its figures and the backbone's, with all that they depend on. Plain values.

    `priors`: of one backbone. Every sample is drawn once, by the prior's own sampler, and seen by all networks.
    `images`: those of `config.split`. progress: advances by the images, `amount` in all, of all `processes`. These
    share the work; the first one gathers the features and computes the figures.
    """
    references = [
        reference_statistics(images, config.split, network, cache_dir=cache_dir, progress=progress, processes=processes)
        for network in networks
    ]

    def measured(prior: EBMPrior, sampler: SamplerConfig) -> list[dict[str, float]]:
        def see(part: Samples) -> list[Tensor]:
            return [extract(network, part.images) for network in networks]

        told: dict[str, Any] = {"progress": progress, "processes": processes, "first_only": True}
        seen = prior.map_chunks(see, config.samples, seed=seed, sampler=sampler, chunk=chunk, **told)

        def computed() -> list[dict[str, float]]:
            sets = zip(zip(*seen, strict=True), networks, references, strict=True)
            return [figures(torch.cat(features), network, reference, seed) for features, network, reference in sets]

        return processes.of_first(computed)

    backbone = priors[0].backbone
    before = measured(EBMPrior(backbone, JointEnergy(backbone.groups, EnergyConfig())), ANCESTRAL)
    cards = []
    for prior in priors:
        after = measured(prior.sampling, prior.sampling.sampler)
        sets = zip(networks, references, before, after, strict=True)
        cards.append([_card(*each, prior.sampling.sampler, config, seed) for each in sets])
    return cards


def amount(priors: int, networks: int, images: int, config: FidConfig) -> int:
    """Number of images that `published` draws or reads in all, for its progress."""
    return images * networks + config.samples * (1 + priors)


def _card(
    network: Inception,
    reference: ReferenceStatistics,
    before: dict[str, float],
    after: dict[str, float],
    sampler: SamplerConfig,
    config: FidConfig,
    seed: int,
) -> dict[str, Any]:
    return {
        "distance": network.distance_name,
        "official": network.official,
        "mode": network.mode,
        "weights": network.weights,
        "samples": config.samples,
        "sampler": asdict(sampler),
        "seed": seed,
        "reference": reference.provenance,
        "statistics": reference.moments.digest,
        "statistics_file": str(reference.path),
        "kid_rows": len(reference.features),
        "splits": SPLITS,
        "backbone": before,
        "prior": after,
    }
