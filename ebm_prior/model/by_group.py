"""The group-by-group sampler: one latent group after another, each from its own head, in one pass through the network.

Where f = Σ_i f_i and E[e^{f_i}] = 1 under p_β(z_i | z_<i) for every z_<i, as for density ratios of single groups
(`ebm_prior.training.groupwise`), the prior factorises in generation order:

    p_α(z) = Π_i p_β(z_i | z_<i) e^{f_i},   f_i a function of z_i and of z_<i.

So z_i can be drawn as soon as z_<i is: by resampling among draws of p_β(z_i | z_<i), then by steps of a Markov kernel
in ε_i. The gradient of such a step passes through one head, and not through the network. Where f_i is constant, a draw
of p_β(z_i | z_<i) is all. For an f whose factors are not
normalised the result is Π_i p_β(z_i | z_<i) e^{f_i} / Z_i(z_<i), which is another density than p_α.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ebm_prior.compute.randomness import Generator, standard_normal
from ebm_prior.model.backbone import Backbone, Gaussian, Trace
from ebm_prior.model.drawing import Sampled, draw
from ebm_prior.model.energy import JointEnergy, seen
from ebm_prior.model.samplers import Potential, SamplerConfig, norm


class Walk(Protocol):
    """The terms τ f_i on a traversal, which meets the groups in order; they can depend on the groups met before."""

    def f(self, index: int, z: Tensor, eps: Tensor, prior: Gaussian) -> Tensor:
        """τ f_i in nats, (B,), from z_i and ε_i (B, *group.shape), and p_β(z_i | z_<i)."""

    def is_constant(self, index: int) -> bool:
        """Whether f_i is the same everywhere, so that p_β(z_i | z_<i) itself is drawn from."""

    def go_on(self, index: int, z: Tensor, eps: Tensor, prior: Gaussian) -> None:
        """Take z_i as drawn, and go on to the next group."""


class HeadsWalk:
    """The walk of heads that each see their own group and those above it."""

    def __init__(self, energy: JointEnergy, tau: float = 1.0) -> None:
        self._energy, self._tau = energy, tau
        self._context: Tensor | None = None

    def f(self, index: int, z: Tensor, eps: Tensor, prior: Gaussian) -> Tensor:
        """See `Walk`."""
        head, above = self._energy.head(index), self._energy.above
        features = head.features(seen(self._energy.config, index, z, eps, prior))
        value = head.energy(features)
        return self._tau * (value if above is None else value + above.term(index, features, self._context))

    def is_constant(self, index: int) -> bool:
        """See `Walk`."""
        return self._energy.is_constant(index)

    def go_on(self, index: int, z: Tensor, eps: Tensor, prior: Gaussian) -> None:
        """See `Walk`."""
        if self._energy.above is not None:
            features = self._energy.head(index).features(seen(self._energy.config, index, z, eps, prior))
            self._context = self._energy.above.heard(index, features, self._context)


def own_potential(walk: Walk, index: int, prior: Gaussian) -> Potential:
    """g(ε_i) = τ f_i at z_i = mean_i + std_i ε_i, for a list of this group's ε alone; the `prior` is that of z_i."""
    return lambda eps: walk.f(index, prior.mean + prior.std * eps[0], eps[0], prior)


@torch.no_grad()
def draw_by_group(
    backbone: Backbone, walk: Walk, fixed: Sequence[Tensor], size: int, sampler: SamplerConfig, generator: Generator
) -> tuple[Trace, Sampled]:
    """Draw the groups below the `fixed` ones, each by the `sampler` given those above: the traversal, and diagnostics.

    fixed: z of the first groups, a list of (B, *group.shape), which may be empty; B is the `size`. The diagnostics are
    those of the groups drawn: ε, acceptance and step size as means over them, the ESS as the smallest of theirs.
    """
    like, found = next(backbone.parameters()), list[Sampled]()
    plain = replace(sampler, proposals=1, steps=0, adapt_steps=0, leapfrogs=1, temperature=1.0)

    def at(index: int, prior: Gaussian, context: Any) -> Tensor:
        if index < len(fixed):
            walk.go_on(index, fixed[index], prior.standardize(fixed[index]), prior)
            return fixed[index]
        shape = (size, *backbone.groups[index].shape)

        def propose() -> list[Tensor]:
            return [standard_normal(shape, generator, dtype=like.dtype, device=like.device)]

        chosen = plain if walk.is_constant(index) else sampler
        found.append(draw(own_potential(walk, index, prior), propose, chosen, generator))
        (eps,) = found[-1].eps
        z = torch.addcmul(prior.mean, prior.std, eps)
        walk.go_on(index, z, eps, prior)
        return z

    trace = backbone.trace(at, size)
    eps = [group for drawn in found for group in drawn.eps]
    acceptance = torch.stack([drawn.acceptance for drawn in found]).mean(0)
    step_size = torch.stack([drawn.step_size for drawn in found]).mean(0)
    least = torch.stack([drawn.ess_fraction for drawn in found]).amin(0)
    return trace, Sampled(eps, acceptance, norm(eps), least, step_size, torch.zeros_like(least))
