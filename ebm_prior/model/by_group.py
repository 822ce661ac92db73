"""The group-by-group sampler: one latent group after another, each from its own head, in one pass through the network.

Where f = Σ_i f_i and E[e^{f_i}] = 1 under p_β(z_i | z_<i) for every z_<i, as for density ratios of single groups
(`ebm_prior.training.groupwise`), the prior factorises in generation order:

    p_α(z) = Π_i p_β(z_i | z_<i) e^{f_i},   f_i a function of z_i, ε_i, mean_i and std_i.

So z_i can be drawn as soon as z_<i is: by resampling among draws of p_β(z_i | z_<i), then by steps of a Markov kernel
in ε_i. The gradient of such a step passes through one head and not through the network. For an f whose factors are not
normalised the result is Π_i p_β(z_i | z_<i) e^{f_i} / Z_i(z_<i), which is another density than p_α.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ebm_prior.compute.randomness import Generator, standard_normal
from ebm_prior.model.backbone import Backbone, Gaussian, Trace
from ebm_prior.model.samplers import Potential, Sampled, SamplerConfig, draw, norm

Own = Callable[[int, Tensor, Tensor, Gaussian], Tensor]
"""τ f_i in nats, (B,), from the group's index, z_i and ε_i (B, *group.shape), and p_β(z_i | z_<i)."""


def own_potential(own: Own, index: int, prior: Gaussian) -> Potential:
    """g(ε_i) = τ f_i at z_i = mean_i + std_i ε_i, for a list of the one group's ε, where z_<i is given by the `prior`."""
    return lambda eps: own(index, prior.mean + prior.std * eps[0], eps[0], prior)


@torch.no_grad()
def draw_by_group(
    backbone: Backbone, own: Own, fixed: Sequence[Tensor], size: int, sampler: SamplerConfig, generator: Generator
) -> tuple[Trace, Sampled]:
    """Draw the groups below the `fixed` ones, each by the `sampler` given those above: the traversal, and diagnostics.

    fixed: z of the first groups, a list of (B, *group.shape), which may be empty; B is the `size`. The diagnostics are
    those of the groups drawn: ε, acceptance and step size as means over them, the ESS as the smallest of theirs.
    """
    like, found = next(backbone.parameters()), list[Sampled]()

    def at(index: int, prior: Gaussian, context: Any) -> Tensor:
        if index < len(fixed):
            return fixed[index]
        shape = (size, *backbone.groups[index].shape)

        def propose() -> list[Tensor]:
            return [standard_normal(shape, generator, dtype=like.dtype, device=like.device)]

        found.append(draw(own_potential(own, index, prior), propose, sampler, generator))
        return torch.addcmul(prior.mean, prior.std, found[-1].eps[0])

    trace = backbone.trace(at, size)
    eps = [group for drawn in found for group in drawn.eps]
    acceptance, step_size = (torch.stack(each).mean(0) for each in zip(*((d.acceptance, d.step_size) for d in found)))
    least = torch.stack([drawn.ess_fraction for drawn in found]).amin(0)
    return trace, Sampled(eps, acceptance, norm(eps), least, step_size)
