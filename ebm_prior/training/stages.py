"""Staged density ratios, for a prior hole that is too wide for a single ratio.

With tens of latent groups a classifier separates posterior from prior latents almost perfectly. Its density ratio then
saturates: a few draws hold all importance weight, and the ratio cannot be calibrated. Here the ratio is learned in
stages instead. The negatives of stage k are draws of the prior fitted so far, p_k ∝ exp(f_k) p_β with f_0 = 0. The
logit is f − f_k, and its optimum is log q − log p_k (Rhodes et al. 2020). The heads keep their weights from stage to
stage.

A stage ends when the effective sample size (ESS) of the weights exp(f − f_k) has fallen to half the number of draws.
Then f becomes f_{k+1}, the draws are resampled by these weights, and Hamiltonian Monte Carlo, which leaves p_{k+1}
invariant, moves them on. Single leapfrog steps would not carry the draws to the regions where f is too high. This is a
sequential Monte Carlo sampler (Del Moral et al. 2006) with a target that is learned on the way. The total gain is the
sum of the stages' gains, Σ_k E_q[f_{k+1} − f_k] − log E_{p_k}[exp(f_{k+1} − f_k)], each estimated at a large ESS.

Stages do not begin from nothing. First each group learns its own ratio, of a posterior z_i against a draw of
p_β(z_i | z_<i) under the same z_<i. This needs no chains and is fast, because such a ratio does not saturate. With the
sum f of these ratios, stages go along τ f from τ = 0 as long as each brings enough gain. Then all groups learn
together.

f is accurate only near latents seen in training. Elsewhere heads extrapolate, and chains that run longer than those in
training find the places where f is too high, and stay there. Two things prevent it: the heads' inputs are bounded, and
f is clipped at its 99th percentile over held-out posterior latents. The gains of successive stages are measured on the
same held-out draws, which do not forget fully in between, so their sum is optimistic by a few per cent for many stages.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.randomness import BLOCK
from ebm_prior.errors import SettingError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import JointEnergy, values
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import (
    TARGET_ACCEPTANCE,
    SamplerConfig,
    effective_sample_size,
    graphed,
    pcn_langevin_step,
    run_chain,
    start,
)
from ebm_prior.settings import require, require_kinds, require_not_negative, require_positive, require_shares, setting
from ebm_prior.training.objectives import Gain, gain
from ebm_prior.training.resume import require_shapes

COLD_STEPS = 16  # pCN-Langevin steps from p_β to p_k, each of `leapfrogs`
HALVINGS = 10  # largest number of halvings of a stage's step
DRAW_BYTES = 2**31  # largest device memory for the draws; if it is too small, both kinds of draws are reduced alike
ADAPTATION = 0.1  # change of the log step size per call and unit of acceptance; slow compared with the chains
CEILING_QUANTILE = 0.99  # quantile of f over held-out posterior latents at which the finished f is clipped
BOUND_PER_SPREAD = 2.0  # least bound of the heads' inputs, in RMS of p_β's draws, so that f still distinguishes these


@dataclass(frozen=True)
class StageConfig:
    """Settings of the stages: the draws of the prior so far, how they move, and when a stage ends."""

    particles: int = setting(512, "Draws of the prior fitted so far, which serve as the negatives of a stage")
    held_out: int = setting(
        256, "Extra draws that are never trained on; their effective sample size decides when a stage ends"
    )
    moves: int = setting(1, "pCN-Langevin moves that a draw makes before it serves as a negative")
    leapfrogs: int = setting(5, "Leapfrog steps in each pCN-Langevin move of a draw")
    settle: int = setting(2, "Moves of every draw between two stages, so that the draws forget the earlier stage")
    step_size: float = setting(0.06, "Initial step size δ of the moves, which later follows their acceptance rate")
    ess: float = setting(0.5, "Effective sample size, as a share of the held-out draws, at which a stage ends")
    every: int = setting(2, "Iterations between two checks of the effective sample size")
    bound: float = setting(3.0, "Least bound of the heads' inputs, in posterior standard deviations; 0: no bound")
    groupwise: float = setting(0.4, "Share of the iterations in which each latent group first learns its own ratio")

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "particles", "held_out", "moves", "leapfrogs", "settle", "every")
        require(self, "step_size", 0 < self.step_size <= 2, "must be in (0, 2]")
        require(self, "ess", 0 < self.ess < 1, "must be in (0, 1)")
        require_shares(self, "groupwise")
        require_not_negative(self, "bound")

    def suited(self, backbone: Backbone, parts: int) -> StageConfig:
        """These settings with no more draws than `DRAW_BYTES` hold.

        Raises SettingError where there are then fewer draws than `parts` of a batch.
        """
        dimensions = sum(math.prod(group.shape) for group in backbone.groups)
        suited = self.at_most(DRAW_BYTES // (dimensions * next(backbone.parameters()).dtype.itemsize))
        if suited.particles < parts:
            fits = f"must be at most {suited.particles}, as no more draws of a stage fit in memory for such latents"
            raise SettingError("parts", f"{fits}, found {parts}")
        return suited

    def at_most(self, draws: int) -> StageConfig:
        """These settings with at most `draws` draws in all, reduced in proportion, but at least one of each kind."""
        share = min(1.0, draws / (self.particles + self.held_out))
        return replace(self, particles=max(1, int(share * self.particles)), held_out=max(1, int(share * self.held_out)))


def draws_at_once(rows: int, device: torch.device) -> int:
    """The number of draws that move together, for parts of `rows` draws: all of them on a GPU, else at most a block."""
    return rows if device.type == "cuda" else min(rows, BLOCK)


class MovedDraws(NamedTuple):
    """Draws that have moved and are not yet stored (`Stages.put_back`)."""

    rows: Tensor  # (n,) int64: their indices among all draws
    eps: list[Tensor]  # (n, *group.shape)
    acceptance: Tensor  # (n,), the mean over their moves


class Clipping(NamedTuple):
    """The effect of clipping f_k to min(f_k, ceiling). Clipping acts like one more stage: it changes gain and log Z."""

    ceiling: float  # nats
    gain: Gain
    log_z: float  # nats


class Stages:
    """Draws of p_k in ε-space that follow f from stage to stage; the last `held_out` of them are never trained on."""

    def __init__(
        self,
        backbone: Backbone,
        energy: JointEnergy,
        config: StageConfig,
        generator: torch.Generator,
        *,
        at_once: int,
    ) -> None:
        """Draw from p_0 = p_β. `energy`: heads with f_0 = 0. `at_once`: the number of draws that move together."""
        self.backbone, self.config = backbone, config
        self.eps = backbone.standard_normal(self.config.particles + self.config.held_out, generator=generator)
        self.reference = copy.deepcopy(energy).eval().requires_grad_(False)  # f_k; its weights are replaced in place
        self.at_once = at_once
        self._potential = graphed(EBMPrior(backbone, self.reference).potential, self.eps[0].device)
        self.step_size = config.step_size
        self.rate = 1.0  # factor on the learning rate: halved by a rejected stage, doubled, up to 1, by an accepted one
        self.done: list[dict[str, float]] = []  # for each accepted stage: last iteration, gain and log Z in nats, ESS
        self._show_held_out()

    @property
    def gain(self) -> float:
        """The gain of the prior so far, E_q[f_k] − log Z_k in nats: the sum over its stages."""
        return math.fsum(stage["gain"] for stage in self.done)

    @property
    def log_z(self) -> float:
        """The normaliser of the prior so far, log E_{p_β}[e^{f_k}] in nats: the sum over its stages."""
        return math.fsum(stage["log_z"] for stage in self.done)

    @property
    def sampler(self) -> SamplerConfig:
        """A sampler of p_k: chains that start from p_β, with the adapted step size, and no resampling of proposals.

        The importance weights from p_β to p_k would be too uneven for resampling.
        """
        return SamplerConfig(proposals=1, steps=COLD_STEPS, step_size=self.step_size, leapfrogs=self.config.leapfrogs)

    def moved(self, n: int, generator: torch.Generator, *, part: int = 0, parts: int = 1) -> MovedDraws:
        """Move at most n draws of p_k, chosen from part `part` of `parts`, and return them; `put_back` stores them."""
        own = torch.arange(self.config.particles, device=self.eps[0].device)[part::parts]
        rows = own[torch.randperm(len(own), generator=generator, device=own.device)[:n]]
        return self._move(rows, self.config.moves, generator)

    def put_back(self, moved: Sequence[MovedDraws]) -> None:
        """Store moved draws in their places, and adapt the step size to their acceptance."""
        for rows, eps, _ in moved:
            for group, new in zip(self.eps, eps, strict=True):
                group[rows] = new
        if self.done:  # under p_0 = p_β every step is accepted, so there is nothing to adapt to
            acceptance = float(torch.cat([part.acceptance for part in moved]).mean())
            self.step_size = min(2.0, self.step_size * math.exp(ADAPTATION * (acceptance - TARGET_ACCEPTANCE)))

    def ess_fraction(self, energy: JointEnergy) -> float:
        """The effective sample size of the weights exp(f − f_k) as a share of the held-out draws; f is `energy`."""
        weights = self._log_weights(energy)
        return float(effective_sample_size(weights)) / len(weights)

    @torch.no_grad()
    def temper(self, energy: JointEnergy) -> None:
        """Move the weights of `energy` halfway towards those of f_k, repeatedly, until its ESS is large enough.

        Large enough is half of the ESS at which stages end. `energy` is changed in place.
        """
        for _ in range(HALVINGS):
            if self.ess_fraction(energy) >= 0.5 * self.config.ess:
                return
            for new, old in zip(energy.parameters(), self.reference.parameters(), strict=True):
                new.lerp_(old, 0.5)

    def next_tau(self, goal: JointEnergy, tau: float) -> float:
        """The next τ of stages along τ · `goal`, from f_k = `tau` · `goal`: the largest with a sufficient ESS."""
        f, target = values(goal, self._held_out, self.eps[0].device), self.config.ess * self.config.held_out
        low, high = 0.0, 1.0 - tau
        if float(effective_sample_size(high * f)) >= target:
            return 1.0
        for _ in range(20):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if float(effective_sample_size(middle * f)) >= target else (low, middle)
        return tau + low

    def gain_of(self, energy: JointEnergy, positive: Sequence[Tensor]) -> tuple[Gain, float]:
        """The gain of a stage that ends with f = `energy`, E_q[f − f_k] − log E_{p_k}[exp(f − f_k)], with its error.

        `positive`: held-out posterior latents as the heads see them.
        """
        r_q, r_p = log_ratio(energy, self.reference, positive), self._log_weights(energy)
        found = gain(r_q, r_p)
        # Relative variance of the mean weight, (1/ESS share − 1)/n; clamped, since rounding can put the share above 1.
        relative = max(0.0, 1 / found.ess_fraction - 1) / len(r_p)
        return found, math.sqrt(float(r_q.var(correction=0)) / len(r_q) + relative)

    def clipped(self, positive: Sequence[Tensor]) -> Clipping:
        """Clip f_k at its `CEILING_QUANTILE` over `positive`, held-out posterior latents as the heads see them."""
        device = self.eps[0].device
        f_q, f_p = (values(self.reference, seen, device).double() for seen in (positive, self._held_out))
        ceiling = float(f_q.quantile(CEILING_QUANTILE))
        r_q, r_p = (f.clamp(max=ceiling) - f for f in (f_q, f_p))
        return Clipping(ceiling, gain(r_q, r_p), float(r_p.logsumexp(0)) - math.log(len(r_p)))

    def advance(
        self,
        energy: JointEnergy,
        found: Gain,
        iteration: int,
        generators: Sequence[torch.Generator],
        processes: Processes = ALONE,
    ) -> None:
        """End the stage: f_{k+1} is `energy`, and `found` its gain at `iteration`.

        The draws are resampled by their weights, the held-out ones apart, and then settle in as many parts as there are
        `generators`; the `processes` share the parts.
        """
        count, held_out = self.config.particles, self._log_weights(energy)
        weights = log_ratio(energy, self.reference, self._seen([e[:count] for e in self.eps]))
        log_z = float(held_out.double().logsumexp(0)) - math.log(len(held_out))
        rows, device = [], self.eps[0].device
        for first, part in ((0, weights), (count, held_out)):
            rows.append(first + _systematic(part.double().softmax(0).to(device), generators[0]))
        self.eps = [e[torch.cat(rows)] for e in self.eps]
        self.reference.load_state_dict(energy.state_dict())
        self.rate = min(1.0, 2 * self.rate)

        def settled(part: int) -> MovedDraws:
            own = torch.arange(len(self.eps[0]), device=device)[part :: len(generators)]
            return self._move(own, self.config.settle, generators[part])

        self.put_back(processes.map(settled, range(len(generators))))
        stage = {"iteration": iteration, "gain": found.nats, "log_z": log_z, "ess_fraction": found.ess_fraction}
        self.done.append(stage)
        self._show_held_out()

    def reject(self) -> None:
        """Repeat the stage at half the learning rate. The optimizer keeps its moments: fresh ones cause a leap."""
        self.rate *= 0.5

    def state(self) -> dict[str, Any]:
        """Everything that changes, for a resume: tensors and plain values, not copied."""
        return {
            "eps": self.eps,
            "reference": self.reference.state_dict(),
            "step_size": self.step_size,
            "rate": self.rate,
            "done": self.done,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        require_shapes("stages.eps", state["eps"], [old.shape for old in self.eps])
        self.eps = [e.to(old.device) for e, old in zip(state["eps"], self.eps, strict=True)]
        self.reference.load_state_dict(state["reference"])
        self.step_size, self.rate, self.done = state["step_size"], state["rate"], state["done"]
        self._show_held_out()

    def _move(self, rows: Tensor, steps: int, generator: torch.Generator) -> MovedDraws:
        """Move the draws `rows` under p_k by `steps` pCN-Langevin steps."""
        eps, accepted = [], []
        for chunk in torch.split(rows, self.at_once):
            state, acceptance, _ = run_chain(
                partial(pcn_langevin_step, leapfrogs=self.config.leapfrogs),
                start(self._potential, [e[chunk] for e in self.eps]),
                self._potential,
                steps,
                step_size=torch.full((len(chunk),), self.step_size, dtype=self.eps[0].dtype, device=rows.device),
                generator=generator,
            )
            eps.append(state.eps)
            accepted.append(acceptance)
        return MovedDraws(rows, [torch.cat(group) for group in zip(*eps, strict=True)], torch.cat(accepted))

    def _show_held_out(self) -> None:
        self._held_out = self._seen([e[self.config.particles :] for e in self.eps])

    def _log_weights(self, energy: JointEnergy) -> Tensor:
        return log_ratio(energy, self.reference, self._held_out)

    @torch.no_grad()
    def _seen(self, eps: Sequence[Tensor]) -> list[Tensor]:
        """The latents T_β(ε) of ε, lists of (n, *group.shape), as the heads see them."""
        parts = []
        for chunk in zip(*(torch.split(e, BLOCK) for e in eps), strict=True):
            trace = self.backbone.transform(chunk)
            parts.append(self.reference.inputs(trace.z, chunk, trace.priors))
        return [torch.cat(group) for group in zip(*parts, strict=True)]


def log_ratio(energy: JointEnergy, reference: JointEnergy, inputs: Sequence[Tensor]) -> Tensor:
    """The logit f − f_k of many latents as the heads see them, (N,) on the CPU; f_k is `reference`."""
    device = next(energy.parameters()).device
    return values(energy, inputs, device) - values(reference, inputs, device)


def _systematic(chances: Tensor, generator: torch.Generator) -> Tensor:
    """Systematic resampling: N indices by their `chances` (N,), each as often as expected, up to rounding."""
    n = len(chances)
    first = torch.rand(1, generator=generator, device=chances.device, dtype=chances.dtype)
    points = (first + torch.arange(n, device=chances.device)) / n
    return torch.searchsorted(chances.cumsum(0), points).clamp(max=n - 1)
