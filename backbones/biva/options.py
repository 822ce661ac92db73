"""What a person can say of a BIVA: the options that build it, from JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from ebm_prior.backbones.biva_family.layers import Activation, Shape
from ebm_prior.backbones.biva_family.paths import identity, require_model_options
from ebm_prior.backbones.options import record, require_count, require_counts, require_flag

from ebm_prior.errors import ConfigurationError

KINDS = ("biva", "lvae", "vae")
LOG_VARIANCES: dict[str, Activation] = {"softplus": F.softplus, "tanh": torch.tanh, "none": identity}


@dataclass(frozen=True)
class Block:
    """A gated residual block: output channels, kernel size, stride."""

    filters: int
    kernel: int = 3
    stride: int = 1

    def __post_init__(self) -> None:
        require_counts(self, "filters", "kernel", "stride")


@dataclass(frozen=True)
class Latent:
    """A latent group: a map of `features` channels from a convolution of size `kernel`; a vector if that is None."""

    features: int
    kernel: int | None = None

    def __post_init__(self) -> None:
        require_counts(self, "features", *(["kernel"] if self.kernel is not None else []))


@dataclass(frozen=True)
class StageSpec:
    """One stage: its inference blocks in order (the generator runs them reversed and transposed), and its latent."""

    blocks: Sequence[Block]
    latent: Latent

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, (list, tuple)) or not self.blocks:
            raise ConfigurationError(f"StageSpec.blocks: expected a list of at least one block, found {self.blocks!r}")
        object.__setattr__(self, "blocks", [record(Block, block) for block in self.blocks])
        object.__setattr__(self, "latent", record(Latent, self.latent))


@dataclass(frozen=True)
class Architecture:
    """What builds a BIVA.

    image_shape: (C, H, H). likelihood: "bernoulli", or "logistic_mixture" (RGB, with so many `components`).
    stages: from the image up, each {"blocks": [Block options, …], "latent": Latent options}; see `Block`, `Latent`.
    kind: "biva", "lvae" or "vae". log_variance: what the second half of a head's outputs goes through, "softplus"
    (so that every std is above 1), "tanh" or "none". activation: a name of `paths.ACTIVATIONS`. q_dropout, p_dropout:
    in inference and in generator blocks, in train mode only. skips: whether blocks have auxiliary inputs. init_std: of
    every layer's outputs on the first batch that a new network sees. The published 0.01 suits dozens of blocks; a short
    training of three stages of one block each used a single latent group with it, and all of them with 0.3.
    """

    image_shape: Sequence[int]
    likelihood: str
    stages: Sequence[StageSpec]
    kind: str = "biva"
    components: int = 10
    log_variance: str = "softplus"
    activation: str = "ELU"
    q_dropout: float = 0.0
    p_dropout: float = 0.0
    skips: bool = True
    init_std: float = 0.3

    def __post_init__(self) -> None:
        shape = require_model_options(
            self.image_shape, self.likelihood, self.activation, self.q_dropout, self.p_dropout
        )
        object.__setattr__(self, "image_shape", list(shape))
        if not isinstance(self.stages, (list, tuple)) or not self.stages:
            raise ConfigurationError(f"stages: expected a list of at least one stage, found {self.stages!r}")
        object.__setattr__(self, "stages", [record(StageSpec, stage) for stage in self.stages])
        require_count("the number of blocks in all", sum(len(stage.blocks) for stage in self.stages))
        if self.kind not in KINDS:
            raise ConfigurationError(f"kind: expected one of {list(KINDS)}, found {self.kind!r}")
        if self.log_variance not in LOG_VARIANCES:
            raise ConfigurationError(
                f"log_variance: expected one of {list(LOG_VARIANCES)}, found {self.log_variance!r}"
            )
        require_count("components", self.components)
        require_flag("skips", self.skips)
        if not (isinstance(self.init_std, (int, float)) and 0 < self.init_std < math.inf):
            raise ConfigurationError(f"init_std: expected a positive number, found {self.init_std!r}")

    @property
    def shape(self) -> Shape:
        """The image's (C, H, W)."""
        channels, height, width = self.image_shape
        return channels, height, width

    @property
    def image_channels(self) -> int:
        """The number of parameters of p(x | z) per pixel."""
        return 10 * self.components if self.likelihood == "logistic_mixture" else self.image_shape[0]
