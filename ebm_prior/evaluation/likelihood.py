"""Likelihood under a prior (`ebm-prior likelihood`): bounds on log Z, and lower bounds on log p(x) with f and without.

For an image x and K draws z_k ~ q(z|x), with w_k = p(x|z_k) p_β(z_k) / q(z_k|x), the backbone's ELBO is E[log w_k], and
its importance-weighted bound is E[log (1/K) Σ_k w_k] (Burda et al. 2016). With the energy-based prior w_k becomes
w_k e^{f(z_k)} / Z. Both are lower bounds on log p(x). The gain of the ELBO is exactly E_q[f] − log Z. The gain of the
importance-weighted bound is a difference of two lower bounds, and does not bound that of log p(x).

Everything with f is stated at both bounds on log Z. Without log Z, an interval of 95 % is that of a mean over images,
by the normal approximation. With log Z, it joins such an interval of 97.5 % and limits on log Z of 97.5 %
(`ebm_prior.model.bounds`), so that both hold with 95 % or more if the premise of the upper bound does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor

from ebm_prior.compute.randomness import Purpose, chunks, derived_generator
from ebm_prior.interfaces import SILENT, Images, Progress
from ebm_prior.model.arguments import require_calibrated
from ebm_prior.model.bounds import Bounds
from ebm_prior.model.normalizer import AnnealingConfig
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.scores import Form, Mode
from ebm_prior.settings import require, require_kinds, require_positive, require_seed, setting

Array = NDArray[np.float64]
LEVEL, HALF = 0.95, 0.975  # of an interval; of either of the two that together have the first

BOUNDS_ON_X: dict[str, Mode] = {"elbo": "elbo", "iw": "iw"}
"""Names of the bounds on log p(x), and the forms of score that have them."""


@dataclass(frozen=True)
class LikelihoodConfig:
    """Settings of a measurement of likelihood."""

    samples: int = setting(1000, "Number of held-out images, at most all")
    draws: int = setting(16, "Posterior draws per image, K of the importance-weighted bound")
    chunk: int = setting(128, "Images or chains computed at a time, rounded to blocks of 64; no result depends on it")
    seed: int = setting(0, "Seed of all random numbers")
    annealing: AnnealingConfig = field(default_factory=AnnealingConfig)

    def __post_init__(self) -> None:
        require_kinds(self)
        require(self, "samples", self.samples >= 2, "must be 2 or more")
        require_positive(self, "draws", "chunk")
        require_seed(self)


def measure_likelihood(
    prior: EBMPrior, images: Images, config: LikelihoodConfig, *, progress: Progress = SILENT
) -> dict[str, Any]:
    """Bounds on log Z, E_q[f], the gain, and ELBO and importance-weighted bound with f and without: plain values.

    images: held-out ones. Half of the chains of the upper bound on log Z begin at posterior latents of some of them.
    Raises RegimeError for a refiner, whose f has no normaliser of interest.
    """
    require_calibrated(prior.regime, "a likelihood")
    n = min(config.samples, len(images))
    forms = [Form(0, mode=mode, energy=energy) for mode in BOUNDS_ON_X.values() for energy in (False, True)]
    progress.begin("posterior latents", n)
    generator = derived_generator(config.seed, Purpose.LIKELIHOOD_CHOICE)
    chosen = torch.randperm(len(images), generator=generator)[:n]  # in an order that says nothing of their classes
    scores = _scores(prior, images, chosen.sort().values, forms, config, progress)
    begun = chosen[: -(-config.annealing.total // 2)]
    bounds = prior.log_normalizer(
        method="ais",
        images=images.batch(begun),
        config=config.annealing,
        seed=config.seed,
        chunk=config.chunk,
        progress=progress,
    )
    columns = dict(zip(forms, scores.T, strict=True))
    dimensions = math.prod(prior.backbone.image_shape) if prior.backbone.discretised else None
    found: dict[str, Any] = {
        "data": images.name,
        "images": n,
        "draws": config.draws,
        "seed": config.seed,
        "tau": prior.tau,
        "dimensions": dimensions,
        "log_z": described(bounds),
    }
    for name, mode in BOUNDS_ON_X.items():
        plain, tilted = (columns[Form(0, mode=mode, energy=energy)] for energy in (False, True))
        found[name] = {
            "f=0": _mean(plain),
            "f": _normalised(tilted, bounds),
            "gain": _normalised(tilted - plain, bounds),
        }
    elbo, tilted = (columns[Form(0, mode="elbo", energy=energy)] for energy in (False, True))
    return found | {"f_posterior": _mean(tilted - elbo)}


def _scores(
    prior: EBMPrior, images: Images, rows: Tensor, forms: Sequence[Form], config: LikelihoodConfig, progress: Progress
) -> Array:
    """The scores of the images `rows` in nats, (N, number of forms)."""
    parts = []
    for first, count in chunks(len(rows), config.chunk):
        batch = images.batch(rows[first : first + count])
        found = prior.scores(batch, forms, draws=config.draws, seed=config.seed, first=first, chunk=config.chunk)
        parts.append(torch.stack([found[form] for form in forms], dim=1))
        progress.advance(len(batch))
    scores: Array = torch.cat(parts).double().cpu().numpy()
    return scores


def described(bounds: Bounds) -> dict[str, Any]:
    """Bounds on log Z as plain values."""
    low, high = bounds.limits(LEVEL)
    values = asdict(bounds) | {"drift": bounds.drift._asdict(), "apart": bounds.apart and bounds.apart._asdict()}
    return values | {"low": low, "high": high, "closed": bounds.closed, "settled": bounds.settled}


def _mean(values: Array, level: float = LEVEL) -> dict[str, float]:
    """The mean over images (N,) in nats, its standard error, and an interval by the normal approximation."""
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    margin = float(norm.ppf((1 + level) / 2)) * error
    return {"nats": mean, "error": error, "low": mean - margin, "high": mean + margin}


def _normalised(values: Array, bounds: Bounds) -> dict[str, float]:
    """The mean over images (N,) of what lacks − log Z: at both bounds on it, and an interval that allows for both."""
    mean, (low, high) = _mean(values, HALF), bounds.limits(HALF)
    return {
        "at_upper": mean["nats"] - bounds.upper,
        "at_lower": mean["nats"] - bounds.lower,
        "error": mean["error"],
        "low": mean["low"] - high,
        "high": mean["high"] - low,
    }
