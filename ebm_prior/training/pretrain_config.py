"""Settings of pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ebm_prior.settings import (
    require,
    require_kinds,
    require_not_negative,
    require_positive,
    require_seed,
    require_shares,
    setting,
)


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of pretraining; the defaults train the bundled HVAE."""

    iterations: int = setting(12_000, "Number of gradient steps")
    batch_size: int = setting(128, "Images per gradient step")
    parts: int = setting(
        1, "Parts of a batch, computed one at a time, each with its own batch statistics; more parts need less memory"
    )
    optimizer: Literal["adam", "adamax", "adamw"] = setting(
        "adam", "Optimizer of the weights; NVAE and BIVA were trained with adamax, VDVAE with adamw"
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "Decay rates of the optimizer's two moment estimates; VDVAE uses 0.9 0.9"
    )
    epsilon: float = setting(1e-8, "Constant added to the optimizer's denominator; NVAE uses 1e-3")
    learning_rate: float = setting(2e-3, "Peak learning rate")
    rate_warmup: float = setting(0.0, "Share of the run over which the learning rate rises from 0")
    decay: bool = setting(True, "Let the learning rate fall to 0 along a cosine")
    weight_decay: float = setting(
        0.0, "L2 weight decay of the optimizer, added to the gradient, or with adamw to the step"
    )
    kl_warmup: float = setting(0.1, "Share of the run over which the KL weight β rises from 0 to 1")
    kl_balance: bool = setting(False, "Balance the KL terms of the latent groups while the KL weight β is below 1")
    free_nats: float = setting(0.0, "KL per latent group, in nats, that the loss does not penalise")
    free_nats_per: Literal["batch", "image"] = setting(
        "batch", "Compare the free nats with the batch's mean KL, or with the KL of each image as BIVA does"
    )
    regularization: float = setting(0.0, "Weight of the adapter's own regularisation term, e.g. NVAE's")
    flip: bool = setting(False, "Mirror a random half of the images, which suits natural images")
    channels_last: bool = setting(False, "Store tensors with channels last, which makes many networks faster on a CPU")
    ema: float = setting(0.999, "Decay of the moving average of the weights")
    gradient_clip: float = setting(200.0, "Largest gradient norm; larger gradients are scaled down to it")
    gradient_skip: float = setting(
        0.0, "Gradient norm from which a step is left out, as VDVAE does; 0: no step is left out"
    )
    checkpoint_every: int = setting(
        1_000, "Iterations between two evaluations, each with metrics, a saved state and pictures"
    )
    seed: int = setting(0, "Seed of all random numbers")

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(
            self, "iterations", "batch_size", "learning_rate", "epsilon", "gradient_clip", "checkpoint_every"
        )
        divides = f"must divide the batch of {self.batch_size}"
        require(self, "parts", self.parts >= 1 and self.batch_size % self.parts == 0, divides)
        require_seed(self)
        require_shares(self, "kl_warmup", "rate_warmup")
        require_shares(self, "ema", "betas", open=True)
        require_not_negative(self, "free_nats", "weight_decay", "regularization", "gradient_skip")
