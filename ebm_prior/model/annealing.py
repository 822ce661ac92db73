"""Annealed importance sampling between N(0, I) and the target e^{g(ε)} N(ε; 0, I) in ε-space, in both directions.

The densities between are e^{τ g(ε)} N(ε; 0, I), with τ along a ladder from 0 to 1 (Neal 2001). A chain that climbs
starts from N(0, I), collects (τ_t − τ_{t−1}) g(ε) at rung t − 1 and then makes a move that leaves the density of rung t
invariant. The sum is its log weight log w, and E[w] = Z = E_{N(0, I)}[e^g] on any ladder, whatever its moves. A chain
that descends makes the same moves in reverse order. If it starts from a draw of the target, E[1/w] = 1/Z.

A move is a trajectory of Hamiltonian Monte Carlo in which the motion under N(0, I) is exact
(`samplers.pcn_langevin_step`). It satisfies detailed balance, and is therefore its own reversal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_prior.compute.randomness import Generator, uniform
from ebm_prior.errors import DivergenceError
from ebm_prior.model.samplers import (
    TARGET_ACCEPTANCE,
    ChainInfo,
    ChainState,
    Potential,
    effective_sample_size,
    pcn_langevin_step,
    start,
)

FEWEST_CHAINS = 0.5  # effective sample size, as a share of the pilot's chains, below which they are resampled
QUARTER = 0.5 * math.pi  # of the period of the motion under N(0, I): a longer trajectory turns back
FINAL_MOVES = 10  # moves of the pilot at τ = 1, which end the adaptation of the step size


class Ladder(NamedTuple):
    """The values of τ between N(0, I) and the target, and the moves there. Nothing changes once chains climb it.

    >>> Ladder((0.4, 1.0), (0.3, 0.1), 5).rungs  # from 0 to .4 and from .4 to 1
    2
    """

    taus: tuple[float, ...]  # ascending, without 0, up to 1
    step_sizes: tuple[float, ...]  # δ of a move at each of these
    leapfrogs: int  # of a move

    @property
    def rungs(self) -> int:
        """The number of steps of τ."""
        return len(self.taus)

    def increments(self) -> list[float]:
        """τ_t − τ_{t−1}, in ascending order."""
        return [high - low for low, high in zip((0.0, *self.taus), self.taus, strict=False)]


def tempered_step(
    state: ChainState, g: Potential, tau: float, step_size: Tensor, generator: Generator, *, leapfrogs: int = 1
) -> tuple[ChainState, ChainInfo]:
    """A move of pCN-Langevin on e^{τ g} N(0, I), for τ > 0. The states hold g and ∇g, without the factor τ."""

    def scaled(eps: Sequence[Tensor]) -> Tensor:
        return tau * g(eps)

    now = ChainState(state.eps, tau * state.value, [tau * gradient for gradient in state.gradient])
    moved, info = pcn_langevin_step(now, scaled, step_size, generator, leapfrogs=leapfrogs)
    return ChainState(moved.eps, moved.value / tau, [gradient / tau for gradient in moved.gradient]), info


def climb(
    g: Potential, state: ChainState, ladder: Ladder, generator: Generator, told: Callable[[], None] = lambda: None
) -> tuple[ChainState, Tensor]:
    """Anneal chains from draws of N(0, I) to τ = 1. Returns their end, and log w in nats, (B,) in float64.

    state: g with its gradient at the draws.  told: is called after each rung. The end has the density of the last rung
    but one, moved towards it, not that of τ = 1: its weights say by how much it differs.
    """
    log_weight = torch.zeros_like(state.value, dtype=torch.float64)
    for number, increment in enumerate(ladder.increments()):
        log_weight += increment * state.value.double()
        if number + 1 < ladder.rungs:
            state = _moved(state, g, ladder, number, generator)
        told()
    _require_finite(log_weight)
    return state, log_weight


def descend(
    g: Potential, state: ChainState, ladder: Ladder, generator: Generator, told: Callable[[], None] = lambda: None
) -> Tensor:
    """Anneal chains from draws of the target down to N(0, I). Returns log w in nats, (B,) in float64.

    These are log weights of the same kind as those of `climb`, so that 1/w, not w, has a known mean.
    """
    log_weight = torch.zeros_like(state.value, dtype=torch.float64)
    for number, increment in reversed(list(enumerate(ladder.increments()))):
        log_weight += increment * state.value.double()
        if number:
            state = _moved(state, g, ladder, number - 1, generator)
        told()
    _require_finite(log_weight)
    return log_weight


def stay(
    g: Potential,
    state: ChainState,
    ladder: Ladder,
    moves: int,
    generator: Generator,
    told: Callable[[], None] = lambda: None,
) -> tuple[ChainState, Tensor]:
    """Move chains `moves` times at τ = 1, which leaves the target invariant. Returns their end and acceptance, (B,)."""
    accepted = torch.zeros_like(state.value)
    step_size = torch.full_like(state.value, ladder.step_sizes[-1])
    for _ in range(moves):
        state, info = tempered_step(state, g, 1.0, step_size, generator, leapfrogs=ladder.leapfrogs)
        accepted += info.acceptance
        told()
    return state, accepted / max(1, moves)


def find_ladder(
    g: Potential,
    eps: Sequence[Tensor],
    generator: Generator,
    *,
    ess: float,
    leapfrogs: int,
    most: int,
    told: Callable[[], None] = lambda: None,
) -> Ladder:
    """Choose a ladder with a pilot population, which is thrown away. eps: its draws of N(0, I), a list of (B, *shape).

    Args:
        g: the potential of the target.
        eps: the population's start.
        generator: of its moves.
        ess: the conditional effective sample size of each step of τ, as a share of the population (Zhou, Johansen and
            Aston 2016): near 1, steps are small.
        leapfrogs: of each move. Its step size follows the acceptance of the pilot's moves, from rung to rung.
        most: largest number of rungs; where it is too small, the steps of τ are larger than `ess` says.
        told: is called after each rung.

    Returns:
        The ladder. Chains that climb or descend it must be others than the pilot's, or their weights would be biased.
    """
    state = start(g, eps)
    _require_finite(state.value)
    longest = 2 * math.tan(QUARTER / (2 * leapfrogs)) ** 2  # δ of a trajectory of a quarter period
    step_size, tau, taus, step_sizes = min(2.0, longest), 0.0, list[float](), list[float]()
    log_weight = torch.zeros_like(state.value, dtype=torch.float64)
    while tau < 1:
        increment = max(_increment(log_weight, state.value.double(), 1 - tau, ess), 1 / most)
        tau = min(1.0, tau + increment)
        log_weight += (tau - (taus[-1] if taus else 0.0)) * state.value.double()
        if float(effective_sample_size(log_weight)) < FEWEST_CHAINS * len(log_weight):
            state, log_weight = _resampled(state, log_weight, generator), torch.zeros_like(log_weight)
        for _ in range(1 if tau < 1 else FINAL_MOVES):
            sizes = torch.full_like(state.value, step_size)
            state, info = tempered_step(state, g, tau, sizes, generator, leapfrogs=leapfrogs)
            step_size *= math.exp(float(info.acceptance.mean()) - TARGET_ACCEPTANCE)
            step_size = min(2.0, longest, step_size)
        taus.append(tau)
        step_sizes.append(step_size)
        told()
    return Ladder(tuple(taus), tuple(step_sizes), leapfrogs)


def _increment(log_weight: Tensor, value: Tensor, most: float, ess: float) -> float:
    """The largest step of τ, at most `most`, whose conditional effective sample size is the share `ess`, by bisection.

    The share is (Σ W v)² / Σ W v², with W the normalised weights so far and v = e^{Δτ g} (B,).
    """
    log_weight = log_weight.log_softmax(0)

    def share(increment: float) -> float:
        v = increment * value
        return math.exp(2 * float((log_weight + v).logsumexp(0)) - float((log_weight + 2 * v).logsumexp(0)))

    if share(most) >= ess:
        return most
    low, high = 0.0, most
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) >= ess else (low, middle)
    return low


def _moved(state: ChainState, g: Potential, ladder: Ladder, number: int, generator: Generator) -> ChainState:
    """The chains after the move at rung `number` of the ladder."""
    step_size = torch.full_like(state.value, ladder.step_sizes[number])
    return tempered_step(state, g, ladder.taus[number], step_size, generator, leapfrogs=ladder.leapfrogs)[0]


def _resampled(state: ChainState, log_weight: Tensor, generator: Generator) -> ChainState:
    """Chains drawn by their weights (multinomial resampling), from one number between 0 and 1 for each."""
    points = uniform(log_weight.shape, generator, dtype=torch.float64, device=log_weight.device)
    rows = torch.searchsorted(log_weight.softmax(0).cumsum(0), points).clamp(max=len(points) - 1)
    return ChainState([e[rows] for e in state.eps], state.value[rows], [d[rows] for d in state.gradient])


def _require_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise DivergenceError("f is not finite along annealed chains: the energy is broken, fit it again")
