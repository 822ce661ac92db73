"""The courses that a fit can take; each defines the negatives, what the heads learn, and which f is the best.

    OneRatio            one density ratio of posterior to prior latents        -> GroupRatios, if it saturates
    GroupRatios         a density ratio for each latent group alone            -> StagedRatios, after a fixed time
    StagedRatios        ratios of the posterior to the prior fitted so far, in stages
    GroupwiseRatios     a density ratio for each group as the whole fit (`groupwise`)
    MaximumLikelihood   Langevin chains of the current prior (Eqs. 10, 17)

`first_course` makes the first course from the settings, `resumed` the course of a saved state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ebm_prior.compute.randomness import Purpose, derived_generator
from ebm_prior.errors import DivergenceError
from ebm_prior.model.drawing import draw
from ebm_prior.model.energy import JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig, graphed, norm, where
from ebm_prior.training.course import Best, Course, Finished, JointDraws, Pairs, Workbench
from ebm_prior.training.fit_config import FitConfig
from ebm_prior.training.groupwise import GroupwiseRatios
from ebm_prior.training.objectives import Gain, mle_loss
from ebm_prior.training.resume import require_shapes
from ebm_prior.training.stages import BOUND_PER_SPREAD, MovedDraws, Stages, draws_at_once
from ebm_prior.training.steps import FIT_NORM_LIMIT

GAIN_STEP = 1e-3  # nats by which a held-out gain must be better to count as better
GAIN_DROP_LIMIT = 20.0  # nats that the held-out gain may fall below its best, if tempering does not help either
PROBATION = 0.25  # share of the iterations within which stages may replace a ratio that saturates
SATURATED_SHARE = 0.1  # an ESS below this share of the ESS floor counts as saturated: tempering would lose most of f
SATURATED_DRAWS = 4.0  # an ESS below 4 draws counts as saturated, however small the held-out set
TYPICAL_IMAGES, TYPICAL_SPREAD = 256, 3.0  # images and standard deviations that bound the typical set of chains
ANNEALING_GAIN = 1.0  # least gain, in nats, of a stage along a known f; a smaller one is left to the learned stages


class _OneEnergy(JointDraws):
    """Base of the courses that learn one f throughout and temper it at the end."""

    def __init__(self, bench: Workbench, config: FitConfig, iteration: int = 0) -> None:
        super().__init__(bench, config, iteration)
        bench.squash(config.energy.bound)

    def evaluate(self, iteration: int) -> tuple[dict[str, Any], Course]:
        plain, tempered = self._gains(iteration)
        self._keep_if_better(tempered, iteration)
        return _shown(plain, tempered), self

    def finish(self) -> Finished:
        self.bench.average.load_state_dict(self.best.energy)
        plain, tempered = self.bench.held_out.gains(self.bench.average, self.config.ess_floor)
        if self.config.regime != "calibrated":  # a refiner is kept as it is
            return Finished(plain, plain)
        return Finished(plain, tempered, narrow=self._narrow(plain))

    def _gains(self, iteration: int) -> tuple[Gain, Gain]:
        """The held-out gains of f and of τ f. Raises DivergenceError where both have fallen far below the best."""
        plain, tempered = self.bench.held_out.gains(self.bench.average, self.config.ess_floor)
        best = self.best.gain
        fell = plain.nats < best - GAIN_DROP_LIMIT and tempered.nats < 0.5 * best
        if not math.isfinite(plain.nats) or (fell and self.config.regime == "calibrated"):
            raise DivergenceError(f"the held-out gain fell to {plain.nats:.3g} nats at iteration {iteration}")
        return plain, tempered

    def _keep_if_better(self, tempered: Gain, iteration: int) -> None:
        """Keep the average as the best f if its gain is better. A refiner has no such gain: its last f is the best."""
        if self.config.regime != "calibrated" or tempered.nats > self.best.gain + GAIN_STEP:
            self.best = Best(tempered.nats, iteration, copy.deepcopy(self.bench.average.state_dict()))

    def _narrow(self, plain: Gain) -> bool:
        """Whether a few held-out draws hold nearly all importance weight."""
        draws = len(self.bench.held_out.prior[0])
        return plain.ess_fraction * draws < max(SATURATED_SHARE * self.config.ess_floor * draws, SATURATED_DRAWS)


class OneRatio(_OneEnergy):
    """Noise-contrastive estimation against ancestral draws of the backbone; hands over to stages if it saturates."""

    def negatives(self, n: int, part: int, generator: torch.Generator) -> tuple[list[Tensor], None]:
        return self.bench.draws.backbone.standard_normal(n, generator=generator), None

    def evaluate(self, iteration: int) -> tuple[dict[str, Any], Course]:
        plain, tempered = self._gains(iteration)
        if self._saturates(plain, iteration):
            remark = f"one density ratio saturates (ESS {plain.ess_fraction:.2%}): now in stages"
            return {"remark": remark, **_shown(plain, tempered)}, self.hand_over(plain, iteration)
        self._keep_if_better(tempered, iteration)
        return _shown(plain, tempered), self

    def hand_over(self, plain: Gain, iteration: int) -> Course:
        """The course that begins again in stages, with untrained heads. `plain`: the held-out gain that saturated."""
        saturated = {"iteration": iteration, "ess_fraction": plain.ess_fraction}
        self.bench.load(self.bench.untrained)
        return staged(self.bench, self.config.staging(iteration), iteration, saturated)

    def finish(self) -> Finished:
        return super().finish()._replace(stages=[])

    def _saturates(self, plain: Gain, iteration: int) -> bool:
        """Whether one ratio has saturated. Only decided early in a fit, while there is time left for stages."""
        config = self.config
        early = iteration <= max(PROBATION * config.iterations, config.evaluate_every)
        left = iteration < config.iterations and config.iterations // 3 >= config.warmup
        return config.may_stage and early and left and self._narrow(plain)


class MaximumLikelihood(_OneEnergy):
    """Maximum likelihood, whose negatives are Langevin chains in ε-space under the current prior (Eqs. 10, 17)."""

    def __init__(self, bench: Workbench, config: FitConfig, iteration: int = 0) -> None:
        super().__init__(bench, config, iteration)
        self.chains: list[Tensor] = []  # ε at the ends of persistent chains
        self._sampled = copy.deepcopy(bench.average)  # f that chains sample; its weights are replaced in place
        current = EBMPrior(bench.draws.backbone, self._sampled, regime=config.regime, target=config.target)
        self._potential = graphed(current.potential, bench.device)
        self.norm_limit = self._norm_limit()
        self.chain = config.chain
        if config.refuse and config.regime == "refiner" and not self.chain.norm_limit:
            self.chain = replace(self.chain, norm_limit=self._chain_limit())

    @property
    def sampler(self) -> SamplerConfig:
        found = super().sampler
        if self.config.regime == "refiner":  # it samples as it was trained
            found = self.config.sampler.of(replace(found, norm_limit=self.chain.norm_limit))
        return found

    def negatives(self, n: int, part: int, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Run the Langevin chains for maximum likelihood: new ones, or this part's persistent ones."""
        config = self.config

        def propose() -> list[Tensor]:
            return self.bench.draws.backbone.standard_normal(n, generator=generator)

        self._sampled.load_state_dict(self.bench.energy.state_dict())
        if config.chains == "fresh":
            return draw(self._potential, propose, self.chain, generator).eps, []
        initial = propose()
        if self.chains:  # continue from the last step, except for a share that starts again
            restart = torch.rand(n, generator=generator, device=self.bench.device) < config.refresh
            initial = where(restart, initial, [chains.chunk(config.parts)[part] for chains in self.chains])
        first = iter([initial])  # a chain that is refused begins anew from p_β
        ends = draw(self._potential, lambda: next(first, None) or propose(), self.chain, generator).eps
        return ends, ends

    def loss(self, f_q: Tensor, f_p: Tensor) -> Tensor:
        return mle_loss(f_q, f_p, penalty=self.config.penalty)

    def after(self, kept: Sequence[list[Tensor]], iteration: int) -> Course:
        self.chains = [torch.cat(group) for group in zip(*kept, strict=True)]
        return self

    def state(self) -> dict[str, Any]:
        return super().state() | {"chains": self.chains}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if state["chains"]:
            shapes = [(self.config.batch_size, *group.shape) for group in self.bench.draws.backbone.groups]
            require_shapes("chains", state["chains"], shapes)
        self.chains = [chains.to(self.bench.device) for chains in state["chains"]]

    def _norm_limit(self) -> float:
        """The largest mean ‖ε‖/√D allowed in a batch: a multiple of the posterior's plus 4 standard errors."""
        config, draws = self.config, self.bench.draws
        dimensions = sum(math.prod(group.shape) for group in draws.backbone.groups)
        generator = derived_generator(config.seed, Purpose.TYPICAL_NORM, device=self.bench.device)
        with torch.no_grad():
            observed = draws.observed(self.bench.training[: config.batch_size // config.parts], generator)
            typical = norm(draws.backbone.infer(observed, generator=generator).eps).mean()
        return FIT_NORM_LIMIT * max(1.0, float(typical)) + 4 / math.sqrt(2 * dimensions * config.batch_size)

    def _chain_limit(self) -> float:
        """The largest ‖ε‖/√D of a chain that is kept: `TYPICAL_SPREAD` standard deviations above the posterior's mean.

        Neither the mean nor the standard deviation is taken to be smaller than that of N(0, I).
        """
        groups = self.bench.draws.backbone.groups
        least = 1 / math.sqrt(2 * sum(math.prod(group.shape) for group in groups))
        norms = self.bench.draws.norms(self.bench.training[:TYPICAL_IMAGES]).double()
        return max(1.0, float(norms.mean())) + TYPICAL_SPREAD * max(least, float(norms.std(correction=0)))


class StagedRatios(JointDraws):
    """Density ratios in stages, against draws of the prior fitted so far (`ebm_prior.training.stages`)."""

    def __init__(
        self,
        bench: Workbench,
        config: FitConfig,
        iteration: int,
        stages: Stages,
        saturated: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(bench, config, iteration)
        self.stages, self.saturated = stages, saturated

    @property
    def rate(self) -> float:
        return self.stages.rate

    @property
    def together(self) -> int:
        """The iteration at which the groups begin to learn together. Before it, each learns its own ratio."""
        groupwise = self.config.stage.groupwise if self.bench.energy.per_group else 0.0
        return self.since + int(groupwise * (self.config.iterations - self.since))

    @property
    def sampler(self) -> SamplerConfig:
        return self.config.sampler.of(self.stages.sampler)

    def negatives(self, n: int, part: int, generator: torch.Generator) -> tuple[list[Tensor], MovedDraws]:
        moved = self.stages.moved(n, generator, part=part, parts=self.config.parts)
        return moved.eps, moved

    def logits(self, inputs: list[Tensor]) -> Tensor:
        """f − f_k, (B,), from the heads' inputs."""
        with torch.no_grad():
            known: Tensor = self.stages.reference(inputs)
        return super().logits(inputs) - known

    def after(self, kept: Sequence[MovedDraws], iteration: int) -> Course:
        """Store the moved draws, and end the stage if its effective sample size has fallen far enough."""
        self.stages.put_back(kept)
        config = self.config.stage
        if iteration % config.every == 0 and self.stages.ess_fraction(self.bench.average) < config.ess:
            self._end_stage(iteration)
        return self

    def evaluate(self, iteration: int) -> tuple[dict[str, Any], Course]:
        if iteration == self.config.iterations and iteration > self.together:
            self._end_stage(iteration)
        return {
            "gain": self.stages.gain,
            "ess_fraction": self.stages.ess_fraction(self.bench.average),
            "stage": len(self.stages.done),
            "rate": self.stages.rate,
        }, self

    def finish(self) -> Finished:
        """Clip f and set its log Z to 0. There is no tempering, since each stage was accepted by its own gain."""
        stages, average = self.stages, self.bench.average
        average.load_state_dict(self.best.energy)
        ess = min((stage["ess_fraction"] for stage in stages.done), default=1.0)
        nats, log_z, ceiling, clipped = stages.gain, stages.log_z, math.inf, dict[str, float]()
        if stages.done:
            top, change, log_z_change = stages.clipped(self.bench.held_out.posterior)
            nats, ess, log_z = nats + change.nats, min(ess, change.ess_fraction), log_z + log_z_change
            clipped = {"gain": change.nats, "log_z": log_z_change, "ess_fraction": change.ess_fraction}
            ceiling = top - log_z
        average.add(-log_z)
        gain = Gain(nats, ess, 1.0)
        return Finished(gain, gain, ceiling=ceiling, clipped=clipped, stages=stages.done)

    def waiting_since(self) -> int:
        return max(self.best.iteration, self.together)

    def anneal(self, iteration: int) -> None:
        """Go from p_β towards the product of the groups' ratios, in stages along τ f, while the held-out gain rises."""
        stages, bench = self.stages, self.bench
        goal, tau, number = copy.deepcopy(bench.average), 0.0, 0
        while tau < 1:
            tau = stages.next_tau(goal, tau)
            step = copy.deepcopy(goal)
            step.scale(tau)
            found, error = self._gain_of(step, iteration)
            if found.nats <= max(ANNEALING_GAIN if tau < 1 else GAIN_STEP, 2 * error):
                break
            self._accept(step, found, iteration, bench.draws.generators(Purpose.STAGE_ANNEALING, number))
            number += 1
            shown = {"iteration": iteration, "stage": len(stages.done), "gain": stages.gain}
            bench.progress.step({"iterations": self.config.iterations, **shown})
        bench.load(stages.reference.state_dict())

    def state(self) -> dict[str, Any]:
        return super().state() | {"stages": self.stages.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.stages.restore(state["stages"])

    def _end_stage(self, iteration: int) -> None:
        """End a stage: accept what it learned if the held-out gain rises, else repeat the stage at a lower rate."""
        average = self.bench.average
        self.stages.temper(average)
        found, error = self._gain_of(average, iteration)
        if found.nats > max(GAIN_STEP, 2 * error):
            self._accept(average, found, iteration, self.bench.draws.generators(Purpose.STAGE_SETTLING, iteration))
        else:
            self.stages.reject()
        # Also after an accepted stage: the average was measured, and the live heads are ahead of it.
        self.bench.load(self.stages.reference.state_dict())

    def _gain_of(self, energy: JointEnergy, iteration: int) -> tuple[Gain, float]:
        """The held-out gain of a stage that ends with f = `energy`, and its standard error. Raises DivergenceError."""
        found, error = self.stages.gain_of(energy, self.bench.held_out.posterior)
        if not math.isfinite(found.nats):
            raise DivergenceError(f"the held-out gain of a stage is not finite at iteration {iteration}: {found.nats}")
        return found, error

    def _accept(self, energy: JointEnergy, found: Gain, iteration: int, generators: Sequence[torch.Generator]) -> None:
        """End a stage with f = `energy`, which has the gain `found`."""
        self.stages.advance(energy, found, iteration, generators, self.bench.draws.processes)
        self.best = Best(self.stages.gain, iteration, copy.deepcopy(energy.state_dict()))


class GroupRatios(StagedRatios):
    """One density ratio per latent group: z_i of an image against z_i' ~ p_β(z_i | z_<i) under the same z_<i.

    The sum of these ratios is the f towards which the stages begin.
    """

    def pairs(self, indices: Tensor, part: int, generator: torch.Generator) -> Pairs:
        positive, negative = self.bench.draws.own_conditionals(indices, generator)
        return Pairs(positive, negative, torch.ones_like(positive[0][0].flatten()[0]))

    def logits(self, inputs: list[Tensor]) -> Tensor:
        """f_i of each group, (B, L), without the joint head: the negatives of all groups together are no joint draw."""
        return self.bench.energy.terms(inputs)[:, : len(self.bench.draws.backbone.groups)]

    def after(self, kept: Sequence[Any], iteration: int) -> Course:
        """When the time of single groups is over, anneal towards what they learned, and hand over to `StagedRatios`."""
        if iteration < self.together:
            return self
        together = StagedRatios(self.bench, self.config, self.best.iteration, self.stages, self.saturated)
        together.anneal(iteration)
        return together


def first_course(bench: Workbench, config: FitConfig, iteration: int = 0) -> Course:
    """The course that these settings have after `iteration` steps, with untrained heads."""
    if config.objective == "mle":
        return MaximumLikelihood(bench, config, iteration)
    if config.ratios == "groupwise":
        bench.squash(config.energy.bound or _bound(bench, config.stage.bound))
        return GroupwiseRatios(bench, config, iteration)
    return staged(bench, config, iteration) if config.ratios == "staged" else OneRatio(bench, config, iteration)


def resumed(bench: Workbench, config: FitConfig, state: Mapping[str, Any]) -> Course:
    """The course of a saved `state`, restored. `config`: the settings with which the fit began."""
    saturated = state["saturated"]
    if bool(state["stages"]) != bool(saturated or config.ratios == "staged"):
        raise ValueError(f"stages: expected {'some' if saturated else 'none'} at iteration {state['iteration']}")
    if saturated:
        course: Course = staged(bench, config.staging(saturated["iteration"]), state["iteration"], saturated)
    else:
        course = first_course(bench, config, state["iteration"])
    if bool(state["stages"]) != isinstance(course, StagedRatios):
        raise ValueError("stages expected none, found some" if state["stages"] else "stages are missing")
    course.restore(state)
    return course


def staged(
    bench: Workbench, config: FitConfig, iteration: int, saturated: dict[str, Any] | None = None
) -> StagedRatios:
    """The staged course after `iteration` steps, with untrained heads: single groups at first, later all together.

    `saturated`: iteration and ESS at which a single ratio saturated before; None where there was none.
    """
    draws = bench.draws
    generator = derived_generator(config.seed, Purpose.STAGE_START, device=bench.device)
    stage = config.stage.suited(draws.backbone, config.parts)
    bench.squash(_bound(bench, stage.bound))
    energy = copy.deepcopy(bench.average)
    energy.load_state_dict(bench.untrained)
    at_once = draws_at_once(config.batch_size // config.parts, bench.device)
    stages = Stages(draws.backbone, energy, stage, generator, at_once=at_once)
    course = StagedRatios(bench, config, iteration, stages, saturated)
    if iteration < course.together:
        return GroupRatios(bench, config, iteration, stages, saturated)
    return course


def _bound(bench: Workbench, bound: float) -> float:
    """`bound`, or more where held-out latents lie further out, as f must still distinguish them; 0 (none) stays 0."""
    spread = max(bench.average.spread(seen) for seen in bench.held_out)
    return max(bound, BOUND_PER_SPREAD * spread) if bound else 0.0


def _shown(plain: Gain, tempered: Gain) -> dict[str, Any]:
    return {
        "gain": plain.nats,
        "ess_fraction": plain.ess_fraction,
        "tempered_gain": tempered.nats,
        "tempered_ess_fraction": tempered.ess_fraction,
        "tau": tempered.tau,
    }
