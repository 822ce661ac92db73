"""The network of HVAE (Havtorn et al., 2021), with the official module and parameter names.

Stages are numbered from the image: stage 0 holds z1, the last one the top latent zL. The encoder is a chain,
x → h_1 → z1 → h_2 → z2 → …, the generator runs down from zL; block t of a lower stage is also offered the output of
block t − n, where n is the number of the top stage's blocks and t counts all generator blocks from the top.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from ebm_prior.backbones.biva_family.layers import Activation, Dense, ResidualBlock, SameConv2d, Shape
from ebm_prior.backbones.biva_family.paths import GenerativePath, InferencePath, Skips, chain, require_meeting_shapes
from ebm_prior.backbones.likelihoods import Bernoulli, LogisticMixture
from ebm_prior.backbones.options import record, require_flag, require_list, require_option_counts
from torch import Tensor, nn

from ebm_prior.errors import ConfigurationError, shown
from ebm_prior.model.backbone import Draw, Gaussian

MIXTURE_CHANNELS = 100  # ten components of ten parameters


@dataclass(frozen=True)
class Block:
    """A residual block: output channels, kernel size, stride; gated: times a sigmoid of as many further outputs."""

    filters: int
    kernel: int
    stride: int = 1
    gated: bool = False
    weight_norm: bool = True

    def __post_init__(self) -> None:
        require_option_counts(self, "filters", "kernel", "stride")
        require_flag("Block.gated", self.gated)
        require_flag("Block.weight_norm", self.weight_norm)


@dataclass(frozen=True)
class Latent:
    """A latent group: a map of `features` channels from a convolution of size `kernel`; a vector if that is None."""

    features: int
    kernel: int | None = None
    weight_norm: bool = True
    learned_prior: bool = False  # at the top: mean and spread of p(zL) are parameters

    def __post_init__(self) -> None:
        require_option_counts(self, "features", *(["kernel"] if self.kernel is not None else []))
        require_flag("Latent.weight_norm", self.weight_norm)
        require_flag("Latent.learned_prior", self.learned_prior)


@dataclass(frozen=True)
class Options:
    """Options that all stages share."""

    activation: Activation
    q_dropout: float
    p_dropout: float
    skips: bool


@dataclass(frozen=True)
class StageSpec:
    """One stage: its inference blocks in order (the generator runs them reversed and transposed), and its latent."""

    blocks: tuple[Block, ...]
    latent: Latent


def stage_spec(options: Any) -> StageSpec:
    """A stage from its JSON form. Raises ConfigurationError."""
    if not isinstance(options, Mapping) or set(options) != {"blocks", "latent"} or not options["blocks"]:
        raise ConfigurationError(f"expected a stage with blocks (at least one) and a latent, found {shown(options)}")
    require_list("blocks", options["blocks"], of="block")
    return StageSpec(tuple(record(Block, b) for b in options["blocks"]), record(Latent, options["latent"]))


class StdInverseConstants(nn.Module):
    """Two constants that official files hold in every stage and that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("beta", torch.full((1,), math.log(2)))
        self.register_buffer("threshold", torch.full((1,), 20.0))


class GaussianHead(nn.Module):
    """q(z | h) and p(z | d), from activated features; at the top p(z) is a constant: N(0, I) unless it is learned."""

    def __init__(self, latent: Latent, in_shape: Shape, activation: Activation, *, top: bool) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = (latent.features, *(in_shape[1:] if latent.kernel else ()))
        self.activation = activation
        self.std_activation_inverse = StdInverseConstants()
        self.in_transform_q = self._transform(latent, in_shape)
        if not top:
            self.in_transform_p = self._transform(latent, in_shape)
            return
        logits = torch.zeros(2 * latent.features, *self.shape[1:])
        if latent.learned_prior:
            self.prior_logits: Tensor = nn.Parameter(logits)
        else:
            self.register_buffer("prior_logits", logits)

    @staticmethod
    def _transform(latent: Latent, in_shape: Shape) -> nn.Module:
        if latent.kernel is None:
            return Dense(math.prod(in_shape), 2 * latent.features, weight_norm=latent.weight_norm)
        return SameConv2d(in_shape[0], 2 * latent.features, latent.kernel, weight_norm=latent.weight_norm)

    def posterior(self, h: Tensor) -> Gaussian:
        """q(z | h) for features (B, *in_shape)."""
        return self._gaussian(self.in_transform_q(self.activation(h)))

    def prior(self, d: Tensor | None) -> Gaussian:
        """p(z | d) for features (B, *in_shape); None at the top, where the batch axis is 1."""
        return self._gaussian(self.prior_logits[None] if d is None else self.in_transform_p(self.activation(d)))

    @staticmethod
    def _gaussian(logits: Tensor) -> Gaussian:
        mean, spread = logits.chunk(2, dim=1)
        return Gaussian(mean, F.softplus(spread, beta=math.log(2)).clamp(min=1e-6))  # log2(1 + 2^s): 1 at 0


class Projection(nn.Module):
    """Dense layer from a latent vector to a feature map."""

    def __init__(self, features: int, out_shape: Shape) -> None:
        super().__init__()
        self.out_shape = out_shape
        self.transform = Dense(features, math.prod(out_shape))

    def forward(self, z: Tensor) -> Tensor:
        """(B, features) to (B, *out_shape)."""
        y: Tensor = self.transform(z)
        return y.view(-1, *self.out_shape)


