"""Pretraining: train a hierarchical VAE of any adapter by maximising its ELBO.

    ELBO = E_q[log p(x|z)] − β Σ_i γ_i max(KL_i, free nats),   KL_i = E_q[log q(z_i|x, z_<i) − log p_β(z_i|z_<i)]

with one posterior draw per image and KL warm-up (β rises from 0 to 1). On request the KL terms are balanced meanwhile
(γ; else 1), and the adapter's regularisation is added. The optimizer is Adam, AdamW or Adamax with gradient clipping
and a learning rate that is constant or decays along a cosine; steps with a very large gradient can be left out. The
result is an exponential moving average of the weights.
Networks with data-dependent initialisation are first initialised on one batch (of several parts, on the first).

A batch can be computed in parts, which several processes share. Each part has noise and batch statistics of its own,
and free nats and balancing see the mean KL of a part. Gradients and changes of running statistics are averaged.
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
from ebm_prior.compute.randomness import Generator, Purpose, derived_generator, seeded, uniform
from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.interfaces import SILENT, Callback, Images, Progress, Recorder
from ebm_prior.model.backbone import Backbone, LatentGroup
from ebm_prior.model.checked_images import checked
from ebm_prior.model.passes import PLAIN, Passes
from ebm_prior.training.held_images import on_device
from ebm_prior.training.loop import Training
from ebm_prior.training.pretrain_config import PretrainConfig
from ebm_prior.training.steps import (
    MovingAverage,
    batch_indices,
    require_finite,
    scheduled_rate,
    set_learning_rate,
)

EVALUATED = 500  # images of a batch in evaluations, whose random numbers depend on it


class Elbo(NamedTuple):
    """One-sample ELBO and its parts, in nats per image."""

    elbo: float
    log_likelihood: float
    kl: list[float]  # per group, generation order

    def bits_per_dimension(self, image_shape: Sequence[int]) -> float:
        """−ELBO/(ln 2 · C·H·W) for images (C, H, W): bits per pixel and colour."""
        return -self.elbo / (math.log(2) * math.prod(image_shape))


@isolated(grad=True)
def pretrain(
    backbone: Backbone,
    images: Images,
    config: PretrainConfig,
    *,
    run: Recorder | None = None,
    validation: Images | None = None,
    passes: Passes = PLAIN,
    progress: Progress = SILENT,
    on_evaluate: Callback | None = None,
    processes: Processes = ALONE,
) -> Backbone:
    """Train `backbone` in place on `images`; returns the moving average of its weights, frozen and in eval mode.

    With a `run`, state and metrics are written every `checkpoint_every` iterations, and training continues from the
    run's last state. `on_evaluate` then gets {"iteration", "backbone", "elbo"}: the average, and its Elbo on the
    `validation` images (None without any). When the loss is not finite, training returns to the last state at half the
    learning rate; the second time it raises DivergenceError.

    `passes`: how cells are computed in the steps; the average is evaluated in the plain way. A batch is computed in
    `config.parts` parts, which the `processes` share. The result depends on the number of parts, not on the number of
    processes. Only the first process is given `run`, `progress` and `on_evaluate`; all are given `validation`.
    """
    if config.parts % processes.count:
        raise ConfigurationError(
            f"{processes.count} processes share the parts of a batch: expected a multiple of that, found "
            f"{config.parts} (--parts)"
        )
    watched = run or on_evaluate or processes.count > 1
    pretraining = Pretraining(
        backbone, images, config, validation if watched else None, passes, progress, on_evaluate, processes
    )
    pretraining.run(run)
    return pretraining.average


class Pretraining(Training):
    """The loop of pretraining: network, average, optimizer, and the state that a resume needs."""

    title = "pretrain"
    learns = "backbone"
    average: Backbone

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        config: PretrainConfig,
        validation: Images | None = None,
        passes: Passes = PLAIN,
        progress: Progress = SILENT,
        on_evaluate: Callback | None = None,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__(progress, on_evaluate, processes)
        if config.regularization and type(backbone).regularization is Backbone.regularization:
            raise ConfigurationError(
                f"regularization: {type(backbone).__name__} has nothing to regularise, expected 0, found "
                f"{config.regularization:g}: leave it out"
            )
        self.backbone, self.config = backbone.train().requires_grad_(True), config
        self.device = next(backbone.parameters()).device
        if config.channels_last:
            backbone.to(memory_format=torch.channels_last)
        self.learning = passes.learning(backbone)  # the same weights; steps run on it
        self.images = on_device(checked(images), backbone.image_shape, self.device)
        self.validation = None if validation is None else checked(validation)
        with seeded(self.device, config.seed, Purpose.PRETRAIN_INITIALISATION), torch.no_grad():
            x, generator = self._batch(0, 0)
            backbone.infer(x, generator=generator)  # data-dependent initialisation, where there is one
        self.network, self.average = self.backbone, copy.deepcopy(backbone).eval().requires_grad_(False)
        self.parameters = list(backbone.parameters())
        # Running statistics, which every part changes from the same values on.
        self.statistics = [each for each in backbone.buffers() if each.dtype != torch.bool and config.parts > 1]
        self.averaging = MovingAverage(self.average, backbone)
        self.optimizer = _optimizer(self.parameters, config)
        self.elbo: Elbo | None = None  # of the average, when last evaluated

    @property
    def iterations(self) -> int:
        return self.config.iterations

    @property
    def every(self) -> int:
        return self.config.checkpoint_every

    def evaluate(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        if self.validation is not None:
            self.elbo = evaluate_elbo(self.average, self.validation, seed=self.config.seed, processes=self.processes)
        return {**shown, **(self.elbo._asdict() if self.elbo else {})}

    def product(self) -> dict[str, Any]:
        return {"backbone": self.average, "elbo": self.elbo}

    def given_up(self, reason: DivergenceError) -> DivergenceError:
        config, trained = self.config, self.iteration > 0
        return DivergenceError(
            f"training diverged again after a roll-back at half the rate: {reason}. A resume would repeat it: start "
            f"anew (--overwrite, or another --out) with a lower learning rate (now {config.learning_rate:g}) or a "
            f"longer kl_warmup (now {config.kl_warmup:g}). Kept: "
            f"{f'the backbone of iteration {self.iteration}' if trained else 'nothing'}.",
            kept=self.average if trained else None,
        )

    def step(self) -> dict[str, Any]:
        config, t = self.config, self.iteration
        warmup = config.rate_warmup * config.iterations
        rate = scheduled_rate(self.rate * config.learning_rate, t, config.iterations, warmup=warmup, decay=config.decay)
        set_learning_rate(self.optimizer, rate)
        loss, elbo = self._differentiate()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.gradient_clip)
        require_finite("the ELBO or its gradient", t, loss, norm)
        shown = {"iteration": t + 1, "train_elbo": float(elbo), "beta": self.beta}
        if not config.gradient_skip or float(norm) < config.gradient_skip:
            self._take_step()
        self.iteration += 1
        return shown

    @property
    def beta(self) -> float:
        """The KL weight of this iteration."""
        return min(1.0, (self.iteration + 1) / max(1.0, self.config.kl_warmup * self.config.iterations))

    def _differentiate(self) -> tuple[Tensor, Tensor]:
        """Loss and ELBO of this iteration's batch; afterwards the parameters have their gradients."""
        before, learned = [each.clone() for each in self.statistics], len(self.parameters)
        *found, loss, elbo = self.processes.total(lambda part: self._part(part, before), range(self.config.parts))
        for parameter, gradient in zip(self.parameters, found[:learned], strict=True):
            parameter.grad = gradient
        for each, old, change in zip(self.statistics, before, found[learned:], strict=True):
            each.copy_(old + change)
        return loss, elbo

    def _part(self, part: int, before: Sequence[Tensor]) -> list[Tensor | None]:
        """The share of part `part` in the results of a step, which are sums over the parts.

        These are the gradient of each parameter (None where the loss does not depend on it), the change of each of the
        `statistics` from its value `before` the step, the loss and the ELBO.
        """
        config = self.config
        for each, old in zip(self.statistics, before, strict=True):
            each.copy_(old)
        loss, elbo = self.share(part)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        changes = [  # numbers of batches are whole: the first part's count
            (now - old) / config.parts if now.is_floating_point() else (now - old) * (part == 0)
            for now, old in zip(self.statistics, before, strict=True)
        ]
        return [*(parameter.grad for parameter in self.parameters), *changes, loss.detach(), elbo]

    def share(self, part: int) -> tuple[Tensor, Tensor]:
        """The shares of a part of the batch in the loss and in the ELBO of a step, scalars; the loss has its graph."""
        config, t = self.config, self.iteration
        x, generator = self._batch(t, part)
        with seeded(self.device, config.seed, Purpose.PRETRAIN_DROPOUT, t, *self._words(part)):
            log_likelihood, kl = _elbo_terms(self.learning, x, generator)  # dropout draws from the global generator
        loss = self._loss(log_likelihood, kl, part) / config.parts
        return loss, (log_likelihood - kl.sum(1)).mean().detach() / config.parts

    def _take_step(self) -> None:
        """Change the weights, and their average with them."""
        config = self.config
        self.optimizer.step()
        # Once β is 1 the objective no longer changes, and averaging begins.
        settled = self.iteration + 1 > max(1, config.iterations * config.kl_warmup)
        self.averaging.update(config.ema, settled=settled)

    def _loss(self, log_likelihood: Tensor, kl: Tensor, part: int) -> Tensor:
        """The loss: the negative ELBO from log p(x|z) (B,) and KL (B, L), weighted and regularised by the settings.

        The regularisation of all parts is that of the first one, times their number.
        """
        config, beta = self.config, self.beta
        charged = kl if config.free_nats_per == "image" else kl.mean(0, keepdim=True)
        per_group = charged.clamp(min=config.free_nats).mean(0)
        if config.kl_balance and beta < 1:
            per_group = balance(kl, self.backbone.groups) * per_group
        loss = beta * per_group.sum() - log_likelihood.mean()
        if config.regularization and part == 0:
            loss = loss + config.parts * config.regularization * self.backbone.regularization()
        return loss

    def _batch(self, iteration: int, part: int) -> tuple[Tensor, Generator]:
        """The observations of a part of an iteration's batch, and the generator that then draws their latents."""
        config = self.config
        words = (config.seed, Purpose.PRETRAIN_BATCH, iteration, *self._words(part))
        generator = derived_generator(*words, device=self.device)
        indices = batch_indices(len(self.images), config.batch_size, iteration, config.seed).chunk(config.parts)[part]
        return _observed(self.backbone, self.images, indices, generator, flip=config.flip), generator

    def _words(self, part: int) -> tuple[int, ...]:
        """The words by which the random numbers of a part differ from those of other parts."""
        return (part + 1,) if self.config.parts > 1 else ()

    def state(self) -> dict[str, Any]:
        norm = torch.nn.utils.get_total_norm(self.parameters)
        require_finite("the norm of the weights", self.iteration, norm)
        return super().state()

    def translated(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        average = state.get("average")
        return {**state, "average": _average_weights(average)} if isinstance(average, Mapping) else state


def evaluate_elbo(
    backbone: Backbone, images: Images, *, seed: int = 0, batch_size: int = EVALUATED, processes: Processes = ALONE
) -> Elbo:
    """One-sample ELBO of all `images`, in nats per image: one observation and one posterior draw each.

    The `processes` share the batches.
    """
    device = next(backbone.parameters()).device

    @torch.no_grad()
    def terms(batch: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        generator = derived_generator(seed, Purpose.ELBO, batch[0], device=device)
        log_likelihood, kl = _elbo_terms(backbone, _observed(backbone, images, batch[1], generator), generator)
        return log_likelihood.double().cpu(), kl.double().cpu()

    batches = list(enumerate(torch.split(torch.arange(len(images)), batch_size)))
    log_likelihood, kl = zip(*processes.map(terms, batches), strict=True)
    total, groups = torch.cat(log_likelihood).mean(), torch.cat(kl).mean(0)
    return Elbo(float(total - groups.sum()), float(total), groups.tolist())


def training_record(config: PretrainConfig, images: Images, elbo: Elbo | None) -> Mapping[str, Any]:
    """The record of a trained backbone in its own form: settings, data, and the ELBO of test images."""
    return {
        "stage": "pretrain",
        "config": asdict(config),
        "data": {"name": images.name, "images": len(images)},
        "test_elbo": None if elbo is None else elbo._asdict(),
    }


def balance(kl: Tensor, groups: Sequence[LatentGroup]) -> Tensor:
    """γ (L,), without gradient, from the KL (B, L) of a batch: KL balancing (Vahdat & Kautz, 2020, appendix A).

    γ_i = (c_i/a_i) / mean_j (c_j/a_j), with c_i = 0.01 + mean |KL_i| and a_i = H_i·W_i / the number of groups of that
    size. A group with a larger KL gets a larger weight, and the KL that is allowed grows with the area of a scale.
    """
    positions = [math.prod(group.shape[1:]) for group in groups]
    share = kl.new_tensor([size / positions.count(size) for size in positions])
    weight = (0.01 + kl.detach().abs().mean(0)) / share
    return weight / weight.mean()


def _optimizer(parameters: Sequence[Tensor], config: PretrainConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamax":
        return torch.optim.Adamax(parameters, **settings, foreach=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    # One kernel for all weights. On a CPU it rounds differently, and would change earlier results.
    fused = parameters[0].is_cuda
    return kind(parameters, **settings, fused=fused, foreach=not fused)


def _observed(
    backbone: Backbone, images: Images, indices: Tensor, generator: Generator, *, flip: bool = False
) -> Tensor:
    """Observations of the images at `indices`, (B, C, H, W), on the network's device and in its precision.

    `flip`: whether to mirror a random half of them.
    """
    like = next(backbone.parameters())
    x = images.batch(indices).to(like.device, like.dtype)
    if flip:
        chosen = uniform((len(x), 1, 1, 1), generator, dtype=x.dtype, device=x.device) < 0.5
        x = torch.where(chosen, x.flip(3), x)
    return backbone.observe(x, generator=generator)


def _elbo_terms(backbone: Backbone, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """log p(x|z) (B,) and the one-sample KL per group (B, L), in nats."""
    posterior = backbone.infer(x, generator=generator)
    return backbone.likelihood(posterior.features).log_prob(x), posterior.log_q - posterior.log_p


def _average_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a saved moving average; states of earlier versions name them module.* and count their updates."""
    if "n_averaged" not in state:
        return dict(state)
    return {str(key).removeprefix("module."): value for key, value in state.items() if key != "n_averaged"}
