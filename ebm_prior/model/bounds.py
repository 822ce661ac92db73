"""Bounds on log Z from log weights of annealed chains: what they say, with which confidence, and when they say nothing.

Chains come in independent repetitions of equal size. The mean weight of a repetition's climbing chains has the mean Z,
so by Jensen's inequality its logarithm lies below log Z in expectation. Likewise the mean of 1/w over a repetition's
descending chains has the mean 1/Z, if they start from draws of the target, and minus its logarithm lies above log Z in
expectation. `Bounds.lower` and `Bounds.upper` are means of these logarithms over the repetitions.

The limits of confidence assume no distribution. For R repetitions, the product of R independent estimates of Z has the
mean Z^R, so by Markov's inequality the mean of their logarithms exceeds log Z by more than log(1/α)/R with probability
α at most. The same holds for the upper end. Only the start of the descending chains has to be believed, and `drift` and
`apart` look for signs against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

OPEN = 0.5  # nats; where the bounds differ by more, nothing is claimed
CLEAR = 3.0  # standard errors beyond which a difference counts as found


class Difference(NamedTuple):
    """A difference of two means in nats.

    >>> Difference(0.4, 0.1).clear, Difference(0.2, 0.1).clear
    (True, False)
    """

    nats: float
    error: float  # its standard error

    @classmethod
    def of(cls, a: Tensor, b: Tensor | None = None) -> Difference:
        """Of the mean of a (N,) from that of b (M,), two independent samples; without b, from 0."""
        mean, error = _mean_and_error(a)
        other, its_error = (0.0, 0.0) if b is None else _mean_and_error(b)
        return cls(mean - other, math.hypot(error, its_error))

    @property
    def clear(self) -> bool:
        """Whether it lies more than `CLEAR` standard errors from 0."""
        return abs(self.nats) > CLEAR * self.error


@dataclass(frozen=True)
class Bounds:
    """What annealed chains say of log Z, in nats.

    lower, upper: stochastic bounds, below and above log Z in expectation (see the module for the upper one's premise).
    lower_error, upper_error: their standard errors over the repetitions.
    spread: standard deviations of log w of single chains, of those that climb and of those that descend. The gap falls
        with their squares over `chains`; a finer ladder makes them smaller.
    drift: of the mean f of the chains that descend later, over the second half of their moves at τ = 1.
    apart: of the mean f where these chains descend, of those that began at posterior latents from those that began at
        annealed draws; None where there are no posterior latents.

    >>> found = Bounds(-0.1, 0.1, 0.02, 0.03, repetitions=32, chains=8, spread=(0.9, 1.1), rungs=20,
    ...     leapfrogs=5, moves=20, acceptance=0.7, drift=Difference(0.0, 0.1), apart=None)
    >>> [round(end, 3) for end in found.limits()], found.closed
    ([-0.215, 0.215], True)
    """

    lower: float
    upper: float
    lower_error: float
    upper_error: float
    repetitions: int
    chains: int  # of each repetition, in each direction
    spread: tuple[float, float]
    rungs: int
    leapfrogs: int  # of each move
    moves: int  # at τ = 1, of the chains that descend later
    acceptance: float  # mean, of these moves
    drift: Difference
    apart: Difference | None

    @property
    def gap(self) -> float:
        """upper − lower, nats. It can be negative, by chance or where the descending chains start from other draws."""
        return self.upper - self.lower

    @property
    def closed(self) -> bool:
        """Whether the bounds differ by at most `OPEN` nats, in either direction."""
        return abs(self.gap) <= OPEN

    @property
    def settled(self) -> bool:
        """Whether nothing was found against the start of the descending chains: neither drift nor two populations."""
        return not self.drift.clear and not (self.apart is not None and self.apart.clear)

    def limits(self, level: float = 0.95) -> tuple[float, float]:
        """An interval that holds log Z with at least this probability, whatever the distribution of the weights.

        Its premise is that of `upper`. Each end misses with probability at most (1 − level)/2.
        """
        slack = math.log(2 / (1 - level)) / self.repetitions
        return self.lower - slack, self.upper + slack


def _log_means(log_weights: Tensor, repetitions: int) -> Tensor:
    """The logarithm of the mean weight of each repetition, (repetitions,), from log weights (chains,) in order."""
    parts = log_weights.double().reshape(repetitions, -1)
    return parts.logsumexp(1) - math.log(parts.shape[1])


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of independent values (N,) and its standard error; the error of a single one is NaN."""
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def bounds_of(climbed: Tensor, descended: Tensor, repetitions: int) -> tuple[float, float, float, float]:
    """lower, upper and their standard errors, from log w of climbing and of descending chains, (chains,) each."""
    lower, lower_error = _mean_and_error(_log_means(climbed, repetitions))
    upper, upper_error = _mean_and_error(-_log_means(-descended, repetitions))
    return lower, upper, lower_error, upper_error