class Stage(nn.Module):
    """One latent group with its two paths: up from `image_shape` or the stage `below`, down to the same."""

    def __init__(
        self, spec: StageSpec, image_shape: Shape, below: Stage | None, options: Options, *, top: bool
    ) -> None:
        super().__init__()
        up = chain(
            ResidualBlock,
            spec.blocks,
            image_shape if below is None else below.latent_map_shape,
            first_residual=below is not None,
            transposed=False,
            aux_shape=below.h_shape if below is not None and options.skips else None,
            activation=options.activation,
            dropout=options.q_dropout,
        )
        h_shape = up[-1].out_shape
        self.h_shape: Shape = h_shape
        self.q_deterministic = InferencePath(up)
        self.stochastic = GaussianHead(spec.latent, h_shape, options.activation, top=top)
        # What the paths beyond the latent start from: a latent map as it is, a vector through a dense layer.
        self.latent_map_shape: Shape
        self.q_projection: nn.Module
        self.p_projection: nn.Module
        if spec.latent.kernel is None:
            self.latent_map_shape = h_shape
            self.q_projection = q_projection = Projection(spec.latent.features, h_shape)
            self.p_projection = Projection(spec.latent.features, h_shape)
            if top:  # in the official files, but nothing reads its output, so that no data ever initialises it
                q_projection.transform.initialized.fill_(True)
        else:
            self.latent_map_shape = (spec.latent.features, *h_shape[1:])
            self.q_projection = nn.Identity()
            self.p_projection = nn.Identity()
        down = chain(
            ResidualBlock,
            spec.blocks[::-1],
            self.latent_map_shape,
            first_residual=False,
            transposed=True,
            aux_shape=h_shape if options.skips and not top else None,
            activation=options.activation,
            dropout=options.p_dropout,
        )
        self.p_deterministic = GenerativePath(down)


class LikelihoodHead(nn.Module):
    """The last convolution: features (B, C, H, W) to the parameters of p(x | z)."""

    def __init__(self, kind: str, in_channels: int, colours: int, activation: Activation, weight_norm: bool) -> None:
        super().__init__()
        self.kind, self.activation = kind, activation
        if kind == "bernoulli":
            self.parameter_net = SameConv2d(in_channels, colours, 3, weight_norm=weight_norm)
        else:
            self.parameter_net = SameConv2d(in_channels, MIXTURE_CHANNELS, 1, weight_norm=weight_norm)

    def forward(self, features: Tensor) -> Bernoulli | LogisticMixture:
        """p(x | z)."""
        if self.kind == "bernoulli":
            return Bernoulli(self.parameter_net(self.activation(features)))
        return LogisticMixture(self.parameter_net(features))  # without the activation, as published


class Features(NamedTuple):
    """The inputs of the image head: z1 (B, *shape), and the skip inputs of the blocks of stage 0."""

    z: Tensor
    skips: tuple[Tensor, ...]


class Network(nn.Module):
    """The stages, bottom first, and the likelihood: the official module tree."""

    def __init__(self, image_shape: Shape, likelihood: str, specs: Sequence[StageSpec], options: Options) -> None:
        super().__init__()
        stages: list[Stage] = []
        for i, spec in enumerate(specs):
            below = stages[-1] if stages else None
            stages.append(Stage(spec, image_shape, below, options, top=i == len(specs) - 1))
        require_meeting_shapes((stage.h_shape, stage.p_deterministic) for stage in reversed(stages))
        self.stages = nn.ModuleList(stages)
        self.likelihood = LikelihoodHead(
            likelihood,
            specs[0].blocks[0].filters,
            image_shape[0],
            options.activation,
            specs[-1].blocks[-1].weight_norm,
        )

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """z (B, *shape) and log q (B,) of every group, bottom first; `noise` likewise."""
        z: list[Tensor] = []
        log_q: list[Tensor] = []
        x, h = images, None
        for stage, xi in zip(self.bottom_up, noise, strict=True):
            h = stage.q_deterministic(x, h)
            q = stage.stochastic.posterior(h)
            z.append(q.mean + q.std * xi)
            log_q.append(q.log_prob(z[-1]))
            if len(z) < len(self.stages):
                x = stage.q_projection(z[-1])
        return z, log_q

    def generate(self, draw: Draw) -> Features:
        """Draw every group from the top down, and stop there."""
        above = self.bottom_up[1:]
        skips: Skips = deque(maxlen=self.skip_length)
        d: Tensor | None = None
        for index, stage in enumerate(reversed(above)):
            z = draw(index, stage.stochastic.prior(d), None)
            d = stage.p_deterministic(stage.p_projection(z), skips)
        z = draw(len(above), self.bottom_up[0].stochastic.prior(d), None)
        return Features(z, tuple(skips))

    def image(self, features: Features) -> Bernoulli | LogisticMixture:
        """p(x | z): the blocks of stage 0 and the likelihood. Leaves `features` as they are."""
        bottom = self.bottom_up[0]
        skips: Skips = deque(features.skips, maxlen=self.skip_length)
        distribution: Bernoulli | LogisticMixture = self.likelihood(
            bottom.p_deterministic(bottom.p_projection(features.z), skips)
        )
        return distribution

    @property
    def skip_length(self) -> int:
        """The number of the top stage's blocks."""
        return len(self.bottom_up[-1].p_deterministic.layers)

    @property
    def bottom_up(self) -> list[Stage]:
        """The stages in order, with their type."""
        return cast(list[Stage], list(self.stages))
