"""Whether chains have mixed: split R̂, effective sample sizes and autocorrelation times (Vehtari et al. 2021).

All of it is of one number per step and chain, in an array (steps, chains). R̂ compares the variance between halves of
chains with the variance within them, after the values are replaced by normal scores of their ranks, and again for their
distance from the median, so that differences of scale count, too; it is the larger of both. Near 1 it finds no
difference, which is no proof that there is none.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_R_HAT = 1.05
FEWEST_TIMES = 10  # autocorrelation times that a chain should be long
FEWEST_STEPS = 8  # below which halves of chains say nothing


class Mixing(NamedTuple):
    """What chains of one quantity say. All are NaN where the quantity is constant or there are too few steps."""

    r_hat: float
    bulk_ess: float  # over all chains, of the mean of ranks
    tail_ess: float  # over all chains, the smaller one of the 5 % and the 95 % quantile
    time: float  # integrated autocorrelation time of the quantity itself, in steps

    @classmethod
    def of(cls, values: Tensor) -> Mixing:
        """From the values of a quantity, (steps, chains).

        >>> independent = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
        >>> Mixing.of(independent).r_hat < 1.01, 0.5 < Mixing.of(independent).time < 1.5
        (True, True)
        """
        values = values.double().cpu()
        if len(values) < FEWEST_STEPS or bool((values == values[0, 0]).all()) or not bool(values.isfinite().all()):
            return cls(math.nan, math.nan, math.nan, math.nan)
        split = _halves(values)
        ranked = _normal_scores(split)
        folded = _normal_scores((split - split.flatten().quantile(0.5)).abs())
        tails = [(split <= values.flatten().quantile(share)).double() for share in (0.05, 0.95)]
        return cls(
            max(_r_hat(ranked), _r_hat(folded)),
            _effective(ranked),
            min(map(_effective, tails)),
            split.numel() / _effective(split),
        )

    def mixed(self, steps: int) -> bool:
        """Whether neither R̂ nor the length of these chains of `steps` steps speaks against it; so where it is NaN."""
        return not (self.r_hat > LARGEST_R_HAT or steps < FEWEST_TIMES * self.time)


def _halves(values: Tensor) -> Tensor:
    """Both halves of every chain as chains of their own, (steps // 2, 2 · chains), without the middle step if any."""
    half = len(values) // 2
    return torch.cat([values[:half], values[-half:]], dim=1)


def _normal_scores(values: Tensor) -> Tensor:
    """Standard normal quantiles of the ranks among all values; equal values share the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    ranks: Tensor = (counts.cumsum(0) - 0.5 * (counts - 1))[inverse]
    scores: Tensor = torch.special.ndtri((ranks - 0.375) / (values.numel() + 0.25))
    return scores


def _r_hat(values: Tensor) -> float:
    n = len(values)
    between, within = n * float(values.mean(0).var()), float(values.var(0).mean())
    return math.sqrt((between / within + n - 1) / n) if within else math.nan


def _effective(values: Tensor) -> float:
    """The effective number of independent values among (steps, chains), by Geyer's initial monotone sequence."""
    n, chains = values.shape
    centred = values - values.mean(0)
    spectrum = torch.fft.rfft(centred, 2 * n, dim=0).abs().square()
    covariance = torch.fft.irfft(spectrum, 2 * n, dim=0)[:n].mean(1) / n  # of a lag, mean over the chains
    within = float(covariance[0]) * n / (n - 1)
    total = float(covariance[0]) + (float(values.mean(0).var()) if chains > 1 else 0.0)
    if not total:
        return float(values.numel())
    correlation = 1 - (within - covariance) / total
    correlation[0] = 1.0
    last = (n - 3) // 2  # the pair at which the sum ends at the latest
    pairs = correlation[: 2 * last].reshape(-1, 2).sum(1)  # of lags 2t and 2t + 1
    ends = (pairs <= 0).nonzero()
    count = int(ends[0]) if len(ends) else last
    sums = pairs[:count].cummin(0).values.sum() if count else torch.zeros(())
    time = 2 * float(sums) - 1 + max(0.0, float(correlation[2 * count]))
    return values.numel() / max(time, 1 / math.log10(values.numel()))
