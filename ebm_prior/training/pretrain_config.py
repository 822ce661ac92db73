"""Settings of pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ebm_prior.settings import (
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

    iterations: int = setting(12_000, "gradient steps")
    batch_size: int = setting(128, "images per step")
    optimizer: Literal["adam", "adamax"] = setting("adam", "NVAE's and BIVA's is adamax")
    epsilon: float = setting(1e-8, "added to the optimizer's denominator; NVAE's is 1e-3")
    learning_rate: float = setting(2e-3, "peak rate of the optimizer")
    rate_warmup: float = setting(0.0, "share of the run over which the rate rises from 0")
    decay: bool = setting(True, "let the rate fall to 0 along a cosine")
    weight_decay: float = setting(0.0, "weight decay of the optimizer, in the gradient (L2)")
    kl_warmup: float = setting(0.1, "share of the run over which β rises from 0 to 1")
    kl_balance: bool = setting(False, "weigh the groups' KL evenly while β < 1")
    free_nats: float = setting(0.0, "KL per group (nats) that costs nothing")
    free_nats_per: Literal["batch", "image"] = setting(
        "batch", "free nats are compared with the batch's mean KL, or with each image's (BIVA)"
    )
    regularization: float = setting(0.0, "weight of the adapter's own regularisation, e.g. NVAE's")
    flip: bool = setting(False, "mirror half of the images, as suits natural ones")
    channels_last: bool = setting(False, "memory layout, for many networks faster on a CPU")
    ema: float = setting(0.999, "decay of the weights' moving average")
    gradient_clip: float = setting(200.0, "largest gradient norm")
    checkpoint_every: int = setting(1_000, "iterations between states, metrics and pictures")
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(
            self, "iterations", "batch_size", "learning_rate", "epsilon", "gradient_clip", "checkpoint_every"
        )
        require_seed(self)
        require_shares(self, "kl_warmup", "rate_warmup")
        require_shares(self, "ema", open=True)
        require_not_negative(self, "free_nats", "weight_decay", "regularization")
