"""Learning the whole model: generator, Gaussian conditionals, inference network and energy together (§3.2, §3.3).

An iteration draws z⁻ from the prior and z⁺ from the posterior (by chains, with the posterior "langevin"), computes the
gradients of `joint_loss`, and updates all weights at once. On a GPU chains and gradients replay CUDA graphs.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ebm_prior.compute.cuda_graphs import runner
from ebm_prior.compute.isolation import isolated
from ebm_prior.compute.randomness import Generator, Purpose, derived_generator, seeded
from ebm_prior.errors import DivergenceError
from ebm_prior.interfaces import SILENT, Callback, Images, Progress, Recorder
from ebm_prior.model.backbone import Backbone, Posterior
from ebm_prior.model.batch_norm import keeping_statistics
from ebm_prior.model.checked_images import checked
from ebm_prior.model.energy import JointEnergy, values
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.settings import recorded
from ebm_prior.training.joint_chains import JointChains
from ebm_prior.training.joint_config import JointConfig
from ebm_prior.training.joint_loss import Terms, terms
from ebm_prior.training.latents import PRIOR_DRAWS
from ebm_prior.training.loop import Training
from ebm_prior.training.objectives import gain
from ebm_prior.training.resume import require_shapes
from ebm_prior.training.steps import (
    JOINT_GAP_LIMIT,
    JOINT_NORM_LIMIT,
    batch_indices,
    require_finite,
    require_gap,
    require_typical,
    scheduled_rate,
    set_learning_rate,
    update_average,
)

EVALUATED = 1_000  # largest number of validation images; log Z is estimated from PRIOR_DRAWS times as many draws of p_β


@isolated(grad=True)
def train_jointly(
    backbone: Backbone,
    images: Images,
    config: JointConfig | None = None,
    *,
    validation: Images | None = None,
    run: Recorder | None = None,
    progress: Progress = SILENT,
    on_evaluate: Callback | None = None,
) -> EBMPrior:
    """Train `backbone` in place together with an energy on `images`; returns the moving averages of both as a prior.

    With a `run`, state and metrics are written every `evaluate_every` iterations, and training continues from the run's
    last state. `on_evaluate` then gets {"iteration", "prior"}. Metrics use the `validation` images (default: `images`).
    Where a loss or gradient is not finite, chains leave the typical set, or the energy explodes, training returns to
    the last state at half the learning rate. The second time it raises DivergenceError, and the error's `kept` is the
    prior of the last state.
    """
    training = JointTraining(backbone, images, config or JointConfig(), validation or images, progress, on_evaluate)
    training.run(run)
    return training.prior()


class WholeModel(nn.Module):
    """Backbone and energy as one module: everything that joint training learns."""

    def __init__(self, backbone: Backbone, energy: JointEnergy) -> None:
        super().__init__()
        self.backbone, self.energy = backbone, energy


class BatchGradients(NamedTuple):
    """The loss of one batch, and its gradients by the index of the parameter in `WholeModel.parameters()`."""

    terms: Terms
    loss: Tensor
    gradients: dict[int, Tensor]  # gradients of the loss
    omega: dict[int, Tensor]  # gradients of the inference network, where chains draw z⁺


class JointTraining(Training):
    """The loop of joint training: model, average, optimizer, chains, and the state that a resume needs."""

    title = "train"
    learns = "model"
    network: WholeModel
    average: WholeModel

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        config: JointConfig,
        validation: Images,
        progress: Progress = SILENT,
        on_evaluate: Callback | None = None,
    ) -> None:
        super().__init__(progress, on_evaluate)
        self.config, self.images, self.validation = config, checked(images), checked(validation)
        like = next(backbone.parameters())
        self.device, self.dtype = like.device, like.dtype
        with seeded(self.device, config.seed, Purpose.JOINT_HEADS):
            energy = JointEnergy(backbone.groups, config.energy).to(self.device, self.dtype)
        self.backbone = backbone.train().requires_grad_(True)
        if config.channels_last:
            backbone.to(memory_format=torch.channels_last)
        with seeded(self.device, config.seed, Purpose.JOINT_INITIALISATION), torch.no_grad():
            generator = derived_generator(config.seed, Purpose.JOINT_FIRST_POSTERIOR, device=self.device)
            backbone.infer(self._batch(0)[0], generator=generator)  # data-dependent initialisation, where there is one
        self.network = WholeModel(backbone, energy)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(backbone.parameters()), "peak": config.learning_rate},
                {"params": list(energy.parameters()), "peak": config.energy_learning_rate},
            ],
            betas=config.betas,
            fused=self.device.type == "cuda",
        )
        self.chains = JointChains(backbone, config, self.device)
        self._run = runner(self.device)

    @property
    def energy(self) -> JointEnergy | None:
        """The energy, or None as long as training goes on with f = 0."""
        joined = self.config.prior == "ebm" and self.iteration >= self.config.energy_from * self.config.iterations
        return self.network.energy if joined else None

    @property
    def iterations(self) -> int:
        return self.config.iterations

    @property
    def every(self) -> int:
        return self.config.evaluate_every

    def step(self) -> dict[str, Any]:
        t, energy = self.iteration, self.energy
        x, generator = self._batch(t)
        with _frozen(self.network):
            drawn = self.chains.of_images(x, energy, generator) if self.config.posterior == "langevin" else []
            negative = self.chains.of_prior(len(x), energy, generator) if energy is not None else []
        inputs = x, drawn, negative
        with seeded(self.device, self.config.seed, Purpose.JOINT_DROPOUT, t):  # dropout draws from the global generator
            found: BatchGradients = self._run(energy is not None, self._differentiate, inputs, generator)
        self._update(found)
        return {"iteration": self.iteration, **self._watch(found.terms, of_prior=bool(negative))}

    def _differentiate(self, inputs: tuple[Tensor, list[Tensor], list[Tensor]], generator: Generator) -> BatchGradients:
        """Loss and gradients for images, z⁺ of chains (empty: the inference network draws) and z⁻ (empty: f = 0).

        CUDA graphs are recorded of this function, so it changes nothing but the running statistics of batch norms.
        """
        x, drawn, negative = inputs
        energy, parameters = self.energy, list(self.network.parameters())
        inferred = self.backbone.infer(x, generator=generator)
        found = terms(self.backbone, energy, x, drawn or inferred, negative or None)
        loss = found.loss()
        if self.config.penalty and energy is not None:
            loss = loss + self.config.penalty * self._penalty(drawn or inferred.z, negative)
        gradients, omega = _gradients(loss, dict(enumerate(parameters))), dict[int, Tensor]()
        if drawn:
            # The inference network's parameters ω get no gradient at the chains' draws: they learn from its own draws.
            own = range(len(list(self.backbone.parameters())))
            if unmet := {index: parameters[index] for index in own if index not in gradients}:
                omega = _gradients(terms(self.backbone, energy, x, inferred, negative or None).loss(), unmet)
        return BatchGradients(Terms(*(term.detach() for term in found)), loss.detach(), gradients, omega)

    def _penalty(self, *latents: Sequence[Tensor]) -> Tensor:
        """E[f_q² + f_p²] at z⁺ and z⁻, which keeps the energy small. No gradient flows to the latents."""
        squares = []
        for z in latents:
            seen = [group.detach() for group in z]
            with keeping_statistics(self.backbone), torch.no_grad():
                eps = self.backbone.standardize(seen) if self.config.energy.conditional else seen
            squares.append(self.network.energy(self.network.energy.inputs(seen, eps)).square().mean())
        return torch.stack(squares).sum()

    def _update(self, found: BatchGradients) -> None:
        """Take one optimizer step along the clipped gradients. Raises DivergenceError where one is not finite."""
        config, t = self.config, self.iteration
        parameters = list(self.network.parameters())
        for index, parameter in enumerate(parameters):
            parameter.grad = found.gradients.get(index, found.omega.get(index))
        own = len(list(self.backbone.parameters()))
        generator, energy = ([i for i in found.gradients if (i < own) == of_backbone] for of_backbone in (True, False))
        # With chains, the inference network ω is clipped by itself, because the generator does not depend on it.
        steepness = [
            nn.utils.clip_grad_norm_([parameters[i] for i in part], limit)
            for part, limit in (
                (generator, config.gradient_clip),
                (found.omega, config.gradient_clip),
                (energy, math.inf),
            )
        ]
        require_finite("the loss or its gradient", t, found.loss, *steepness)
        rate = scheduled_rate(self.rate, t, config.iterations, warmup=config.warmup, decay=config.decay)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.iteration += 1
        update_average(self.average, self.network, config.ema, t)

    def _watch(self, found: Terms, *, of_prior: bool) -> dict[str, float]:
        """The numbers to show. Raises DivergenceError where the energy explodes or chains have left the typical set."""
        gap = float((found.f_q - found.f_p).mean())
        shown = {"log_likelihood": float(found.log_likelihood.mean()), "f_gap": gap}
        require_gap(gap, JOINT_GAP_LIMIT)
        if of_prior:
            shown["chain_norm"], typical = float(found.norm_p.mean()), float(found.norm_q.mean())
            limit = JOINT_NORM_LIMIT * max(1.0, typical)
            require_typical(shown["chain_norm"], limit, self.iteration, f"posterior {typical:.3g}")
        return shown

    def evaluate(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        """Validation metrics by the inference network: the ELBO with f and log Z, its parts, and the gain of f."""
        metrics = {**shown, **validate(self.prior(), self.validation, seed=self.config.seed), "rate": self.rate}
        if not math.isfinite(metrics["elbo"]):
            raise DivergenceError(
                f"the validation ELBO is {metrics['elbo']}, not finite, at iteration {self.iteration}"
            )
        return metrics

    def product(self) -> dict[str, Any]:
        return {"prior": self.prior()}

    def given_up(self, reason: DivergenceError) -> DivergenceError:
        return DivergenceError(
            f"training diverged again after a roll-back: {reason}. Let the prior's chains keep up (more steps, more "
            "leapfrogs of pcn-langevin), hold the energy by a penalty, or lower the learning rates (now "
            f"{self.config.learning_rate:g}, {self.config.energy_learning_rate:g} of the energy) or the step sizes",
            kept=self.prior(),
        )

    def prior(self) -> EBMPrior:
        """The moving averages as a prior on its backbone, frozen."""
        kept = copy.deepcopy(self.average)
        record = {
            "stage": "train",
            "config": recorded(self.config),
            "data": {"name": self.images.name, "training": len(self.images)},
            "iterations": self.iteration,
            "rollbacks": self.rollbacks,
        }
        return EBMPrior(kept.backbone, kept.energy, sampler=self._sampler(), record=record)

    def _sampler(self) -> SamplerConfig:
        """The sampler that the prior records.

        An f learned from short fresh chains in ε fits just these chains (§3.2), so they are recorded. After persistent
        chains, which have reached their target, and after chains in z, which a prior cannot repeat in ε, the sampler is
        the exact default. Without an energy it is ancestral sampling.
        """
        config = self.config
        if config.prior == "gaussian":
            return ANCESTRAL
        return config.prior_chain if config.chains == "fresh" and config.space == "eps" else SamplerConfig()

    def _batch(self, iteration: int) -> tuple[Tensor, torch.Generator]:
        """The observations of an iteration, and the generator that goes on to draw their latents."""
        generator = derived_generator(self.config.seed, Purpose.JOINT_BATCH, iteration, device=self.device)
        indices = batch_indices(len(self.images), self.config.batch_size, iteration, self.config.seed)
        x = self.images.batch(indices).to(self.device, self.dtype)
        return self.backbone.observe(x, generator=generator), generator

    def own_state(self) -> dict[str, Any]:
        return {"persistent": self.chains.persistent}

    def restore_own(self, state: Mapping[str, Any]) -> None:
        if state["persistent"]:
            shapes = [(self.config.batch_size, *group.shape) for group in self.backbone.groups]
            require_shapes("persistent", state["persistent"], shapes)
        self.chains.persistent = [chain.to(self.device) for chain in state["persistent"]]


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
    """Eval mode, and no gradients of the weights, inside the block: chains differentiate the latents alone."""
    training = module.training
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        module.train(training).requires_grad_(True)


def _gradients(loss: Tensor, parameters: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Gradients of the parameters that the loss depends on, in the parameters' layout, as fused optimizers need."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        index: g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        for (index, p), g in zip(parameters.items(), found, strict=True)
        if g is not None
    }
