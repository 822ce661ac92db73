"""Settings of pretraining."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ebm_prior.errors import ConfigurationError
from ebm_prior.settings import require_choices, require_positive, require_seed


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of the first stage; the defaults train the bundled HVAE."""

    iterations: int = field(default=12_000, metadata={"help": "gradient steps"})
    batch_size: int = field(default=128, metadata={"help": "images per step"})
    optimizer: Literal["adam", "adamax"] = field(default="adam", metadata={"help": "NVAE's and BIVA's is adamax"})
    epsilon: float = field(default=1e-8, metadata={"help": "of the optimizer's denominator; NVAE's is 1e-3"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak rate of the optimizer"})
    rate_warmup: float = field(default=0.0, metadata={"help": "share of the run over which the rate rises from 0"})
    decay: bool = field(default=True, metadata={"help": "let the rate fall to 0 along a cosine"})
    weight_decay: float = field(default=0.0, metadata={"help": "of the optimizer, in the gradient (L2)"})
    kl_warmup: float = field(default=0.1, metadata={"help": "share of the run over which β rises from 0 to 1"})
    kl_balance: bool = field(default=False, metadata={"help": "weigh the groups' KL evenly while β < 1"})
    free_nats: float = field(default=0.0, metadata={"help": "KL per group (nats) that costs nothing"})
    free_nats_per: Literal["batch", "image"] = field(
        default="batch", metadata={"help": "whose KL they are free of: the batch's mean, or each image's (BIVA)"}
    )
    regularization: float = field(default=0.0, metadata={"help": "times what the adapter regularises, e.g. NVAE"})
    flip: bool = field(default=False, metadata={"help": "mirror half of the images, as suits natural ones"})
    channels_last: bool = field(default=False, metadata={"help": "memory layout, for many networks faster on a CPU"})
    ema: float = field(default=0.999, metadata={"help": "decay of the weights' moving average"})
    gradient_clip: float = field(default=200.0, metadata={"help": "largest gradient norm"})
    checkpoint_every: int = field(default=1_000, metadata={"help": "iterations between states, metrics and pictures"})
    seed: int = field(default=0, metadata={"help": "seed of everything random"})

    def __post_init__(self) -> None:
        require_positive(
            self, "iterations", "batch_size", "learning_rate", "epsilon", "gradient_clip", "checkpoint_every"
        )
        require_seed(self)
        require_choices(self)
        if not (0 <= self.kl_warmup <= 1 and 0 <= self.rate_warmup <= 1 and 0 <= self.ema < 1):
            raise ConfigurationError(
                f"expected kl_warmup and rate_warmup in [0, 1], ema in [0, 1); found {self.kl_warmup}, "
                f"{self.rate_warmup}, {self.ema}"
            )
        for name in ("free_nats", "weight_decay", "regularization"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} must be finite and not negative, found {getattr(self, name)}")
