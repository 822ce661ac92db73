"""Draws from the ε-target by a sampler's settings: resampling, a chain, and a new chain where that one is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_prior.compute.randomness import Generator, Rows
from ebm_prior.errors import DivergenceError
from ebm_prior.model.samplers import (
    ChainInfo,
    ChainState,
    Potential,
    SamplerConfig,
    kernel_of,
    last_kernel_of,
    norm,
    require_finite_chains,
    resample,
    run_chain,
    start,
)

RESTARTS = 5  # times that a refused chain begins anew, at most
TOGETHER = 16  # restarted chains are padded to multiples of this: a GPU then meets few sizes of batches


class Sampled(NamedTuple):
    """The outcome of `draw`: positions ε and per-chain diagnostics (B,)."""

    eps: list[Tensor]
    acceptance: Tensor  # mean over the steps
    norm: Tensor  # of the final ε; infinite where f is not finite there
    ess_fraction: Tensor  # effective sample size of the resampling / proposals
    step_size: Tensor
    restarts: Tensor  # times that the chain began anew


def draw(
    potential: Potential,
    propose: Callable[[], list[Tensor]],
    config: SamplerConfig,
    generator: Generator = None,
    callback: Callable[[int, ChainState, ChainInfo], None] | None = None,
    *,
    of_rows: Callable[[Tensor], Potential] | None = None,
) -> Sampled:
    """Draw from the ε-target as `config` says. `propose()`: ε ~ N(0, I), a list of (B, *group.shape).

    A chain that ends beyond the `norm_limit` begins anew from a new proposal, and of those that all end beyond it the
    one with the smallest norm is kept. Its draws are rows of draws for all B chains, so that they depend neither on the
    other chains nor on B. Only the first chains report to `callback`. of_rows: gives the potential of some of the B
    chains, where each has its own.
    """
    found = _drawn(potential, propose, config, generator, callback)
    if not config.norm_limit:
        return found
    for _ in range(RESTARTS):
        refused = (~(found.norm <= config.norm_limit)).nonzero()[:, 0]
        if not len(refused):
            break
        rows = torch.cat([refused, refused[:1].expand(-len(refused) % TOGETHER)])
        others = partial(_some, propose, rows)
        own = of_rows(rows) if of_rows else potential
        again = _drawn(own, others, config, Rows(generator, len(found.norm), rows))
        found = _replaced(found, again, refused)
    require_finite_chains(found.norm.isfinite(), config.steps)
    return found


def _drawn(
    potential: Potential,
    propose: Callable[[], list[Tensor]],
    config: SamplerConfig,
    generator: Generator,
    callback: Callable[[int, ChainState, ChainInfo], None] | None = None,
) -> Sampled:
    """A draw whose chains are kept wherever they end, if there is a `norm_limit`."""
    eps, ess = resample(potential, propose, config.proposals, generator)
    if not bool(torch.isfinite(ess).all()):
        raise DivergenceError("f is not finite at draws of the backbone's prior: the energy is broken, fit it again")
    step_size = torch.full_like(ess, config.step_size)
    acceptance, left = torch.ones_like(ess), torch.zeros_like(ess, dtype=torch.bool)
    if config.steps:
        state, acceptance, step_size = run_chain(
            kernel_of(config),
            start(potential, eps),
            potential,
            config.steps,
            step_size=step_size,
            adapt_steps=config.adapt_steps,
            generator=generator,
            callback=callback,
            may_leave=config.norm_limit > 0,
            last=last_kernel_of(config),
        )
        eps, left = state.eps, ~state.value.isfinite()
    size = norm(eps).masked_fill_(left, math.inf).nan_to_num(nan=math.inf, posinf=math.inf)
    return Sampled(eps, acceptance, size, ess / config.proposals, step_size, torch.zeros_like(ess))


def _some(propose: Callable[[], list[Tensor]], rows: Tensor) -> list[Tensor]:
    return [e[rows] for e in propose()]


def _replaced(found: Sampled, again: Sampled, rows: Tensor) -> Sampled:
    """`found`, in which the first chains of `again` take the place of these rows where their norm is smaller."""
    better = again.norm[: len(rows)] < found.norm[rows]
    chosen = rows[better]

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.index_copy(0, chosen, new[: len(rows)][better])

    return Sampled(
        list(map(put, found.eps, again.eps)),
        acceptance=put(found.acceptance, again.acceptance),
        norm=put(found.norm, again.norm),
        ess_fraction=put(found.ess_fraction, again.ess_fraction),
        step_size=put(found.step_size, again.step_size),
        restarts=found.restarts.index_add(0, rows, torch.ones_like(found.norm[rows])),
    )
