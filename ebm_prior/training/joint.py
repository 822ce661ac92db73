"""Learning the whole model: generator, Gaussian conditionals, inference network and energy together (§3.2, §3.3).

An iteration draws z⁻ and, with the posterior "langevin", z⁺ by chains, takes the gradients of `joint_loss`, and moves
all weights at once. On a GPU chains and gradients replay CUDA graphs.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ebm_prior.compute.cuda_graphs import runner
from ebm_prior.compute.isolation import isolated
from ebm_prior.compute.randomness import Generator, Purpose, derived_generator, seeded
from ebm_prior.errors import DivergenceError
from ebm_prior.interfaces import Callback, Images, Recorder
from ebm_prior.model.backbone import Backbone, Posterior
from ebm_prior.model.batch_norm import keeping_statistics
from ebm_prior.model.energy import JointEnergy, values
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import Potential, SamplerConfig, draw, graphed, where
from ebm_prior.training.joint_config import JointConfig
from ebm_prior.training.joint_loss import Terms, potential, terms
from ebm_prior.training.latents import PRIOR_DRAWS
from ebm_prior.training.loop import Training
from ebm_prior.training.objectives import gain
from ebm_prior.training.steps import batch_indices, update_average

GAP_LIMIT = 1e3  # nats of E_q[f] − E_p[f]: an exploding energy, which chains no longer follow
NORM_LIMIT = 3.0  # times the posterior's ‖ε‖/√D, at least 1: chains beyond it have left where data lies
EVALUATED = 1_000  # validation images, and PRIOR_DRAWS as many draws of p_β, for the metrics


@isolated(grad=True)
def train_jointly(
    backbone: Backbone,
    images: Images,
    config: JointConfig | None = None,
    *,
    validation: Images | None = None,
    run: Recorder | None = None,
    on_step: Callback | None = None,
    on_evaluate: Callback | None = None,
) -> EBMPrior:
    """Train `backbone` in place with a joint energy on `images`; returns the moving averages of both as a prior.

    With a `run`, state and metrics are written every `evaluate_every` iterations, and the run goes on from its last
    state. `on_evaluate` gets {"iteration", "prior"} then. The metrics are on `validation` images (default: `images`).
    Where a loss or gradient is not finite, chains leave, or the energy explodes, training returns to the last state at
    half the rate; the second time it raises DivergenceError, which has `kept` the prior of the last state.
    """
    training = _Joint(backbone, images, config or JointConfig(), validation or images, on_evaluate)
    training.run(run, on_step)
    return training.result()


class _Model(nn.Module):
    """Everything that is learned."""

    def __init__(self, backbone: Backbone, energy: JointEnergy) -> None:
        super().__init__()
        self.backbone, self.energy = backbone, energy


class _Found(NamedTuple):
    """What one batch says."""

    terms: Terms
    loss: Tensor
    gradients: dict[int, Tensor]  # of the model's parameters, by their number; not of those that play no part
    omega: dict[int, Tensor]  # of the inference network's, where it learns beside the chains


class _Joint(Training):
    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        config: JointConfig,
        validation: Images,
        on_evaluate: Callback | None,
    ) -> None:
        self.config, self.images, self.validation, self.on_evaluate = config, images, validation, on_evaluate
        like = next(backbone.parameters())
        self.device, self.dtype = like.device, like.dtype
        with seeded(self.device, config.seed, Purpose.JOINT_HEADS):
            energy = JointEnergy(backbone.groups, config.energy).to(self.device, self.dtype)
        self.backbone = backbone.train().requires_grad_(True)
        if config.channels_last:
            backbone.to(memory_format=torch.channels_last)
        with (
            seeded(self.device, config.seed, Purpose.JOINT_INITIALISATION),
            torch.no_grad(),
        ):  # data-dependent initialisation, where there is one
            backbone.infer(
                self._batch(0)[0],
                generator=derived_generator(config.seed, Purpose.JOINT_FIRST_POSTERIOR, device=self.device),
            )
        self.model = _Model(backbone, energy)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(backbone.parameters()), "peak": config.learning_rate},
                {"params": list(energy.parameters()), "peak": config.energy_learning_rate},
            ],
            betas=config.betas,
            fused=self.device.type == "cuda",
        )
        self.persistent: list[Tensor] = []
        self._run = runner(self.device)
        self._observed: Tensor | None = None  # images of the iteration, in memory that graphs can read again
        self._potentials: dict[tuple[bool, bool], Potential] = {}

    @property
    def energy(self) -> JointEnergy | None:
        """The energy once it has joined; None: f = 0."""
        joined = self.config.prior == "ebm" and self.iteration >= self.config.energy_from * self.config.iterations
        return self.model.energy if joined else None

    @property
    def iterations(self) -> int:
        return self.config.iterations

    @property
    def every(self) -> int:
        return self.config.evaluate_every

    def step(self) -> dict[str, Any]:
        t, energy = self.iteration, self.energy
        x, generator = self._batch(t)
        with _frozen(self.model):
            drawn = self._posterior_draws(x, generator) if self.config.posterior == "langevin" else []
            negative = self._prior_draws(len(x), generator) if energy is not None else []
        inputs = x, drawn, negative
        with seeded(self.device, self.config.seed, Purpose.JOINT_DROPOUT, t):  # dropout draws from the global generator
            found: _Found = self._run(energy is not None, self._differentiate, inputs, generator)
        self._update(found)
        return {"iteration": self.iteration, **self._watch(found.terms, of_prior=bool(negative))}

    def _differentiate(self, inputs: tuple[Tensor, list[Tensor], list[Tensor]], generator: Generator) -> _Found:
        """The loss for images, z⁺ that chains drew (none: the network's own draws) and z⁻ (none: f = 0).

        Pure, as graphs want it, but for what a network counts in training.
        """
        x, drawn, negative = inputs
        energy, parameters = self.energy, list(self.model.parameters())
        inferred = self.backbone.infer(x, generator=generator)
        found = terms(self.backbone, energy, x, drawn or inferred, negative or None)
        loss = found.loss()
        if self.config.penalty and energy is not None:
            loss = loss + self.config.penalty * self._penalty(drawn or inferred.z, negative)
        gradients, omega = _gradients(loss, dict(enumerate(parameters))), dict[int, Tensor]()
        if drawn:
            # ω is what the generative side has no gradient for; it alone learns from the network's own draws.
            own = range(len(list(self.backbone.parameters())))
            if unmet := {index: parameters[index] for index in own if index not in gradients}:
                omega = _gradients(terms(self.backbone, energy, x, inferred, negative or None).loss(), unmet)
        return _Found(Terms(*(term.detach() for term in found)), loss.detach(), gradients, omega)

    def _penalty(self, *latents: Sequence[Tensor]) -> Tensor:
        """E[f_q² + f_p²] of z⁺ and z⁻ as they lie: it keeps the energy small, and moves no latents."""
        squares = []
        for z in latents:
            seen = [group.detach() for group in z]
            with keeping_statistics(self.backbone), torch.no_grad():
                eps = self.backbone.standardize(seen) if self.config.energy.conditional else seen
            squares.append(self.model.energy(self.model.energy.inputs(seen, eps)).square().mean())
        return torch.stack(squares).sum()

    def _update(self, found: _Found) -> None:
        config, t = self.config, self.iteration
        parameters = list(self.model.parameters())
        for index, parameter in enumerate(parameters):
            parameter.grad = found.gradients.get(index, found.omega.get(index))
        own = len(list(self.backbone.parameters()))
        generator, energy = ([i for i in found.gradients if (i < own) == of_backbone] for of_backbone in (True, False))
        # Beside chains ω is clipped by itself: nothing that generates depends on it.
        steepness = [
            nn.utils.clip_grad_norm_([parameters[i] for i in part], limit)
            for part, limit in (
                (generator, config.gradient_clip),
                (found.omega, config.gradient_clip),
                (energy, math.inf),
            )
        ]
        if not bool(torch.isfinite(torch.stack([found.loss, *(s.to(found.loss) for s in steepness)])).all()):
            raise DivergenceError(f"the loss or its gradient is not finite at iteration {t}")
        rate = self.rate * min(1.0, (t + 1) / max(1, config.warmup))
        if config.decay:
            rate *= 0.5 * (1 + math.cos(math.pi * t / config.iterations))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        self.optimizer.step()
        self.iteration += 1
        update_average(self.average, self.model, config.ema, t)

    def _watch(self, found: Terms, *, of_prior: bool) -> dict[str, float]:
        """Numbers to show; DivergenceError where the energy explodes or chains have left."""
        gap = float((found.f_q - found.f_p).mean())
        shown = {"log_likelihood": float(found.log_likelihood.mean()), "f_gap": gap}
        if abs(gap) > GAP_LIMIT:
            raise DivergenceError(f"the energy's gap between posterior and prior latents is {gap:.3g} nats")
        if of_prior:
            shown["chain_norm"], typical = float(found.norm_p.mean()), float(found.norm_q.mean())
            if not shown["chain_norm"] <= NORM_LIMIT * max(1.0, typical):
                raise DivergenceError(
                    f"chains left the typical set at iteration {self.iteration}: ‖ε‖/√D {shown['chain_norm']:.3g}, "
                    f"posterior {typical:.3g}"
                )
        return shown

    # -- chains

    def _posterior_draws(self, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        self._observed = x.clone() if self._observed is None else self._observed.copy_(x)
        return self._chain(len(x), generator, of_prior=False)

    def _prior_draws(self, n: int, generator: torch.Generator) -> list[Tensor]:
        return self._chain(n, generator, of_prior=True)

    def _potential(self, of_prior: bool) -> Potential:
        """What the chains climb: made once, before and after the energy joins, for a GPU records graphs of it."""
        key = of_prior, self.energy is not None
        if key not in self._potentials:
            images = None if of_prior else self._observed
            g = potential(self.backbone, self.energy, self.config.space, images, bfloat16=self.config.bfloat16)
            self._potentials[key] = graphed(g, self.device)
        return self._potentials[key]

    def _chain(self, n: int, generator: torch.Generator, *, of_prior: bool) -> list[Tensor]:
        """z at the ends of n chains, which start from the Gaussian prior or, persistent ones, from their last ends."""
        config = self.config
        persistent = of_prior and config.chains == "persistent"

        def propose() -> list[Tensor]:
            start = self.backbone.standard_normal(n, generator=generator)
            if config.space == "z":
                start = self.backbone.reparameterize(start)
            if persistent and self.persistent:
                restart = torch.rand(n, generator=generator, device=self.device) < config.refresh
                start = where(restart, start, self.persistent)
            return start

        sampler = config.prior_chain if of_prior else config.posterior_chain
        ends = draw(self._potential(of_prior), propose, sampler, generator).eps
        if persistent:
            self.persistent = ends
        return ends if config.space == "z" else self.backbone.reparameterize(ends)

    # -- how good it is

    def evaluate(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        """On validation images, by the inference network: ELBO with f and log Z, its parts, and the gain of f."""
        metrics = {**shown, **validate(self.result(), self.validation, seed=self.config.seed), "rate": self.rate}
        if not math.isfinite(metrics["elbo"]):
            raise DivergenceError(f"the validation ELBO is {metrics['elbo']} at iteration {self.iteration}")
        return metrics

    def evaluated(self) -> None:
        if self.on_evaluate:
            self.on_evaluate({"iteration": self.iteration, "prior": self.result()})

    def given_up(self, reason: DivergenceError) -> DivergenceError:
        return DivergenceError(
            f"training diverged again after a roll-back: {reason}. Let the prior's chains keep up (more steps, more "
            "leapfrogs of pcn-langevin), hold the energy by a penalty, or lower the learning rates (now "
            f"{self.config.learning_rate:g}, {self.config.energy_learning_rate:g} of the energy) or the step sizes",
            kept=self.result(),
        )

    def result(self) -> EBMPrior:
        """The moving averages as a prior on its backbone, frozen."""
        kept = copy.deepcopy(self.average)
        record = {
            "stage": "train",
            "config": asdict(self.config),
            "data": {"name": self.images.name, "training": len(self.images)},
            "iterations": self.iteration,
            "rollbacks": self.rollbacks,
        }
        return EBMPrior(kept.backbone, kept.energy, sampler=self._sampler(), record=record)

    def _sampler(self) -> SamplerConfig:
        """How to draw: f that learned against short chains from the Gaussian prior is right for just those (§3.2).

        Persistent chains have come to where long ones go: there the exact default. There, too, after short chains in z,
        which a prior, whose chains are in ε, cannot repeat. Without an energy the Gaussian prior is all there is.
        """
        config = self.config
        if config.prior == "gaussian":
            return ANCESTRAL
        return config.prior_chain if config.chains == "fresh" and config.space == "eps" else SamplerConfig()

    # -- its parts

    def _batch(self, iteration: int) -> tuple[Tensor, torch.Generator]:
        generator = derived_generator(self.config.seed, Purpose.JOINT_BATCH, iteration, device=self.device)
        indices = batch_indices(len(self.images), self.config.batch_size, iteration, self.config.seed)
        x = self.images.batch(indices).to(self.device, self.dtype)
        return self.backbone.observe(x, generator=generator), generator

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "iteration": self.iteration,
                "rate": self.rate,
                "rollbacks": self.rollbacks,
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "persistent": self.persistent,
            }
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        state = copy.deepcopy(dict(state))
        self.iteration, self.rate, self.rollbacks = state["iteration"], state["rate"], state["rollbacks"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.persistent = [chain.to(self.device) for chain in state["persistent"]]


@torch.no_grad()
def validate(prior: EBMPrior, images: Images, *, seed: int = 0) -> dict[str, float]:
    """ELBO with the energy in nats per image (§3.3), on the first EVALUATED images by the inference network.

    elbo = E_q[log p(x|z) + log p_β − log q] + gain, gain = E_q[f] − log Z; log Z from ancestral draws, with their ESS.
    """
    backbone = prior.backbone
    like = next(backbone.parameters())
    kept: list[Posterior] = []
    likelihood: list[Tensor] = []
    for number, part in enumerate(torch.split(torch.arange(min(EVALUATED, len(images))), 250)):
        generator = derived_generator(seed, Purpose.VALIDATION_POSTERIOR, number, device=like.device)
        x = backbone.observe(images.batch(part).to(like.device, like.dtype), generator=generator)
        kept.append(backbone.infer(x, generator=generator))
        likelihood.append(backbone.likelihood(kept[-1].features).log_prob(x))
    count = sum(len(p.log_q) for p in kept)
    eps = backbone.standard_normal(
        PRIOR_DRAWS * count, generator=derived_generator(seed, Purpose.VALIDATION_PRIOR, device=like.device)
    )
    z = [torch.cat(group) for group in zip(*(p.z for p in kept), strict=True)]
    f_q, f_p = (values(prior.f, latents) for latents in (z, backbone.reparameterize(eps)))
    better = gain(f_q, f_p)
    kl = float(torch.cat([(p.log_q - p.log_p).sum(1) for p in kept]).mean())
    reconstruction = float(torch.cat(likelihood).mean())
    return {
        "elbo": reconstruction - kl + better.nats,
        "reconstruction": reconstruction,
        "kl": kl,
        "gain": better.nats,
        "ess_fraction": better.ess_fraction,
    }


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients of the weights: chains differentiate the latents alone."""
    training = module.training
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        module.train(training).requires_grad_(True)


def _gradients(loss: Tensor, parameters: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Of the parameters that the loss depends on, laid out in memory as these are: a fused optimizer wants it so."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        index: g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        for (index, p), g in zip(parameters.items(), found, strict=True)
        if g is not None
    }
