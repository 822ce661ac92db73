"""Density ratios of single groups as the whole fit: a calibrated f from posterior passes alone, without chains.

The head of group i sees all that its conditional has: z_i, ε_i, mean_i and log std_i, and hears of the groups above it
(`ebm_prior.model.energy.Above`). It learns to tell a posterior z_i from a draw of p_β(z_i | z_<i) under the same
posterior z_<i, so that its optimum is f_i = log q(z_i | z_<i) − log p_β(z_i | z_<i), q being the aggregate posterior.
Then E[e^{f_i}] = 1 under p_β(z_i | z_<i) for every z_<i. So log Z of f = Σ_i f_i is 0, its gain is the whole of
KL(q ‖ p_β), and samples can be drawn group by group (`ebm_prior.model.by_group`). All of this holds group by group,
however deep the hierarchy is.

In the end each f_i is corrected on held-out latents. First it is tempered, by the factor that minimises its logistic
loss. Then log Z_i = log E[e^{f_i}], with z_<i from the posterior, is measured and subtracted. Where a group's prior is
some nats away from the posterior, hardly any draw of it has weight, and log Z_i is therefore measured by annealed
importance sampling (Neal 2001) from p_β(z_i | z_<i) to e^{f_i} p_β(z_i | z_<i), whose steps need one head and no pass
through the network. As log E[Z_i] ≥ E[log Z_i], the gain E_q[f_i] − log Z_i is not flattered by a Z_i that varies with
z_<i.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_prior.compute.randomness import Generator, Purpose, derived_generator, standard_normal
from ebm_prior.errors import DivergenceError
from ebm_prior.model.annealing import tempered_step
from ebm_prior.model.by_group import HeadsWalk, own_potential
from ebm_prior.model.energy import JointEnergy, values
from ebm_prior.model.samplers import Potential, effective_sample_size, start
from ebm_prior.training.course import Best, Course, Finished, Pairs
from ebm_prior.training.latents import split
from ebm_prior.training.objectives import Gain, gain

SCORE_STEP = 1e-3  # nats by which the held-out score must be better to count as better
LARGEST_TAU = 2.0
ANNEALED_IMAGES = 512  # held-out images at most whose z_<i log Z is measured with
ANNEALING_STEPS, ANNEALING_STEP_SIZE = 64, 0.3


class GroupwiseRatios(Course):
    """A density ratio for each group, of heads that see their own conditional; see the module."""

    def pairs(self, indices: Tensor, part: int, generator: torch.Generator) -> Pairs:
        positive, negative = self.bench.draws.own_conditionals(indices, generator)
        return Pairs(positive, negative, torch.ones_like(positive[0][0].flatten()[0]))

    def logits(self, inputs: list[Tensor]) -> Tensor:
        """f_i of each group, (2B, L): of B posterior draws, then of B negatives, with the posterior's groups above."""
        return _terms(self.bench.energy, inputs)

    def evaluate(self, iteration: int) -> tuple[dict[str, Any], Course]:
        """The held-out score, by which the best f is chosen, and the sum of the groups' gains by importance weights.

        The score is the logistic loss of f = 0 minus that of f, in nats, summed over groups. No ESS limits it.
        """
        f_q, f_p = self._held_out()
        score = float((2 * math.log(2) - F.softplus(-f_q).mean(0) - F.softplus(f_p).mean(0)).sum())
        gains = [gain(*pair) for pair in zip(f_q.T, f_p.T, strict=True)]
        nats = math.fsum(each.nats for each in gains)
        if not math.isfinite(score + nats):
            raise DivergenceError(f"the held-out logistic loss is not finite at iteration {iteration}")
        if score > self.best.gain + SCORE_STEP:
            self.best = Best(score, iteration, copy.deepcopy(self.bench.average.state_dict()))
        return {"gain": nats, "ess_fraction": min(each.ess_fraction for each in gains), "score": score}, self

    def finish(self) -> Finished:
        """Temper each group, set its log Z to 0, and record what was found of it."""
        average, names = self.bench.average, self.bench.average.names
        average.load_state_dict(self.best.energy)
        f_q, f_p = self._held_out()
        taus = [calibration(*pair) for pair in zip(f_q.T, f_p.T, strict=True)]
        for index, tau in enumerate(taus):
            average.correct(index, tau, 0.0)
        groups = []
        for index, (tau, found) in enumerate(zip(taus, self._normalisers(), strict=True)):
            average.correct(index, 1.0, -found.log_z)
            nats = tau * float(f_q[:, index].mean()) - found.log_z
            groups.append({"name": names[index], "tau": tau, "gain": nats, **found._asdict()})
        total = Gain(math.fsum(each["gain"] for each in groups), min(each["ess_fraction"] for each in groups), 1.0)
        return Finished(total, total, groups=groups)

    def _held_out(self) -> tuple[Tensor, Tensor]:
        """f_i at held-out posterior latents, (N, L), and at draws of p_β(z_i | z_<i), (N, L), in float64."""
        held_out, count = self.bench.held_out, len(self.bench.average.names)

        def both(chunk: Sequence[Tensor]) -> Tensor:
            joined = [torch.cat(pair) for pair in zip(chunk[:count], chunk[count:], strict=True)]
            return torch.cat(_terms(self.bench.average, joined).chunk(2), dim=1)

        found = values(both, [*held_out.posterior, *held_out.prior], self.bench.device).double()
        return found[:, :count], found[:, count:]

    @torch.no_grad()
    def _normalisers(self) -> list[Normaliser]:
        """log Z_i of each group of the average, over the z_<i of held-out posterior latents."""
        draws, average = self.bench.draws, self.bench.average
        _, held_out = split(draws.backbone, draws.images, self.config)

        def weights(batch: tuple[int, Tensor]) -> Tensor:
            generator = derived_generator(
                self.config.seed, Purpose.GROUP_NORMALISERS, batch[0], device=self.bench.device
            )
            trace = draws.traced(batch[1], generator)
            walk, columns = HeadsWalk(average), []
            for index, (z, eps, prior) in enumerate(zip(trace.z, trace.eps, trace.priors, strict=True)):
                columns.append(annealed_weights(own_potential(walk, index, prior), z, generator))
                walk.go_on(index, z, eps, prior)
            return torch.stack(columns, dim=1).double().cpu()

        batches = enumerate(torch.split(held_out[:ANNEALED_IMAGES], self.config.batch_size // self.config.parts))
        return [Normaliser.of(column) for column in torch.cat(draws.processes.map(weights, list(batches))).T]


def _terms(energy: JointEnergy, inputs: Sequence[Tensor]) -> Tensor:
    """f_i, (2B, L), of B positives followed by B negatives z_i' whose groups above are those of the positives."""
    rows = torch.arange(len(inputs[0]) // 2, device=inputs[0].device).repeat(2)
    return energy.terms(inputs, rows)


class Normaliser(NamedTuple):
    """log Z of one group, as annealed importance sampling found it before it was set to 0."""

    log_z: float  # nats
    log_z_error: float  # its standard error
    ess_fraction: float  # of the annealed weights

    @classmethod
    def of(cls, log_weights: Tensor) -> Normaliser:
        """From log weights (N,)."""
        n, share = len(log_weights), float(effective_sample_size(log_weights)) / len(log_weights)
        error = math.sqrt(max(0.0, 1 / share - 1) / n)
        return cls(float(log_weights.logsumexp(0)) - math.log(n), error, share)


def annealed_weights(potential: Potential, like: Tensor, generator: Generator) -> Tensor:
    """Log weights (B,) of annealed importance sampling: the mean of their exponentials estimates E[e^{g(ε)}].

    ε ~ N(0, I) is of the shape and type of `like`, (B, *shape). Between the densities e^{τg} N(ε; 0, I), with τ in
    equal steps, it moves by a step of pCN-Langevin.
    """
    eps = standard_normal(like.shape, generator, dtype=like.dtype, device=like.device)
    state = start(potential, [eps])
    weights, step_size = torch.zeros_like(state.value), torch.full_like(state.value, ANNEALING_STEP_SIZE)
    for step in range(1, ANNEALING_STEPS + 1):
        weights += state.value / ANNEALING_STEPS
        if step < ANNEALING_STEPS:
            state, _ = tempered_step(state, potential, step / ANNEALING_STEPS, step_size, generator)
    return weights


def calibration(f_q: Tensor, f_p: Tensor) -> float:
    """The τ in [0, `LARGEST_TAU`] with the least logistic loss of τf, from f at positives (N,) and negatives (M,).

    The loss is convex in τ; τ is found by bisection on its slope. τ = 0 leaves the backbone's own prior.
    """

    def slope(tau: float) -> float:
        return float((f_p * (tau * f_p).sigmoid()).mean() - (f_q * (-tau * f_q).sigmoid()).mean())

    low, high = 0.0, LARGEST_TAU
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low
