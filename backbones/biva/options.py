"""The options that build a BIVA, as dataclasses that read JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from ebm_prior.backbones.biva_family.layers import Activation, Shape
from ebm_prior.backbones.biva_family.paths import identity, require_model_options
from ebm_prior.backbones.options import (
    record,
    require_choice,
    require_count,
    require_flag,
    require_list,
    require_number,
    require_option_counts,
)

KINDS = ("biva", "lvae", "vae")
LOG_VARIANCES: dict[str, Activation] = {"softplus": F.softplus, "tanh": torch.tanh, "none": identity}


@dataclass(frozen=True)
class Block:
    """A gated residual block: output channels, kernel size, stride."""

    filters: int
    kernel: int = 3
    stride: int = 1

    def __post_init__(self) -> None:
        require_option_counts(self, "filters", "kernel", "stride")


@dataclass(frozen=True)
class Latent:
    """A latent group: a map of `features` channels from a convolution of size `kernel`; a vector if that is None."""

    features: int
    kernel: int | None = None

    def __post_init__(self) -> None:
        require_option_counts(self, "features", *(["kernel"] if self.kernel is not None else []))


@dataclass(frozen=True)
class StageSpec:
    """One stage: its inference blocks in order (the generator runs them reversed and transposed), and its latent."""

    blocks: Sequence[Block]
    latent: Latent

    def __post_init__(self) -> None:
        require_list("StageSpec.blocks", self.blocks, of="block")
        object.__setattr__(self, "blocks", [record(Block, block) for block in self.blocks])
        object.__setattr__(self, "latent", record(Latent, self.latent))


@dataclass(frozen=True)
class Architecture:
    """The arguments of a BIVA.

    image_shape: (C, H, H). likelihood: "bernoulli", or "logistic_mixture" (RGB, with `components` components).
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
        require_list("stages", self.stages, of="stage")
        object.__setattr__(self, "stages", [record(StageSpec, stage) for stage in self.stages])
        require_count("the number of blocks in all", sum(len(stage.blocks) for stage in self.stages))
        require_choice("kind", self.kind, KINDS)
        require_choice("log_variance", self.log_variance, LOG_VARIANCES)
        require_count("components", self.components)
        require_flag("skips", self.skips)
        require_number("init_std", self.init_std, 1e-6, 1e3)

    @property
    def shape(self) -> Shape:
        """The image's (C, H, W)."""
        channels, height, width = self.image_shape
        return channels, height, width

    @property
    def image_channels(self) -> int:
        """The number of parameters of p(x | z) per pixel."""
        return 10 * self.components if self.likelihood == "logistic_mixture" else self.image_shape[0]
