"""Distances between two sets of images in the feature space of a named network, and scores derived from them.

Every distance depends on the number of samples (the Fréchet distance is biased upwards, about as 1/N), on the network
and on the preprocessing: say all of them beside the number, and compare only at equal N. A Fréchet distance is called
FID only on Inception's official features (`evaluation.inception`); on any other it is FD(name of the network).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebm_prior.errors import ConfigurationError, DataError

Array = NDArray[np.float64]
Features = Tensor | NDArray[np.floating]


class FeatureExtractor(Protocol):
    """A network that gives features for distances: a FeatureClassifier, or Inception."""

    @property
    def name(self) -> str:
        """The network and its weights."""

    @property
    def distance_name(self) -> str:
        """The printed name of a Fréchet distance on its features: FD(name), or FID for Inception's official weights."""

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, D)."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (D,) and covariance (D, D) of n feature vectors, in float64: all that a Fréchet distance depends on."""

    mean: Array
    covariance: Array
    n: int

    @classmethod
    def of(cls, features: Features) -> FeatureStatistics:
        """The unbiased statistics of features (N, D). Raises DataError for N < 2, another shape, NaN or infinity."""
        values = _checked(features)
        mean = values.mean(0)
        values -= mean  # in place: 50,000 Inception features are 0.8 GB
        return cls(mean, values.T @ values / (len(values) - 1), len(values))

    @property
    def digest(self) -> str:
        """The first 8 hex digits of SHA-256 of these numbers, printed beside distances measured against them."""
        numbers = (np.ascontiguousarray(x, dtype=np.float64).tobytes() for x in (self.mean, self.covariance))
        return hashlib.sha256(b"".join(numbers) + str(self.n).encode()).hexdigest()[:8]


def frechet_distance(a: Features | FeatureStatistics, b: Features | FeatureStatistics) -> float:
    """The squared Fréchet distance between the Gaussians with the moments of two sets of features (N, D), (M, D).

        d² = ‖μ_a − μ_b‖² + tr Σ_a + tr Σ_b − 2 tr (Σ_a Σ_b)^½      (Dowson & Landau 1982; Heusel et al. 2017)

    Σ_a Σ_b has the eigenvalues of the symmetric Σ_a^½ Σ_b Σ_a^½, so two symmetric eigendecompositions do, also for
    singular covariances (N ≤ D), where a general matrix square root fails. Raises DataError as `FeatureStatistics.of`
    does, and for different D.
    """
    a, b = (s if isinstance(s, FeatureStatistics) else FeatureStatistics.of(s) for s in (a, b))
    if a.mean.shape != b.mean.shape:
        raise DataError(
            f"expected features of one network, found {len(a.mean)} and {len(b.mean)} dimensions: "
            "statistics of different extractors cannot be compared"
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(min=0))  # root @ root.T = Σ_a: Σ_a^½ up to a rotation, which cancels
    cross = np.sqrt(np.linalg.eigvalsh(root.T @ b.covariance @ root).clip(min=0)).sum()
    difference = a.mean - b.mean
    distance = float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)
    return max(distance, 0.0)  # equal sets: rounding may leave −1e-12


def kernel_distance(a: Features, b: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """The kernel distance (KID): unbiased MMD² with k(x, y) = (x·y/D + 1)³, mean over random subsets of both sets.

    MMD² = mean_{i≠j} k(a_i, a_j) + mean_{i≠j} k(b_i, b_j) − 2 mean_{ij} k(a_i, b_j)   (Bińkowski et al. 2018)

    Features (N, D), (M, D); subsets of min(subset_size, N, M) rows without replacement, drawn from `seed`. It may be
    slightly negative for equal distributions. Raises DataError as `frechet_distance` does.
    """
    if subsets < 1 or subset_size < 2:
        raise ConfigurationError(f"expected subsets ≥ 1 of subset_size ≥ 2, found {subsets} of {subset_size}")
    x, y = _checked(a), _checked(b)
    if x.shape[1] != y.shape[1]:
        raise DataError(f"expected features of one network, found {x.shape[1]} and {y.shape[1]} dimensions")
    size = min(subset_size, len(x), len(y))
    random = np.random.default_rng(seed)
    total = 0.0
    for _ in range(subsets):
        p, q = (features[random.choice(len(features), size, replace=False)] for features in (x, y))
        within = _cubic(p, p) + _cubic(q, q)
        total += (within.sum() - np.trace(within)) / (size * (size - 1)) - 2 * _cubic(p, q).mean()
    return float(total / subsets)


def inception_score(logits: Features, *, splits: int = 10) -> tuple[float, float]:
    """The Inception Score of class logits (N, K): mean and standard deviation over `splits` parts of the samples.

        IS = exp( mean_n KL(p(y | x_n) ‖ p(y)) ),  p(y) = mean_n p(y | x_n)      (Salimans et al. 2016)

    Parts are consecutive, and the deviation is that of the population, as published. From 1 (every image looks like
    every other) to K. Raises DataError for another shape, NaN, or fewer samples than parts.
    """
    values = torch.from_numpy(_checked(logits))
    if splits < 1 or len(values) < splits:
        raise DataError(f"expected at least one sample per part, found {len(values)} samples and {splits} parts")
    scores = []
    for part in torch.tensor_split(values, splits):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append(math.exp(float((log_p.exp() * (log_p - log_marginal)).sum(1).mean())))
    return float(np.mean(scores)), float(np.std(scores))


def gap_closed(distance_backbone: float, distance_prior: float, distance_reconstruction: float) -> float:
    """The share of the gap between the backbone's prior and its reconstructions that a learned prior closes.

        (d_backbone − d_prior) / (d_backbone − d_reconstruction)

    All three against the same reference at the same N. Reconstructions are what a perfect prior would reach with this
    decoder: 1 is that, 0 is no change, negative is worse than without. NaN where there is no gap to close (the
    backbone's samples are no farther than its reconstructions): no share of it can be stated.
    """
    gap = distance_backbone - distance_reconstruction
    return (distance_backbone - distance_prior) / gap if gap > 0 else math.nan


def auroc(positive: Features, negative: Features) -> float:
    """P(score of a positive > score of a negative) + ½ P(equal): the area under the ROC curve, of scores (N,), (M,).

    From ranks with ties shared (Mann-Whitney U). Raises DataError for empty or NaN scores.
    """
    p, n = (np.asarray(_numpy(scores), dtype=np.float64).reshape(-1) for scores in (positive, negative))
    if len(p) == 0 or len(n) == 0 or np.isnan(p).any() or np.isnan(n).any():
        raise DataError(f"expected scores of both classes without NaN, found {len(p)} positive and {len(n)} negative")
    ordered = np.sort(n)
    below = np.searchsorted(ordered, p, side="left") + np.searchsorted(ordered, p, side="right")
    return float(below.mean() / (2 * len(n)))


@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor, *, batch_size: int = 250) -> Tensor:
    """Features (N, D) on the CPU of images (N, C, H, W) in [0, 1], in batches."""
    return torch.cat([extractor.features(batch).cpu() for batch in torch.split(images, batch_size)])


def _cubic(x: Array, y: Array) -> Array:
    kernel: Array = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def _numpy(values: Features) -> NDArray[np.floating]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _checked(features: Features) -> Array:
    values = _numpy(features).astype(np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise DataError(f"expected features (N, D) of at least 2 images, found shape {values.shape}")
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values).all(1))
        raise DataError(f"features hold NaN or infinity in {len(rows)} of {len(values)} rows, first row {rows[0]}")
    return values
