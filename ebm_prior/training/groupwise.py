"""Density ratios of single groups as the whole fit: a calibrated f from posterior passes alone, without chains.

The head of group i sees all that its conditional has: z_i, ε_i, mean_i and log std_i, and hears of the groups above it
(`ebm_prior.model.energy.Above`). It learns to tell a posterior z_i from a draw of p_β(z_i | z_<i) under the same
posterior z_<i, so that its optimum is f_i = log q(z_i | z_<i) − log p_β(z_i | z_<i), q being the aggregate posterior.
Then E[e^{f_i}] = 1 under p_β(z_i | z_<i) for every z_<i. So log Z of f = Σ_i f_i is 0, its gain is the whole of
KL(q ‖ p_β), and samples can be drawn group by group (`ebm_prior.model.by_group`). All of this holds group by group,
however deep the hierarchy is.

In the end each f_i is corrected on held-out latents, by likelihood. Annealed importance sampling (Neal 2001) from
p_β(z_i | z_<i) to e^{τ f_i} p_β(z_i | z_<i), with z_<i from the posterior, gives log Z_i(τ) = log E[e^{τ f_i}] along a
path of τ; its steps need one head and no pass through the network. f_i becomes τ f_i − log Z_i(τ) at the τ with the
largest gain τ E_q[f_i] − log Z_i(τ). There the slope E_q[f_i] − E_τ[f_i] is 0, so that f has the same mean over draws
as over posterior latents. The logistic loss would choose another τ: it is decided where posterior and prior overlap,
and a group with a gain of 10 nats has hardly any prior draw (one of e^10) where f says that most posterior latents are.
For the same reason log Z_i before its correction is some tenths of a nat to some nats from 0 in such groups. As
log E[Z_i] ≥ E[log Z_i], the gain is not flattered by a Z_i that varies with z_<i.
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
from ebm_prior.model.samplers import TARGET_ACCEPTANCE, Potential, effective_sample_size, start
from ebm_prior.training.course import Best, Course, Finished, Pairs
from ebm_prior.training.latents import split
from ebm_prior.training.objectives import Gain, gain

SCORE_STEP = 1e-3  # nats by which the held-out score must be better to count as better
LEAST_GAIN = 0.01  # nats; a group with less keeps p_β(z_i | z_<i), so that drawing it costs nothing
ANNEALED_IMAGES = 512  # held-out images at most whose z_<i log Z is measured with
LARGEST_TAU, ANNEALING_STEPS = 2.0, 96  # end of the path from τ = 0, and the number of equal steps to it
ANNEALING_STEP_SIZE, ANNEALING_ADAPTATION = 0.5, 0.3  # δ at first; change of log δ by a batch's mean acceptance


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
        average = self.bench.average
        average.load_state_dict(self.best.energy)
        f_q, groups = self._held_out()[0].mean(0).tolist(), []
        for index, (name, mean, weights) in enumerate(zip(average.names, f_q, self._annealed(), strict=True)):
            found = likeliest(mean, weights, self.config.ess_floor)
            average.correct(index, found.tau, -found.log_z)
            groups.append({"name": name, **found._asdict()})
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
    def _annealed(self) -> list[Tensor]:
        """`annealed_weights` of each group of the average, over the z_<i of held-out posterior latents."""
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
            return torch.stack(columns, dim=2).double().cpu()

        batches = enumerate(torch.split(held_out[:ANNEALED_IMAGES], self.config.batch_size // self.config.parts))
        return list(torch.cat(draws.processes.map(weights, list(batches))).unbind(2))


def _terms(energy: JointEnergy, inputs: Sequence[Tensor]) -> Tensor:
    """f_i, (2B, L), of B positives followed by B negatives z_i' whose groups above are those of the positives."""
    rows = torch.arange(len(inputs[0]) // 2, device=inputs[0].device).repeat(2)
    return energy.terms(inputs, rows)


class Tempered(NamedTuple):
    """The factor τ of one group's f, and what is known of τf before log Z is subtracted from it."""

    tau: float
    gain: float  # nats: τ E_q[f] − log Z
    log_z: float  # nats: log E[e^{τf}] under p_β(z_i | z_<i)
    log_z_error: float  # its standard error
    ess_fraction: float  # effective sample size of the annealed weights / their number


def likeliest(f_q: float, log_weights: Tensor, ess_floor: float = 0.05) -> Tempered:
    """τf with the largest gain among the τ of the path whose ESS is above the floor; τ = 0 is the backbone's own prior.

    A gain below `LEAST_GAIN` counts as none.
    f_q: mean of f at posterior latents.  log_weights: (N, `ANNEALING_STEPS`) of `annealed_weights`.
    """
    n, found = len(log_weights), list[Tempered]()
    shares = effective_sample_size(log_weights.T) / n
    for step, (log_sum, share) in enumerate(zip(log_weights.logsumexp(0).tolist(), shares.tolist(), strict=True), 1):
        tau, log_z = LARGEST_TAU * step / ANNEALING_STEPS, log_sum - math.log(n)
        found.append(Tempered(tau, tau * f_q - log_z, log_z, math.sqrt(max(0.0, 1 / share - 1) / n), share))
    enough = [each for each in found if each.ess_fraction >= ess_floor and each.gain >= LEAST_GAIN]
    return max(enough, key=lambda each: each.gain, default=Tempered(0.0, 0.0, 0.0, 0.0, 1.0))


def annealed_weights(potential: Potential, like: Tensor, generator: Generator) -> Tensor:
    """Log weights (B, `ANNEALING_STEPS`) of annealed importance sampling along τ from 0 to `LARGEST_TAU`.

    The mean of the exponentials of a column estimates E[e^{τ g(ε)}], with ε ~ N(0, I) of the shape and type of `like`,
    (B, *shape). Between the densities e^{τ g} N(ε; 0, I) it moves by a step of pCN-Langevin, whose size follows the
    acceptance.
    """
    eps = standard_normal(like.shape, generator, dtype=like.dtype, device=like.device)
    state, columns = start(potential, [eps]), []
    weights, step_size = torch.zeros_like(state.value), torch.full_like(state.value, ANNEALING_STEP_SIZE)
    for step in range(1, ANNEALING_STEPS + 1):
        weights = weights + state.value * (LARGEST_TAU / ANNEALING_STEPS)
        columns.append(weights)
        tau = LARGEST_TAU * step / ANNEALING_STEPS
        state, info = tempered_step(state, potential, tau, step_size, generator)
        move = ANNEALING_ADAPTATION * (info.acceptance.mean() - TARGET_ACCEPTANCE)
        step_size = (step_size * move.exp()).clamp(max=2.0)
    return torch.stack(columns, dim=1)
