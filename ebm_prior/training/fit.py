"""Second stage: train the heads of a joint energy on a frozen backbone (Eqs. 10, 17; §5.2).

Positives are fresh posterior draws of training images, negatives are draws of the prior: ancestral ones for `nce`,
Langevin chains in ε-space for `mle`. On held-out latents the loop measures the gain in nats, keeps the best moving
average, watches for divergence, and at the end tempers. A run is a function of its seed: kill it and resume.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior.compute.isolation import isolated
from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.randomness import Purpose, derived_generator, seeded
from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.interfaces import Callback, Images, Recorder
from ebm_prior.model.backbone import Backbone, require_usable
from ebm_prior.model.energy import JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import draw, graphed, norm, where
from ebm_prior.training.fit_config import FitConfig
from ebm_prior.training.latents import Draws, HeldOut
from ebm_prior.training.loop import Training
from ebm_prior.training.objectives import Gain, mle_loss, nce_loss
from ebm_prior.training.stages import BEYOND, Moved, Stages, draws_at_once
from ebm_prior.training.steps import batch_indices, update_average

NORM_LIMIT = 1.2  # times the posterior's ‖ε‖/√D (1 ± 1/√(2D) under p_β): chains beyond it have left where data lies
GAIN_STEP = 1e-3  # nats by which a held-out gain must be better to count as better
GAP_LIMIT = 1e4  # nats of E_q[f] − E_p[f]: an exploding energy (a real one is KL(q‖p) + KL(p‖q) of the latents)
ANNEAL_LEAST = 1.0  # nats that a stage along a known f must bring; learning brings as many, and sees where f is wrong
PROBATION = 0.25  # of the iterations: where one ratio saturates so early, stages take over
SATURATED = 0.1  # times the ESS floor: below it a few draws hold all the weight, and tempering gives most of f away
FEW = 4.0  # draws: an ESS of no more says the same, however few draws there are in all
GAIN_DROP_LIMIT = 20.0  # nats that the held-out gain may fall below its best, where tempering does not mend it


class Part(NamedTuple):
    """What a part of the batch contributes to a step."""

    row: Tensor  # the gradient, flat, then the loss, the gap E_q[f] − E_p[f] and the mean ‖ε‖/√D of the chains
    draws: Moved | None  # of the prior so far, where there are stages
    chains: list[Tensor]  # where they are persistent


@isolated(grad=True)
def fit(
    backbone: Backbone,
    images: Images,
    config: FitConfig | None = None,
    *,
    run: Recorder | None = None,
    on_step: Callback | None = None,
    on_evaluate: Callback | None = None,
    processes: Processes = ALONE,
) -> EBMPrior:
    """Train an energy-based prior for a frozen `backbone` on `images`.

    With a `run`, state and metrics are written every `evaluate_every` iterations and the run goes on from its last
    state. `on_evaluate` gets {"iteration", "prior"}: the moving average as a prior. When a loss or chain is not finite,
    chains leave the typical set, or the held-out gain collapses, training returns to the last good state at half the
    rate; the second time it raises DivergenceError, whose `kept` is the best one so far.

    A batch is drawn and differentiated in `config.parts`, which the `processes` share: the result depends on the parts
    and not on how many processes there are. Only the first one is given a `run` and callbacks.
    """
    config = config or FitConfig()
    require_usable(backbone)
    if config.parts % processes.count:
        raise ConfigurationError(
            f"{processes.count} processes share the parts of a batch: expected a multiple of that, found "
            f"{config.parts} (--parts)"
        )
    return _Fit(backbone, images, config, processes).train(run, on_step, on_evaluate)


class _Fit(Training):
    """One second stage under way: everything that changes is in `state`, so that it can be saved and rolled back."""

    def __init__(self, backbone: Backbone, images: Images, config: FitConfig, processes: Processes) -> None:
        self.processes = processes
        self.backbone, self.images = backbone.for_inference(), images
        self.asked = self.config = config
        like = next(backbone.parameters())
        self.device, self.dtype = like.device, like.dtype
        if backbone.training:
            raise ConfigurationError("expected a backbone in eval mode, found it in train mode: call .eval() first")
        dimensions = sum(math.prod(group.shape) for group in backbone.groups)
        if config.may_stage:
            config.stage.suited(backbone, config.parts)  # refused now, not when stages take over
        with seeded(self.device, config.seed, Purpose.HEADS):
            self.energy = JointEnergy(backbone.groups, config.energy).to(self.device, self.dtype)
        self.draws = Draws(self.backbone, images, self.energy, config, processes)
        self.training, held_out = self.draws.split()
        self.held_out: HeldOut = self.draws.held_out(held_out)
        if config.energy.standardize:
            self.energy.standardize(self.draws.moments(self.training[:2_000]))
        with torch.no_grad():
            generator = derived_generator(config.seed, Purpose.TYPICAL_NORM, device=self.device)
            observed = self.draws.observed(self.training[: config.batch_size // config.parts], generator)
            typical = norm(self.backbone.infer(observed, generator=generator).eps).mean()
        self.norm_limit = NORM_LIMIT * max(1.0, float(typical)) + 4 / math.sqrt(2 * dimensions * config.batch_size)
        self.average = copy.deepcopy(self.energy).eval().requires_grad_(False)
        self.untrained = copy.deepcopy(self.average.state_dict())  # f = 0
        self.sampled = copy.deepcopy(self.average)  # mle: f of the chains, whose weights change in place
        current = EBMPrior(self.backbone, self.sampled, regime=config.regime, target=config.target)
        self.potential = graphed(current.potential, self.device)
        self.optimizer = self._new_optimizer()
        self.chains: list[Tensor] = []
        self.saturated: dict[str, Any] | None = None  # when and how one ratio alone did
        self.stages = self._first_stage() if config.ratios == "staged" else None  # None: one ratio
        self.best = self._untrained()
        self.on_step: Callback | None = None
        self.on_evaluate: Callback | None = None

    # -- the loop

    def train(self, run: Recorder | None, on_step: Callback | None, on_evaluate: Callback | None) -> EBMPrior:
        self.on_step, self.on_evaluate = on_step, on_evaluate
        self.run(run, on_step, self.processes)
        return self._finish()

    @property
    def iterations(self) -> int:
        return self.config.iterations

    @property
    def every(self) -> int:
        return self.config.evaluate_every

    def finished(self) -> bool:
        return super().finished() or self._out_of_patience()

    def evaluated(self) -> None:
        if self.on_evaluate:
            self.on_evaluate({"iteration": self.iteration, "prior": self._prior()})

    def given_up(self, reason: DivergenceError) -> DivergenceError:
        return DivergenceError(
            f"training diverged again after a roll-back at half the rate: {reason}. Kept: the prior of iteration "
            f"{self.best['iteration']}. Lower the learning rate (now {self.config.learning_rate:g}) or the step size",
            kept=self._finish(),
        )

    def step(self) -> dict[str, Any]:
        config, t = self.config, self.iteration
        indices = self.training[batch_indices(len(self.training), config.batch_size, t, config.seed)]
        groupwise = self.stages is not None and t < self.together
        pieces, generators = indices.chunk(config.parts), self._generators(Purpose.FIT_BATCH, t)

        def contribution(part: int) -> Part:
            return self._part(pieces[part], part, generators[part], groupwise)

        parts = self.processes.map(contribution, range(config.parts))
        if self.stages is not None and not groupwise:
            self.stages.put_back([part.draws for part in parts if part.draws])
        self.chains = [torch.cat(group) for group in zip(*(part.chains for part in parts), strict=True)]
        mean = torch.stack([part.row for part in parts]).mean(0)
        gradient, shown = mean[:-3], mean[-3:]
        loss, gap, chain_norm = shown.tolist()
        if not (math.isfinite(loss) and bool(gradient.norm().isfinite())):
            raise DivergenceError(f"the loss or its gradient is not finite at iteration {t}")
        if config.objective == "mle" and chain_norm > self.norm_limit:
            raise DivergenceError(
                f"chains left the typical set at iteration {t}: ‖ε‖/√D {chain_norm:.3g}, limit {self.norm_limit:.3g}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        learned = list(self.energy.parameters())
        for parameter, piece in zip(learned, torch.split(gradient, [p.numel() for p in learned]), strict=True):
            parameter.grad = piece.view_as(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        self.iteration += 1
        update_average(self.average, self.energy, config.ema, t)
        if abs(gap) > GAP_LIMIT:
            raise DivergenceError(f"the energy's gap between posterior and prior latents is {gap:.3g} nats")
        if self.stages is not None:
            self._watch(self.stages)
        return {"iteration": self.iteration, "loss": loss, "f_gap": gap, "chain_norm": chain_norm}

    def _part(self, indices: Tensor, part: int, generator: torch.Generator, groupwise: bool) -> Part:
        """Draws of one part of the batch, and the gradient of its loss."""
        config, draws, chains = self.config, None, list[Tensor]()
        if groupwise:
            positive, negative = self.draws.own_conditionals(indices, generator)
            chain_norm = torch.ones_like(positive[0][0].flatten()[0])
        else:
            positive = self.draws.posterior(indices, generator)
            if self.stages is not None:
                draws = self.stages.moved(len(indices), generator, part=part, parts=config.parts)
                eps = draws.eps
            elif config.objective == "nce":
                eps = self.backbone.standard_normal(len(indices), generator=generator)
            else:
                eps = self._langevin(len(indices), part, generator)
                chains = eps if config.chains == "persistent" else []
            negative, chain_norm = self.draws.of_prior(eps), norm(eps).mean()
        self.energy.train()
        dropout = (config.seed, Purpose.FIT_DROPOUT, self.iteration, *((part + 1,) if config.parts > 1 else ()))
        with seeded(self.device, *dropout), torch.enable_grad():  # dropout draws from the global generator
            both = [torch.cat(pair) for pair in zip(positive, negative, strict=True)]
            if groupwise:  # a ratio per group, (B, L): without the joint head, for which the negatives are no draw
                f = self.energy.terms(both)[:, : len(self.backbone.groups)]
            else:
                f = self.energy(both) - self._known(both)
            f_q, f_p = torch.split(f, [len(positive[0]), len(negative[0])])
            loss = nce_loss(f_q, f_p) if config.objective == "nce" else mle_loss(f_q, f_p, penalty=config.penalty)
            gradient = torch.autograd.grad(loss, list(self.energy.parameters()))
        shown = torch.stack([loss.detach(), (f_q.mean() - f_p.mean()).detach(), chain_norm])
        return Part(torch.cat([*(g.flatten() for g in gradient), shown]), draws, chains)

    def _generators(self, *words: int) -> list[torch.Generator]:
        """A generator for each part of a batch; one part's is that of the whole."""
        parts = self.config.parts
        own = [()] if parts == 1 else [(part + 1,) for part in range(parts)]
        return [derived_generator(self.config.seed, *words, *word, device=self.device) for word in own]

    def _learning_rate(self) -> float:
        config, t = self.config, self.iteration
        since = self.since
        rate = self.rate * config.learning_rate * min(1.0, (t + 1 - since) / max(1, config.warmup))
        if self.stages is not None:
            rate *= self.stages.rate
        if config.decay:
            rate *= 0.5 * (1 + math.cos(math.pi * (t - since) / (config.iterations - since)))
        return rate

    def _known(self, inputs: list[Tensor]) -> Tensor | float:
        """f_k, what the logit is taken relative to: 0 with one ratio."""
        if self.stages is None:
            return 0.0
        with torch.no_grad():
            known: Tensor = self.stages.reference(inputs)
        return known

    # -- one ratio or stages

    def _first_stage(self) -> Stages:
        generator = derived_generator(self.config.seed, Purpose.STAGE_START, device=self.device)
        spread = max(self.average.spread(seen) for seen in self.held_out)
        self._squash(max(self.config.stage.bound, BEYOND * spread) if self.config.stage.bound else 0.0)
        energy = copy.deepcopy(self.average)
        energy.load_state_dict(self.untrained)
        at_once = draws_at_once(self.config.batch_size // self.config.parts, self.device)
        stage = self.config.stage.suited(self.backbone, self.config.parts)
        return Stages(self.backbone, energy, stage, generator, at_once=at_once)

    def _squash(self, bound: float) -> None:
        for energy in (self.energy, self.average):
            energy.squash(bound)

    @property
    def since(self) -> int:
        """Where the schedule begins: what comes after one ratio has its own."""
        return int(self.saturated["iteration"]) if self.saturated else 0

    @property
    def together(self) -> int:
        """The iteration from which on stages learn all groups together: before it, each group's own ratio."""
        return self.since + int(self.config.stage.groupwise * (self.config.iterations - self.since))

    def _untrained(self) -> dict[str, Any]:
        """The best prior while there is none: the backbone's."""
        return {"gain": -math.inf, "iteration": self.iteration, "energy": self.untrained}

    def _watch(self, stages: Stages) -> None:
        """Begin stages together when it is time, and end one whose weights have become uneven."""
        config = self.config.stage
        if self.iteration == self.together:
            self._anneal(stages)
        elif (
            self.iteration > self.together
            and self.iteration % config.every == 0
            and stages.ess_fraction(self.average) < config.ess
        ):
            self._end_stage(stages)

    def _saturates(self, plain: Gain) -> bool:
        """Whether one ratio cannot bridge the hole: seen early on, while there is time for what takes over."""
        config = self.config
        early = self.iteration <= max(PROBATION * config.iterations, config.evaluate_every)
        left = self.iteration < config.iterations and config.iterations // 3 >= config.warmup
        return config.may_stage and early and left and self._narrow(plain)

    def _narrow(self, plain: Gain) -> bool:
        """Whether few held-out draws hold all the weight."""
        draws = len(self.held_out.prior[0])
        return plain.ess_fraction * draws < max(SATURATED * self.config.ess_floor * draws, FEW)

    def _begin_stages(self, plain: Gain) -> None:
        """Begin again in stages."""
        self.saturated = {"iteration": self.iteration, "ess_fraction": plain.ess_fraction}
        self.config = self.asked.staging(self.iteration)
        self.energy.load_state_dict(self.untrained)
        self.average.load_state_dict(self.untrained)
        self.optimizer, self.best = self._new_optimizer(), self._untrained()
        self.rate, self.rollbacks = 1.0, 0
        self.stages = self._first_stage()

    def _anneal(self, stages: Stages) -> None:
        """From p_β to the product of the groups' own ratios in stages along τ f, as far as the held-out gain rises."""
        goal, tau, number = copy.deepcopy(self.average), 0.0, 0
        while tau < 1:
            tau = stages.next_tau(goal, tau)
            step = copy.deepcopy(goal)
            step.scale(tau)
            found, error = stages.look(step, self.held_out.posterior)
            self._require_finite(found)
            if found.nats <= max(ANNEAL_LEAST if tau < 1 else GAIN_STEP, 2 * error):
                break
            self._accept(stages, step, found, self._generators(Purpose.STAGE_ANNEALING, number))
            number += 1
            if self.on_step:
                course = {"stage": len(stages.done), "gain": stages.gain}
                self.on_step({"iterations": self.config.iterations, "iteration": self.iteration, **course})
        self._put_back(stages.reference)

    def _accept(self, stages: Stages, energy: JointEnergy, found: Gain, generators: Sequence[torch.Generator]) -> None:
        stages.advance(energy, found, self.iteration, generators, self.processes)
        self.best = {"gain": stages.gain, "iteration": self.iteration, "energy": copy.deepcopy(energy.state_dict())}

    def _end_stage(self, stages: Stages) -> None:
        """Accept what a stage has learned if the held-out gain rises; else begin it again, at a lower rate."""
        stages.temper(self.average)
        found, error = stages.look(self.average, self.held_out.posterior)
        self._require_finite(found)
        if found.nats > max(GAIN_STEP, 2 * error):
            self._accept(stages, self.average, found, self._generators(Purpose.STAGE_SETTLING, self.iteration))
        else:
            stages.reject()
        self._put_back(stages.reference)  # after an accepted stage, too: the live heads run ahead of what was measured

    def _require_finite(self, found: Gain) -> None:
        if not math.isfinite(found.nats):
            raise DivergenceError(f"the held-out gain of a stage is {found.nats} at iteration {self.iteration}")

    def _put_back(self, energy: JointEnergy) -> None:
        """The heads back to `energy`."""
        self.energy.load_state_dict(energy.state_dict())
        self.average.load_state_dict(energy.state_dict())

    def _new_optimizer(self) -> torch.optim.Optimizer:
        config, kind = self.config, torch.optim.AdamW if self.config.optimizer == "adamw" else torch.optim.Adam
        return kind(
            self.energy.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )

    # -- how good it is

    def evaluate(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        if self.stages is not None:
            if self.iteration == self.config.iterations and self.iteration > self.together:
                self._end_stage(self.stages)
            course = {
                "gain": self.stages.gain,
                "ess_fraction": self.stages.ess_fraction(self.average),
                "stage": len(self.stages.done),
                "rate": self.stages.rate,
            }
            return {**shown, **course}
        plain, tempered = self.held_out.gains(self.average, self.config.ess_floor)
        calibrated = self.config.regime == "calibrated"
        if not math.isfinite(plain.nats) or (
            calibrated and plain.nats < self.best["gain"] - GAIN_DROP_LIMIT and tempered.nats < 0.5 * self.best["gain"]
        ):
            raise DivergenceError(f"the held-out gain fell to {plain.nats:.3g} nats at iteration {self.iteration}")
        if self._saturates(plain):
            self._begin_stages(plain)
            shown = {
                **shown,
                "remark": f"one density ratio saturates (ESS {plain.ess_fraction:.2%}): now in stages",
            }
        elif not calibrated or tempered.nats > self.best["gain"] + GAIN_STEP:
            self.best = {
                "gain": tempered.nats,
                "iteration": self.iteration,
                "energy": copy.deepcopy(self.average.state_dict()),
            }
        return {
            **shown,
            "gain": plain.nats,
            "ess_fraction": plain.ess_fraction,
            "tempered_gain": tempered.nats,
            "tempered_ess_fraction": tempered.ess_fraction,
            "tau": tempered.tau,
        }

    def _out_of_patience(self) -> bool:
        stale = self.iteration - max(self.best["iteration"], self.together if self.stages else 0)
        return self.config.regime == "calibrated" and stale >= self.config.patience * self.config.evaluate_every

    def _finish(self) -> EBMPrior:
        """The best prior so far, tempered on the held-out latents."""
        self.average.load_state_dict(self.best["energy"])
        calibrated, ceiling, clipped = self.config.regime == "calibrated", math.inf, dict[str, float]()
        if self.stages is not None:  # each was accepted by its own gain: nothing is left to temper
            least = min((stage["ess_fraction"] for stage in self.stages.done), default=1.0)
            nats, log_z = self.stages.gain, self.stages.log_z
            if self.stages.done:
                top, change, log_z_change = self.stages.clipped(self.held_out.posterior)
                nats, least, log_z = nats + change.nats, min(least, change.ess_fraction), log_z + log_z_change
                clipped = {"gain": change.nats, "log_z": log_z_change, "ess_fraction": change.ess_fraction}
                ceiling = top - log_z
            plain = tempered = Gain(nats, least, 1.0)
            self.average.add(-log_z)  # log Z of the whole is then 0, as that of one ratio
        else:
            plain, tempered = self.held_out.gains(self.average, self.config.ess_floor)
            tempered = tempered if calibrated else plain  # a refiner is kept as it is
        record = {
            "config": asdict(self.config),
            "data": {
                "name": self.images.name,
                "training": len(self.training),
                "held_out": len(self.images) - len(self.training),
            },
            "precision": self.backbone.precision,
            "iterations": self.iteration,
            "best_iteration": self.best["iteration"],
            "rollbacks": self.rollbacks,
            "held_out": {"plain": plain._asdict(), "tempered": tempered._asdict()},
            "saturated": self.saturated,
            "narrow": calibrated and self.stages is None and self._narrow(plain),
            "clipped": clipped,
            "stages": None if self.config.objective == "mle" else self.stages.done if self.stages else [],
        }
        return self._prior(tau=tempered.tau if calibrated else 1.0, ceiling=ceiling, record=record)

    # -- its parts

    def _langevin(self, n: int, part: int, generator: torch.Generator) -> list[Tensor]:
        """ε of n draws of the current p_α (mle): fresh chains, or those of this part of the batch, which go on."""
        config = self.config

        def propose() -> list[Tensor]:
            return self.backbone.standard_normal(n, generator=generator)

        self.sampled.load_state_dict(self.energy.state_dict())
        if config.chains == "fresh":
            return draw(self.potential, propose, config.chain, generator).eps
        initial = propose()
        if self.chains:  # go on from the last step, but for a share of them
            restart = torch.rand(n, generator=generator, device=self.device) < config.refresh
            initial = where(restart, initial, [chains.chunk(config.parts)[part] for chains in self.chains])
        return draw(self.potential, lambda: initial, config.chain, generator).eps

    def _prior(
        self, *, tau: float = 1.0, ceiling: float = math.inf, record: Mapping[str, Any] | None = None
    ) -> EBMPrior:
        config = self.config
        return EBMPrior(
            self.backbone,
            copy.deepcopy(self.average),
            tau=tau,
            ceiling=ceiling,
            regime=config.regime,
            target=config.target,
            sampler=config.sampler.of(self.stages.sampler) if self.stages else config.recorded_sampler,
            record=record,
        )

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "iteration": self.iteration,
                "rate": self.rate,
                "rollbacks": self.rollbacks,
                "energy": self.energy.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "chains": self.chains,
                "best": self.best,
                "saturated": self.saturated,
                "stages": self.stages.state() if self.stages else None,
            }
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        state = copy.deepcopy(dict(state))
        self.iteration, self.rate, self.rollbacks = state["iteration"], state["rate"], state["rollbacks"]
        self.energy.load_state_dict(state["energy"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.saturated, self.stages = state["saturated"], None
        self.config = self.asked.staging(self.saturated["iteration"]) if self.saturated else self.asked
        if state["stages"]:
            self.stages = self._first_stage()
            self.stages.restore(state["stages"])
        else:
            self._squash(self.config.energy.bound)
        self.chains, self.best = [c.to(self.device) for c in state["chains"]], state["best"]
