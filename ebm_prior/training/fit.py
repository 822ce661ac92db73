"""Fitting: train the heads of a joint energy on a frozen backbone (Eqs. 10, 17; §5.2).

Positives are fresh posterior draws of training images. A course (`courses`) provides the negatives and decides which f
is the best on held-out latents. The loop here takes steps, evaluates, watches for divergence, and makes a prior of the
best f. A run depends on its seed alone, so it can be killed and resumed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ebm_prior.compute.isolation import isolated
from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.randomness import Purpose, seeded
from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.interfaces import SILENT, Callback, Images, Progress, Recorder
from ebm_prior.model.backbone import Backbone, require_usable
from ebm_prior.model.energy import JointEnergy
from ebm_prior.model.own_energy import energy_of
from ebm_prior.model.prior import EBMPrior
from ebm_prior.settings import recorded
from ebm_prior.training.course import Course, Workbench
from ebm_prior.training.courses import first_course, resumed
from ebm_prior.training.fit_config import FitConfig
from ebm_prior.training.latents import Draws, split
from ebm_prior.training.loop import Training
from ebm_prior.training.steps import (
    FIT_GAP_LIMIT,
    batch_indices,
    require_finite,
    require_gap,
    require_typical,
    scheduled_rate,
    set_learning_rate,
    update_average,
)


@isolated(grad=True)
def fit(
    backbone: Backbone,
    images: Images,
    config: FitConfig | None = None,
    *,
    energy: nn.Module | None = None,
    run: Recorder | None = None,
    progress: Progress = SILENT,
    on_evaluate: Callback | None = None,
    processes: Processes = ALONE,
) -> EBMPrior:
    """Train an energy-based prior for a frozen `backbone` on `images`; f is built-in heads, or a copy of `energy`.

    With a `run`, metrics are written every `evaluate_every` iterations and the state is saved then and by the clock;
    the fit continues from the run's last state. `on_evaluate` gets {"iteration", "prior"}, the moving average as a
    prior. When a loss or chain is not finite, chains leave the typical set, or the held-out gain collapses, training
    returns to the last good state at half the learning rate. The second time it raises DivergenceError, and the error's
    `kept` is the best prior so far.

    A batch is computed in `config.parts` parts, which the `processes` share. The result depends on the number of parts,
    not on the number of processes. Only the first process is given `run`, `progress` and `on_evaluate`.
    """
    config = config or FitConfig()
    require_usable(backbone)
    if config.parts % processes.count:
        raise ConfigurationError(
            f"{processes.count} processes share the parts of a batch: expected a multiple of that, found "
            f"{config.parts} (--parts)"
        )
    fitting = Fitting(backbone, images, config, progress, on_evaluate, processes, energy)
    fitting.run(run)
    return fitting.finish()


class Part(NamedTuple):
    """The contribution of a part of the batch to a step."""

    row: Tensor  # the flat gradient, then the loss, the gap E_q[f] − E_p[f] and the mean ‖ε‖/√D of the negatives
    kept: Any  # `Pairs.kept`, for `Course.after`


class Fitting(Training):
    """The training loop of a fit: its course, its draws, and the state that a resume needs."""

    title = "fit"
    learns = "energy"
    network: JointEnergy
    average: JointEnergy

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        config: FitConfig,
        progress: Progress = SILENT,
        on_evaluate: Callback | None = None,
        processes: Processes = ALONE,
        energy: nn.Module | None = None,
    ) -> None:
        super().__init__(progress, on_evaluate, processes)
        self.backbone, self.images, self.config = backbone.for_inference(), images, config
        self.backbone.checkpoint = backbone.checkpoint
        like = next(backbone.parameters())
        if backbone.training:
            raise ConfigurationError("expected a backbone in eval mode, found it in train mode: call .eval() first")
        if config.may_stage:
            config.stage.suited(backbone, config.parts)  # an error must show now, not when stages take over
        with seeded(like.device, config.seed, Purpose.HEADS):
            heads = energy_of(backbone.groups, config.heads, energy).to(like.device, like.dtype)
        if config.ratios == "groupwise" and not heads.is_sum:
            raise ConfigurationError(
                "ratios: groupwise needs heads of single groups, found an energy of all: leave out one"
            )
        draws = Draws(self.backbone, images, heads, config, processes, progress)
        training, held_out = split(self.backbone, images, config)
        latents = draws.held_out(held_out)
        if config.energy.standardize:
            heads.standardize(draws.moments(training[:2_000]))
        average = copy.deepcopy(heads).eval().requires_grad_(False)
        self.network, self.average, self.optimizer = heads, average, _optimizer(heads, config)
        self.bench = Workbench(heads, average, draws, training, latents, progress)
        self.course: Course = first_course(self.bench, config)

    @property
    def iterations(self) -> int:
        return self.course.config.iterations

    @property
    def every(self) -> int:
        return self.course.config.evaluate_every

    def finished(self) -> bool:
        return super().finished() or self.course.out_of_patience(self.iteration)

    def step(self) -> dict[str, Any]:
        config, t, training = self.course.config, self.iteration, self.bench.training
        indices = training[batch_indices(len(training), config.batch_size, t, config.seed)]
        pieces, generators = indices.chunk(config.parts), self.bench.draws.generators(Purpose.FIT_BATCH, t)

        def contribution(part: int) -> Part:
            return self.part(pieces[part], part, generators[part])

        parts = self.processes.map(contribution, range(config.parts))
        mean = torch.stack([part.row for part in parts]).mean(0)
        gradient = mean[:-3]
        loss, gap, chain_norm = mean[-3:].tolist()
        require_finite("the loss or its gradient", t, mean[-3], gradient.norm())
        limit = self.course.norm_limit
        require_typical(chain_norm, limit, t, f"limit {limit:.3g}")
        if config.gradient_clip:
            gradient = gradient * (config.gradient_clip / gradient.norm().clamp(min=config.gradient_clip))
        learned = list(self.network.parameters())
        for parameter, piece in zip(learned, torch.split(gradient, [p.numel() for p in learned]), strict=True):
            parameter.grad = piece.view_as(parameter)
        set_learning_rate(self.optimizer, self.learning_rate())
        self.optimizer.step()
        self.iteration += 1
        update_average(self.average, self.network, config.ema, t)
        require_gap(gap, FIT_GAP_LIMIT)
        self.course = self.course.after([part.kept for part in parts], self.iteration)
        return {"iteration": self.iteration, "loss": loss, "f_gap": gap, "chain_norm": chain_norm}

    def part(self, indices: Tensor, part: int, generator: torch.Generator) -> Part:
        """Draw latents for part `part` of the batch, the images at `indices`, and differentiate the loss."""
        config, pairs = self.course.config, self.course.pairs(indices, part, generator)
        self.network.train()
        dropout = (config.seed, Purpose.FIT_DROPOUT, self.iteration, *((part + 1,) if config.parts > 1 else ()))
        with seeded(self.bench.device, *dropout), torch.enable_grad():  # dropout draws from the global generator
            both = [torch.cat(pair) for pair in zip(pairs.positive, pairs.negative, strict=True)]
            logits = self.course.logits(both)
            f_q, f_p = torch.split(logits, [len(pairs.positive[0]), len(pairs.negative[0])])
            loss = self.course.loss(f_q, f_p)
            gradient = torch.autograd.grad(loss, list(self.network.parameters()))
        shown = torch.stack([loss.detach(), (f_q.mean() - f_p.mean()).detach(), pairs.norm])
        return Part(torch.cat([*(g.flatten() for g in gradient), shown]), pairs.kept)

    def learning_rate(self) -> float:
        """The learning rate of this iteration, on the schedule of the course."""
        course, config = self.course, self.course.config
        peak, done, in_all = self.rate * config.learning_rate * course.rate, course.since, config.iterations
        return scheduled_rate(peak, self.iteration - done, in_all - done, warmup=config.warmup, decay=config.decay)

    def evaluate(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        metrics, course = self.course.evaluate(self.iteration)
        if course is not self.course:  # a new course begins: full learning rate, fresh optimizer
            self.course, self.rate, self.rollbacks = course, 1.0, 0
            self.optimizer.state.clear()
        return {**shown, **metrics}

    def product(self) -> dict[str, Any]:
        return {"prior": self.prior()}

    def given_up(self, reason: DivergenceError) -> DivergenceError:
        return DivergenceError(
            f"training diverged again after a roll-back at half the rate: {reason}. Kept: the prior of iteration "
            f"{self.course.best.iteration}. Lower the learning rate (now {self.config.learning_rate:g}) or the step "
            "size",
            kept=self.finish(),
        )

    def finish(self) -> EBMPrior:
        """The best prior so far, tempered or clipped on the held-out latents, with a record of its training."""
        course = self.course
        plain, tempered, ceiling, narrow, clipped, stages, groups = course.finish()
        trained_on = len(self.bench.training)
        record = {
            "config": recorded(course.config),
            "data": {"name": self.images.name, "training": trained_on, "held_out": len(self.images) - trained_on},
            "precision": self.backbone.precision,
            "iterations": self.iteration,
            "best_iteration": course.best.iteration,
            "rollbacks": self.rollbacks,
            "held_out": {"plain": plain._asdict(), "tempered": tempered._asdict()},
            "saturated": course.saturated,
            "narrow": narrow,
            "clipped": dict(clipped),
            "stages": stages,
            **({} if groups is None else {"groups": groups}),
        }
        return self.prior(tau=tempered.tau, ceiling=ceiling, record=record)

    def prior(
        self, *, tau: float = 1.0, ceiling: float = math.inf, record: Mapping[str, Any] | None = None
    ) -> EBMPrior:
        """The moving average as a prior."""
        config = self.course.config
        return EBMPrior(
            self.backbone,
            copy.deepcopy(self.average),
            tau=tau,
            ceiling=ceiling,
            regime=config.regime,
            target=config.target,
            sampler=self.course.sampler,
            record=record,
        )

    def own_state(self) -> dict[str, Any]:
        return self.course.state()

    def restore_own(self, state: Mapping[str, Any]) -> None:
        self.course = resumed(self.bench, self.config, state)


def _optimizer(energy: JointEnergy, config: FitConfig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(energy.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
