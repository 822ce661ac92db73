"""Quality of a score for outlier detection: AUROC, AUPRC and FPR80, with confidence intervals.

The outliers are the positive class, and larger scores mean more outlying. Intervals are percentiles over a bootstrap of
the images (Efron 1979) within each class. All scores of a call use the same resamples, so that the difference of two
scores is a paired one, with a much tighter interval than those of the two scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebm_prior.errors import DataError

Array = NDArray[np.float64]


class Detection(NamedTuple):
    """The quality of one score."""

    auroc: float  # P(an outlier scores higher than another image) + ½ P(equal)
    auprc: float  # average precision: Σ precision · Δ recall
    auprc_trapezoid: float  # area under straight lines between the points of the curve, from (0, 1) on
    fpr80: float  # false positive rate at the first threshold with a true positive rate of at least 0.8


class Interval(NamedTuple):
    """Percentiles of a Detection over the resamples."""

    low: Detection
    high: Detection


class _Ranking:
    """Scores sorted once: every resample is then a set of weights, and costs cumulative sums alone."""

    def __init__(self, outlying: Array, others: Array) -> None:
        scores = np.concatenate([outlying, others])
        if not len(outlying) or not len(others) or not np.isfinite(scores).all():
            raise DataError(
                f"expected finite scores of both classes, found {len(outlying)} of outliers and {len(others)} of "
                f"others, {int((~np.isfinite(scores)).sum())} of them not finite"
            )
        self._order = np.argsort(-scores, kind="stable")
        self._positive = (np.arange(len(scores)) < len(outlying))[self._order]
        ordered = scores[self._order]
        self._last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each run of equal scores

    def detection(self, weights: Array) -> Detection:
        """The quality where image i counts `weights[i]` times, outliers first."""
        ordered = weights[self._order]
        true = np.cumsum(ordered * self._positive)[self._last]
        false = np.cumsum(ordered * ~self._positive)[self._last]
        seen = true + false > 0  # thresholds above every image of the resample are none of its own
        true, false = true[seen], false[seen]
        recall, fall_out, precision = true / true[-1], false / false[-1], true / (true + false)
        before, start = np.append(0.0, recall[:-1]), np.append(0.0, fall_out[:-1])
        steps = recall - before
        return Detection(
            auroc=float((fall_out - start) @ (recall + before) / 2),
            auprc=float(steps @ precision),
            auprc_trapezoid=float(steps @ (precision + np.append(1.0, precision[:-1])) / 2),
            fpr80=float(fall_out[np.argmax(recall >= 0.8 - 1e-12)]),
        )


def detection(outlying: Array, others: Array) -> Detection:
    """The quality of a score: its values at outliers (N,) and at other images (M,). Raises DataError."""
    return _Ranking(outlying, others).detection(np.ones(len(outlying) + len(others)))


def resampled(
    outlying: Mapping[str, Array], others: Mapping[str, Array], *, resamples: int = 500, seed: int = 0
) -> dict[str, Array]:
    """Detection of every score on the same bootstrap resamples: name -> (resamples, 4), columns as `Detection`.

    outlying, others: name -> values (N,) and (M,) of a score, row i of the same image for all scores.
    """
    rankings = {name: _Ranking(outlying[name], others[name]) for name in outlying}
    n, m = (len(next(iter(values.values()))) for values in (outlying, others))
    random = np.random.default_rng(seed)
    found: dict[str, Array] = {name: np.empty((resamples, len(Detection._fields))) for name in rankings}
    for row in range(resamples):
        weights = np.concatenate([np.bincount(random.integers(size, size=size), minlength=size) for size in (n, m)])
        for name, ranking in rankings.items():
            found[name][row] = ranking.detection(weights.astype(float))
    return found


def interval(values: Array, level: float = 0.95) -> Interval:
    """The central `level` of resampled detections (R, 4), or of their paired differences."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Interval(Detection(*map(float, low)), Detection(*map(float, high)))
