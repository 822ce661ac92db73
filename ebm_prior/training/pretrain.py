"""Pretraining: train a hierarchical VAE of any adapter by maximising its ELBO.

    ELBO = E_q[log p(x|z)] − β Σ_i γ_i max(KL_i, free nats),   KL_i = E_q[log q(z_i|x, z_<i) − log p_β(z_i|z_<i)]

with one posterior draw per image and KL warm-up (β rises from 0 to 1). On request the KL terms are balanced meanwhile
(γ; else 1), and the adapter's regularisation is added. The optimizer is Adam, AdamW or Adamax with gradient clipping
and a learning rate that is constant or decays along a cosine; steps with a very large gradient can be left out. The
result is an exponential moving average of the weights.
Networks with data-dependent initialisation are first initialised on one batch.
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
from ebm_prior.compute.randomness import Generator, Purpose, derived_generator, seeded, uniform
from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.interfaces import SILENT, Callback, Images, Progress, Recorder
from ebm_prior.model.backbone import Backbone, LatentGroup
from ebm_prior.model.checked_images import checked
from ebm_prior.training.loop import Training
from ebm_prior.training.pretrain_config import PretrainConfig
from ebm_prior.training.steps import (
    batch_indices,
    require_finite,
    scheduled_rate,
    set_learning_rate,
    update_average_with_buffers,
)


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
    progress: Progress = SILENT,
    on_evaluate: Callback | None = None,
) -> Backbone:
    """Train `backbone` in place on `images`; returns the moving average of its weights, frozen and in eval mode.

    With a `run`, state and metrics are written every `checkpoint_every` iterations, and training continues from the
    run's last state. `on_evaluate` then gets {"iteration", "backbone", "elbo"}: the average, and its Elbo on the
    `validation` images (None without any). When the loss is not finite, training returns to the last state at half the
    learning rate; the second time it raises DivergenceError.
    """
    pretraining = Pretraining(
        backbone, images, config, validation if run or on_evaluate else None, progress, on_evaluate
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
        progress: Progress = SILENT,
        on_evaluate: Callback | None = None,
    ) -> None:
        super().__init__(progress, on_evaluate)
        if config.regularization and type(backbone).regularization is Backbone.regularization:
            raise ConfigurationError(
                f"regularization: {type(backbone).__name__} has nothing to regularise, expected 0, found "
                f"{config.regularization:g}: leave it out"
            )
        self.images, self.validation = checked(images), None if validation is None else checked(validation)
        self.backbone, self.config = backbone.train().requires_grad_(True), config
        self.device = next(backbone.parameters()).device
        if config.channels_last:
            backbone.to(memory_format=torch.channels_last)
        with seeded(self.device, config.seed, Purpose.PRETRAIN_INITIALISATION), torch.no_grad():
            x, generator = self._batch(0)
            backbone.infer(x, generator=generator)  # data-dependent initialisation, where there is one
        self.network, self.average = self.backbone, copy.deepcopy(backbone).eval().requires_grad_(False)
        self.optimizer = _optimizer(backbone, config)
        self.elbo: Elbo | None = None  # of the average, when last evaluated

    @property
    def iterations(self) -> int:
        return self.config.iterations

    @property
    def every(self) -> int:
        return self.config.checkpoint_every

    def evaluate(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        if self.validation is not None:
            self.elbo = evaluate_elbo(self.average, self.validation, seed=self.config.seed)
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
        x, generator = self._batch(t)
        with seeded(self.device, config.seed, Purpose.PRETRAIN_DROPOUT, t):  # dropout draws from the global generator
            log_likelihood, kl = _elbo_terms(self.backbone, x, generator)
        beta = min(1.0, (t + 1) / max(1.0, config.kl_warmup * config.iterations))
        loss = self._loss(log_likelihood, kl, beta)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), config.gradient_clip)
        require_finite("the ELBO or its gradient", t, loss, norm)
        if not config.gradient_skip or float(norm) < config.gradient_skip:
            self._take_step()
        self.iteration += 1
        return {
            "iteration": self.iteration,
            "train_elbo": float((log_likelihood - kl.sum(1)).mean().detach()),
            "beta": beta,
        }

    def _take_step(self) -> None:
        """Change the weights, and their average with them."""
        config = self.config
        self.optimizer.step()
        # Once β is 1 the objective no longer changes, and averaging begins.
        settled = self.iteration + 1 > max(1, config.iterations * config.kl_warmup)
        update_average_with_buffers(self.average, self.backbone, config.ema, settled=settled)

    def _loss(self, log_likelihood: Tensor, kl: Tensor, beta: float) -> Tensor:
        """The loss: the negative ELBO from log p(x|z) (B,) and KL (B, L), weighted and regularised by the settings."""
        config = self.config
        charged = kl if config.free_nats_per == "image" else kl.mean(0, keepdim=True)
        per_group = charged.clamp(min=config.free_nats).mean(0)
        if config.kl_balance and beta < 1:
            per_group = balance(kl, self.backbone.groups) * per_group
        loss = beta * per_group.sum() - log_likelihood.mean()
        if config.regularization:
            loss = loss + config.regularization * self.backbone.regularization()
        return loss

    def _batch(self, iteration: int) -> tuple[Tensor, Generator]:
        """The observations of an iteration, and the generator that then draws their latents."""
        config = self.config
        generator = derived_generator(config.seed, Purpose.PRETRAIN_BATCH, iteration, device=self.device)
        indices = batch_indices(len(self.images), config.batch_size, iteration, config.seed)
        return _observed(self.backbone, self.images, indices, generator, flip=config.flip), generator

    def state(self) -> dict[str, Any]:
        norm = torch.nn.utils.get_total_norm(self.backbone.parameters())
        require_finite("the norm of the weights", self.iteration, norm)
        return super().state()

    def translated(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        average = state.get("average")
        return {**state, "average": _average_weights(average)} if isinstance(average, Mapping) else state


def evaluate_elbo(backbone: Backbone, images: Images, *, seed: int = 0, batch_size: int = 500) -> Elbo:
    """One-sample ELBO of all `images`, in nats per image: one observation and one posterior draw each."""
    device = next(backbone.parameters()).device
    log_likelihood: list[Tensor] = []
    kl: list[Tensor] = []
    with torch.no_grad():
        for number, indices in enumerate(torch.split(torch.arange(len(images)), batch_size)):
            generator = derived_generator(seed, Purpose.ELBO, number, device=device)
            x = _observed(backbone, images, indices, generator)
            for part, found in zip((log_likelihood, kl), _elbo_terms(backbone, x, generator), strict=True):
                part.append(found.double().cpu())
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


def _optimizer(backbone: Backbone, config: PretrainConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamax":
        return torch.optim.Adamax(backbone.parameters(), **settings)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(backbone.parameters(), **settings)


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
