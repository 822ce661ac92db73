"""Chains of a prior's sampler with what they pass through: f and the norm of every group at each step."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_prior.compute.randomness import BlockGenerator, Purpose, derived_seed
from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.model.drawing import draw
from ebm_prior.model.mixing import FEWEST_TIMES, Mixing
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import ChainInfo, ChainState, SamplerConfig, graphed

CHAINS, SHORTEST, LONGEST = 16, 64, 4096  # of a diagnosis: chains, and the steps between which `--steps auto` chooses


class Diagnosis(NamedTuple):
    """Whether chains of a sampler have mixed, by quantity: "f", and "‖ε‖ NAME" of each group."""

    chains: int
    steps: int
    mixing: dict[str, Mixing]

    @property
    def unmixed(self) -> list[str]:
        """The quantities that have not mixed, as far as can be told; the slowest first."""
        found = [name for name, mixing in self.mixing.items() if not mixing.mixed(self.steps)]
        return sorted(found, key=lambda name: -self.mixing[name].time)

    @property
    def longest_time(self) -> float:
        """The longest autocorrelation time of all quantities, in steps; 1 where none can be told."""
        return max([1.0, *(mixing.time for mixing in self.mixing.values() if mixing.time > 0)])


@torch.no_grad()
def diagnose(prior: EBMPrior, sampler: SamplerConfig, *, chains: int = CHAINS, seed: int = 0) -> Diagnosis:
    """Run chains as the sampler does, from draws of the backbone's prior and resampling on, and say whether they mix.

    Raises ConfigurationError for a sampler without chains, or with chains of single groups, and DivergenceError where
    a chain leaves the finite numbers.
    """
    if sampler.by_group or not sampler.steps:
        raise ConfigurationError(
            "a diagnosis needs chains of all groups together: give them --steps, and --no-by-group where they have it"
        )
    backbone, device = prior.backbone, next(prior.backbone.parameters()).device
    generator = BlockGenerator(derived_seed(seed, Purpose.DIAGNOSIS), 0, chains, device)
    rows: list[Tensor] = []

    def keep(step: int, state: ChainState, info: ChainInfo) -> None:
        norms = [e.double().square().flatten(1).mean(1).sqrt() for e in state.eps]
        rows.append(torch.stack([state.value.double(), *norms]).cpu())

    propose = partial(backbone.standard_normal, chains, generator=generator)
    draw(graphed(prior.potential, device), propose, sampler, generator, keep)
    names = ["f", *(f"‖ε‖ {group.name}" for group in backbone.groups)]
    columns = torch.stack(rows[: sampler.steps], dim=1)  # (quantities, steps, chains)
    if not columns.isfinite().all():
        raise DivergenceError("chains of the diagnosis are no longer finite numbers: give them a smaller --step-size")
    return Diagnosis(chains, sampler.steps, {n: Mixing.of(column) for n, column in zip(names, columns, strict=True)})


def long_enough(prior: EBMPrior, sampler: SamplerConfig, *, seed: int = 0) -> tuple[SamplerConfig, Diagnosis]:
    """The sampler with as many steps as its slowest quantity has autocorrelation times, times `FEWEST_TIMES`.

    Chains are doubled until they are long enough for that to be told, at most to `LONGEST` steps. Returns the sampler
    and the diagnosis of the longest trial, in which some quantities are unmixed if `LONGEST` steps do not suffice.
    """
    steps = SHORTEST
    while True:
        found = diagnose(prior, replace(sampler, steps=steps), seed=seed)
        if steps >= LONGEST or not found.unmixed:
            break
        steps *= 2
    chosen = LONGEST if found.unmixed else min(steps, math.ceil(FEWEST_TIMES * found.longest_time))
    return replace(sampler, steps=chosen), found
