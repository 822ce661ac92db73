"""First stage: train a hierarchical VAE of any adapter by maximising its ELBO.

    ELBO = E_q[log p(x|z)] − β Σ_i max(KL_i, free nats),   KL_i = E_q[log q(z_i|x, z_<i) − log p_β(z_i|z_<i)]

with one posterior draw per image, KL warm-up (β from 0 to 1), Adam, gradient clipping, a learning rate that decays to
zero along a cosine, and an exponential moving average of the weights, which is what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ebm_prior.backbone import Backbone
from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.randomness import Generator, derived_generator, seeded
from ebm_prior.training import Callback, Images, Recorder, batch_indices, require_positive


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of the first stage; the defaults train the bundled HVAE."""

    iterations: int = field(default=12_000, metadata={"help": "gradient steps"})
    batch_size: int = field(default=128, metadata={"help": "images per step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak rate of Adam"})
    kl_warmup: float = field(default=0.1, metadata={"help": "share of the run over which β rises from 0 to 1"})
    free_nats: float = field(default=0.0, metadata={"help": "KL per group (nats) that costs nothing"})
    ema: float = field(default=0.999, metadata={"help": "decay of the weights' moving average"})
    gradient_clip: float = field(default=200.0, metadata={"help": "largest gradient norm"})
    checkpoint_every: int = field(default=1_000, metadata={"help": "iterations between states, metrics and pictures"})
    seed: int = field(default=0, metadata={"help": "seed of everything random"})

    def __post_init__(self) -> None:
        require_positive(self, "iterations", "batch_size", "learning_rate", "gradient_clip", "checkpoint_every")
        if not (0 <= self.kl_warmup <= 1 and 0 <= self.ema < 1 and self.free_nats >= 0):
            raise ConfigurationError(
                f"expected kl_warmup in [0, 1], ema in [0, 1), free_nats >= 0; found {self.kl_warmup}, {self.ema}, "
                f"{self.free_nats}"
            )


class Elbo(NamedTuple):
    """One-sample ELBO and its parts, in nats per image."""

    elbo: float
    log_likelihood: float
    kl: list[float]  # per group, generation order


def build(kind: type[Backbone], architecture: Mapping[str, Any], *, seed: int = 0) -> Backbone:
    """An untrained network of adapter class `kind`, whose initial weights depend on the seed alone."""
    with seeded(torch.device("cpu"), seed, 0):
        try:
            return kind(**architecture)
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigurationError(f"{kind.__name__} cannot build {architecture}: {error}") from error


def pretrain(
    backbone: Backbone,
    images: Images,
    config: PretrainConfig,
    *,
    run: Recorder | None = None,
    validation: Images | None = None,
    on_step: Callback | None = None,
    on_checkpoint: Callback | None = None,
) -> Backbone:
    """Train `backbone` in place on `images`; returns the moving average of its weights, frozen and in eval mode.

    With a `run`, state and metrics are written every `checkpoint_every` iterations and the run goes on from its last
    state. `validation`: images whose ELBO is logged there. `on_checkpoint` gets {"iteration", "backbone"}: the average.
    Raises DivergenceError when the loss is not finite.
    """
    device = next(backbone.parameters()).device
    backbone.train().requires_grad_(True)
    state = run.load_state() if run else None
    if state is None:
        with seeded(device, config.seed, 1), torch.no_grad():  # data-dependent initialisation, where there is one
            x, generator = _batch(backbone, images, config, 0, device)
            backbone.infer(x, generator=generator)
    average = AveragedModel(backbone, multi_avg_fn=get_ema_multi_avg_fn(config.ema))  # type: ignore[no-untyped-call]
    optimizer = torch.optim.Adam(backbone.parameters(), lr=config.learning_rate)
    first = 0
    if state is not None:
        backbone.load_state_dict(state["backbone"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["iteration"]

    for iteration in range(first, config.iterations):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))
        x, generator = _batch(backbone, images, config, iteration, device)
        with seeded(device, config.seed, 2, iteration):  # dropout draws from the global generator
            log_likelihood, kl = _elbo_terms(backbone, x, generator)
        beta = min(1.0, (iteration + 1) / max(1.0, config.kl_warmup * config.iterations))
        loss = beta * kl.mean(0).clamp(min=config.free_nats).sum() - log_likelihood.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(backbone.parameters(), config.gradient_clip)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise DivergenceError(
                f"the ELBO is not finite at iteration {iteration}: lower the learning rate "
                f"(now {config.learning_rate:g}) or raise kl_warmup; the run's last state is intact"
            )
        optimizer.step()
        if iteration + 1 <= config.iterations * config.kl_warmup:
            average.n_averaged.zero_()  # averaging begins when the objective has settled
        average.update_parameters(backbone)
        done = iteration + 1
        elbo = float((log_likelihood - kl.sum(1)).mean().detach())
        if on_step:
            on_step({"iteration": done, "iterations": config.iterations, "elbo": elbo})
        if run and (done % config.checkpoint_every == 0 or done == config.iterations):
            kept = _frozen(average)
            measured = evaluate_elbo(kept, validation, seed=config.seed)._asdict() if validation is not None else {}
            run.log({"iteration": done, "train_elbo": elbo, "beta": beta, **measured})
            if on_checkpoint:
                on_checkpoint({"iteration": done, "backbone": kept})
            run.save_state(
                {
                    "iteration": done,
                    "backbone": backbone.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
            )
    return _frozen(average).requires_grad_(False)


def evaluate_elbo(backbone: Backbone, images: Images, *, seed: int = 0, batch_size: int = 500) -> Elbo:
    """One-sample ELBO of all `images`, in nats per image: one observation and one posterior draw each."""
    device = next(backbone.parameters()).device
    log_likelihood: list[Tensor] = []
    kl: list[Tensor] = []
    with torch.no_grad():
        for number, indices in enumerate(torch.split(torch.arange(len(images)), batch_size)):
            generator = derived_generator(seed, 0xE1B0, number, device=device)
            x = backbone.observe(images.batch(indices).to(device), generator=generator)
            for part, found in zip((log_likelihood, kl), _elbo_terms(backbone, x, generator), strict=True):
                part.append(found.double().cpu())
    total, groups = torch.cat(log_likelihood).mean(), torch.cat(kl).mean(0)
    return Elbo(float(total - groups.sum()), float(total), groups.tolist())


def training_record(config: PretrainConfig, images: Images, elbo: Elbo | None) -> Mapping[str, Any]:
    """What the own form of a trained backbone says about its making."""
    return {
        "stage": "pretrain",
        "config": asdict(config),
        "data": {"name": images.name, "images": len(images)},
        "test_elbo": None if elbo is None else elbo._asdict(),
    }


def _batch(
    backbone: Backbone, images: Images, config: PretrainConfig, iteration: int, device: torch.device
) -> tuple[Tensor, Generator]:
    generator = derived_generator(config.seed, 3, iteration, device=device)
    x = images.batch(batch_indices(len(images), config.batch_size, iteration, config.seed)).to(device)
    return backbone.observe(x, generator=generator), generator


def _elbo_terms(backbone: Backbone, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """log p(x|z) (B,) and the one-sample KL per group (B, L), in nats."""
    posterior = backbone.infer(x, generator=generator)
    return backbone.likelihood(posterior.features).log_prob(x), posterior.log_q - posterior.log_p


def _frozen(average: AveragedModel) -> Backbone:
    kept = average.module
    if not isinstance(kept, Backbone):
        raise TypeError(f"expected a Backbone, found {type(kept)}")
    return kept.eval()
