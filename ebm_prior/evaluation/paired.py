"""Paired differences between two priors of one backbone, with intervals that the noise they share does not widen.

Both priors are measured at the same posterior latents, the same draws of the backbone's prior and the same images, and
sample i of both starts from the same random numbers. So what one set of images or draws does to both cancels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm_prior.evaluation.metrics import FeatureStatistics, frechet_distance

RESAMPLES, SEED, TWO_SIDED = 200, 0, 1.96
WIDEST = 512  # features with which so many distances take seconds; with Inception's 2,048 they would take an hour


class Paired(NamedTuple):
    """What a prior is compared by, row by row with another one."""

    f_posterior: Tensor  # (N,) nats, at held-out posterior latents
    f_backbone: Tensor | None  # (M,) nats, at draws of the backbone's prior; None where the fit has set log Z to 0
    features: Tensor | None  # (S, D) of samples, if there is an extractor


def differences(of: Paired, other: Paired, real: Tensor | None) -> dict[str, Any]:
    """This prior's gain and FD less the other's, with intervals of 95 %. real: features of held-out images (S, D).

    The gain's interval is a normal one, with the error of log Z by the delta method where log Z is estimated from draws
    of the backbone's prior. Where a fit has set log Z to 0 its error is not in it. FD's is that of a bootstrap over
    samples and images, centred at the difference: resampling raises FD, of both priors alike. FD is left out where
    there are more than `WIDEST` features.
    """
    found: dict[str, Any] = {"gain_nats": _gain(of, other)}
    if of.features is not None and other.features is not None and real is not None and real.shape[1] <= WIDEST:
        found["fd_prior"] = _distance(of.features, other.features, real)
    return found


def _gain(of: Paired, other: Paired) -> dict[str, float]:
    change = (of.f_posterior - other.f_posterior).double()
    difference, variance = float(change.mean()), float(change.var()) / len(change)
    log_z, influences = 0.0, torch.zeros(())
    for sign, f in ((1, of.f_backbone), (-1, other.f_backbone)):
        if f is not None:
            f = f.double()
            log_z += sign * (float(f.logsumexp(0)) - math.log(len(f)))
            influences = influences + sign * f.softmax(0) * len(f)  # of each draw on the estimate of log Z
    if influences.ndim:
        variance += float(influences.var()) / len(influences)
    return _interval(difference - log_z, TWO_SIDED * math.sqrt(variance))


def _distance(of: Tensor, other: Tensor, real: Tensor) -> dict[str, float]:
    random = np.random.default_rng(SEED)

    def change(rows: Any, images: Any) -> float:
        data = FeatureStatistics.of(real[images])
        a, b = (frechet_distance(FeatureStatistics.of(each[rows]), data) for each in (of, other))
        return a - b

    everything = slice(None)
    known, draws = change(everything, everything), []
    for _ in range(RESAMPLES):
        draws.append(change(*(random.integers(len(each), size=len(each)) for each in (of, real))))
    return _interval(known, TWO_SIDED * float(np.std(draws, ddof=1)))


def _interval(difference: float, margin: float) -> dict[str, float]:
    return {"difference": difference, "low": difference - margin, "high": difference + margin}
