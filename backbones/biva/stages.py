"""The stages of BIVA (Maaløe et al., 2019) and of the LVAE and VAE of its code, with the official parameter names.

The three kinds share the way down and differ in their latents and in the way up:

    VAE    x → h1 → z1 → h2 → z2 → …: every latent is drawn on the way up
    LVAE   x → h1 → h2 → …: none is; each is drawn on the way down, from its h merged with the features from above
    BIVA   two ways up: x → h_bu1 → z1_bu → h_bu2 → … draws, x → h_td1 → h_td2 → … does not and leads to the z_td that
           are drawn on the way down; a stage has one latent of each sort, the top stage one alone, of both ways
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from ebm_prior.backbones.biva.options import LOG_VARIANCES, Architecture, Latent, StageSpec
from ebm_prior.backbones.biva_family.layers import Dense, ResidualBlock, SameConv2d, Shape
from ebm_prior.backbones.biva_family.paths import ACTIVATIONS, GenerativePath, InferencePath, chain
from torch import Tensor, nn

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Gaussian

MERGE_KERNEL = 3  # BIVA's; LVAE takes that of the stage's last block


class GatedBlock(ResidualBlock):
    """The block of BIVA: gated, with a layer for any auxiliary input, and no shortcut that would have to add channels.

    Its input is (B, *in_shape), its auxiliary input (B, *aux_shape).
    """

    every_aux_has_layer = True

    def __init__(self, in_shape: Shape, filters: int, kernel: int, stride: int = 1, **options: Any) -> None:
        super().__init__(in_shape, filters, kernel, stride, gated=True, **options)
        self.shortcut = self.shortcut and in_shape[0] >= filters


class Head(nn.Module):
    """q(z | h) and p(z | d), with std = exp(½ log variance), not clamped; at the top p(z) is a constant, N(0, I)."""

    prior: Tensor | None

    def __init__(self, latent: Latent, in_shape: Shape, a: Architecture, *, top: bool = False) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = (latent.features, *(in_shape[1:] if latent.kernel else ()))
        self.activation, self.log_variance = ACTIVATIONS[a.activation], LOG_VARIANCES[a.log_variance]
        self.qx2z = self._map(latent, in_shape, a)
        self.register_buffer("prior", torch.zeros(2 * latent.features, *self.shape[1:]) if top else None)
        if not top:
            self.px2z = self._map(latent, in_shape, a)

    @staticmethod
    def _map(latent: Latent, in_shape: Shape, a: Architecture) -> nn.Module:
        if latent.kernel is None:
            return Dense(math.prod(in_shape), 2 * latent.features, init_std=a.init_std)
        return SameConv2d(in_shape[0], 2 * latent.features, latent.kernel, init_std=a.init_std)

    def q(self, h: Tensor) -> Gaussian:
        """q(z | h) for features (B, *in_shape)."""
        return self._gaussian(self.qx2z(self.activation(h)))

    def p(self, d: Tensor | None) -> Gaussian:
        """p(z | d) for features (B, *in_shape); None at the top, where the batch axis is 1."""
        if d is not None:
            return self._gaussian(self.px2z(self.activation(d)))
        if self.prior is None:
            raise ConfigurationError("a stage below the top expects the features of the stage above, found none")
        mean, log_variance = self.prior[None].chunk(2, dim=1)
        return Gaussian(mean, (log_variance / 2).exp())

    def _gaussian(self, raw: Tensor) -> Gaussian:
        mean, spread = raw.chunk(2, dim=1)
        return Gaussian(mean, (self.log_variance(spread) / 2).exp())


class Projection(nn.Module):
    """Dense layer from a latent vector to a feature map."""

    def __init__(self, features: int, out_shape: Shape, a: Architecture) -> None:
        super().__init__()
        self.out_shape = out_shape
        self.linear = Dense(features, math.prod(out_shape), init_std=a.init_std)

    def forward(self, z: Tensor) -> Tensor:
        """(B, features) to (B, *out_shape)."""
        y: Tensor = self.linear(z)
        return y.view(-1, *self.out_shape)


def projection(latent: Latent, count: int, h_shape: Shape, a: Architecture) -> tuple[nn.Module, Shape]:
    """`count` latents, one behind the other, as features, and their shape: a vector needs a dense layer, a map none."""
    if latent.kernel is None:
        return Projection(count * latent.features, h_shape, a), h_shape
    return nn.Identity(), (count * latent.features, *h_shape[1:])


def options_of(a: Architecture, dropout: float, aux_shape: Shape | None, *, transposed: bool = False) -> dict[str, Any]:
    """The options that all blocks of a stage share."""
    return {
        "activation": ACTIVATIONS[a.activation],
        "init_std": a.init_std,
        "dropout": dropout,
        "aux_shape": aux_shape,
        "transposed": transposed,
    }


def way_up(spec: StageSpec, in_shape: Shape, aux: Shape | None, a: Architecture, *, bottom: bool) -> InferencePath:
    """A stage's blocks in order."""
    options = options_of(a, a.q_dropout, aux)
    return InferencePath(chain(GatedBlock, spec.blocks, in_shape, first_residual=not bottom, **options))


def way_down(spec: StageSpec, in_shape: Shape, aux: Shape | None, a: Architecture) -> GenerativePath:
    """A stage's blocks reversed and transposed."""
    options = options_of(a, a.p_dropout, aux, transposed=True)
    return GenerativePath(chain(GatedBlock, spec.blocks[::-1], in_shape, first_residual=False, **options))


Drawn = tuple[Tensor, Tensor]
"""A posterior draw z (B, *shape) and its log q (B,)."""
Conditional = Callable[[Tensor | None], Drawn]
"""A group's posterior draw as a function of its prior's features d; draws of the bottom-up pass ignore d."""


def draw(q: Gaussian, noise: Tensor) -> Drawn:
    """z = mean + std·ξ and log q(z)."""
    z = q.mean + q.std * noise
    return z, q.log_prob(z)


class Rising(NamedTuple):
    """The inputs of a stage on the way up."""

    x: Tensor  # the image; above it the latent of the stage below as features, or the features themselves (LVAE)
    td: Tensor  # the image; above it the features of the stage below on BIVA's second way
    aux: Tensor | None  # all features of the stage below, the auxiliary input of the blocks


class Stage(nn.Module, ABC):
    """A stage with its latent groups and its ways up from, and down to, the image or the stage below."""

    sides: ClassVar[tuple[str, ...]] = ("",)  # of the latent groups, in generation order
    h_shape: Shape  # of the features on a way up, and of what the stage above generates
    x_shape: Shape  # of what the stage above starts from
    aux_shape: Shape  # of what the stage above is offered
    p_convs: GenerativePath

    @property
    @abstractmethod
    def heads(self) -> list[Head]:
        """One per latent group, in generation order."""

    @abstractmethod
    def rise(self, below: Rising, noise: Sequence[Tensor]) -> tuple[Rising, list[Conditional]]:
        """What the stage above starts from, and the posterior of each group; `noise`, too, in generation order."""

    @abstractmethod
    def start(self, z: Sequence[Tensor]) -> Tensor:
        """What the way down starts from: features of the stage's latents, in generation order."""


class SingleStage(Stage):
    """Base of the stages of VAE and LVAE: one latent, one way up."""

    def __init__(self, spec: StageSpec, in_shape: Shape, below: Stage | None, a: Architecture, *, top: bool) -> None:
        super().__init__()
        aux = below.aux_shape if below is not None and a.skips else None
        self.q_convs = way_up(spec, in_shape, aux, a, bottom=below is None)
        self.h_shape = self.aux_shape = self.q_convs.out_shape
        self.stochastic = Head(spec.latent, self.h_shape, a, top=top)
        self.p_proj, start = projection(spec.latent, 1, self.h_shape, a)
        self.p_convs = way_down(spec, start, self.h_shape if a.skips and not top else None, a)

    @property
    def heads(self) -> list[Head]:
        """The latent's."""
        return [self.stochastic]

    def start(self, z: Sequence[Tensor]) -> Tensor:
        """Features of z."""
        features: Tensor = self.p_proj(z[0])
        return features


class VaeStage(SingleStage):
    """z ~ q(z | h), drawn on the way up, which goes on from it."""

    def __init__(self, spec: StageSpec, below: Stage | None, a: Architecture, *, top: bool) -> None:
        super().__init__(spec, a.shape if below is None else below.x_shape, below, a, top=top)
        self.q_proj, self.x_shape = projection(spec.latent, 1, self.h_shape, a)
        if top and isinstance(self.q_proj, Projection):
            # In the official files, but nothing reads its output, so that no data ever initialises it.
            self.q_proj.linear.initialized.fill_(True)
        self.top = top

    def rise(self, below: Rising, noise: Sequence[Tensor]) -> tuple[Rising, list[Conditional]]:
        """One group, drawn at once."""
        h = self.q_convs(below.x, below.aux)
        drawn = draw(self.stochastic.q(h), noise[0])
        x = h if self.top else self.q_proj(drawn[0])
        return Rising(x, h, h), [lambda _: drawn]


class LvaeStage(SingleStage):
    """z ~ q(z | merge(h, d)), drawn on the way down."""

    def __init__(self, spec: StageSpec, below: Stage | None, a: Architecture, *, top: bool) -> None:
        super().__init__(spec, a.shape if below is None else below.x_shape, below, a, top=top)
        last, aux = spec.blocks[-1], None if top else self.h_shape
        self.x_shape = self.h_shape
        options = options_of(a, a.p_dropout, aux)
        self.merge = GatedBlock(self.h_shape, last.filters, last.kernel, residual=True, **options)

    def rise(self, below: Rising, noise: Sequence[Tensor]) -> tuple[Rising, list[Conditional]]:
        """One group, drawn in the top-down pass, since its posterior needs d."""
        h = self.q_convs(below.x, below.aux)
        return Rising(h, h, h), [lambda d: draw(self.stochastic.q(self.merge(h, d)), noise[0])]


class TwoWayStage(Stage):
    """Base of the stages of BIVA: two ways up, where the second has the features of the first as auxiliary input."""

    def __init__(self, spec: StageSpec, below: Stage | None, a: Architecture, *, top: bool) -> None:
        super().__init__()
        bottom = below is None
        x, td = (a.shape, a.shape) if below is None else (below.x_shape, below.h_shape)
        aux = below.aux_shape if below is not None and a.skips else None
        self.q_bu_convs = way_up(spec, x, aux, a, bottom=bottom)
        h_shape = self.h_shape = self.q_bu_convs.out_shape
        self.q_td_convs = way_up(spec, td, h_shape, a, bottom=bottom)
        self.aux_shape = (2 * h_shape[0], *h_shape[1:])
        self.z_proj, start = projection(spec.latent, len(self.sides), h_shape, a)
        self.p_convs = way_down(spec, start, h_shape if a.skips and not top else None, a)

    def ways(self, below: Rising) -> tuple[Tensor, Tensor]:
        """h_bu and h_td, (B, *h_shape) both."""
        h_bu = self.q_bu_convs(below.x, below.aux)
        return h_bu, self.q_td_convs(below.td, h_bu)

    def start(self, z: Sequence[Tensor]) -> Tensor:
        """Features of the latents, z_td before z_bu."""
        features: Tensor = self.z_proj(torch.cat(list(z), dim=1))
        return features


class BivaStage(TwoWayStage):
    """Below the top: z_bu ~ q(z | h_bu) on the way up, z_td ~ q(z | merge(h_td, d)) on the way down."""

    sides = ("td", "bu")

    def __init__(self, spec: StageSpec, below: Stage | None, a: Architecture) -> None:
        super().__init__(spec, below, a, top=False)
        if spec.blocks[0].filters != spec.blocks[-1].filters:
            raise ConfigurationError(
                f"below the top, a stage's first and last block must have as many filters, for both meet in merge; "
                f"found {spec.blocks[0].filters} and {spec.blocks[-1].filters}"
            )
        self.bu_stochastic = Head(spec.latent, self.h_shape, a)
        self.td_stochastic = Head(spec.latent, self.h_shape, a)
        self.bu_proj, self.x_shape = projection(spec.latent, 1, self.h_shape, a)
        options = options_of(a, a.p_dropout, self.h_shape)
        self.merge = GatedBlock(self.h_shape, self.h_shape[0], MERGE_KERNEL, residual=True, **options)

    @property
    def heads(self) -> list[Head]:
        """z_td's and z_bu's: given d, the two are independent."""
        return [self.td_stochastic, self.bu_stochastic]

    def rise(self, below: Rising, noise: Sequence[Tensor]) -> tuple[Rising, list[Conditional]]:
        """z_bu, drawn at once, and z_td, drawn in the top-down pass, since its posterior needs d."""
        h_bu, h_td = self.ways(below)
        bu = draw(self.bu_stochastic.q(h_bu), noise[1])
        conditionals: list[Conditional] = [
            lambda d: draw(self.td_stochastic.q(self.merge(h_td, d)), noise[0]),
            lambda _: bu,
        ]
        return Rising(self.bu_proj(bu[0]), h_td, torch.cat([h_bu, h_td], dim=1)), conditionals


class BivaTopStage(TwoWayStage):
    """The top: z ~ q(z | q_top(h_bu, h_td)), drawn on the way up."""

    def __init__(self, spec: StageSpec, below: Stage | None, a: Architecture) -> None:
        super().__init__(spec, below, a, top=True)
        self.x_shape = self.h_shape
        kernel, options = spec.blocks[-1].kernel, options_of(a, a.q_dropout, None)
        self.q_top = GatedBlock(self.aux_shape, self.h_shape[0], kernel, residual=True, **options)
        self.stochastic = Head(spec.latent, self.h_shape, a, top=True)

    @property
    def heads(self) -> list[Head]:
        """The latent's."""
        return [self.stochastic]

    def rise(self, below: Rising, noise: Sequence[Tensor]) -> tuple[Rising, list[Conditional]]:
        """One group, drawn at once."""
        joined = torch.cat(self.ways(below), dim=1)
        h = self.q_top(joined)
        drawn = draw(self.stochastic.q(h), noise[0])
        return Rising(h, h, joined), [lambda _: drawn]


def build_stage(spec: StageSpec, below: Stage | None, a: Architecture, *, top: bool) -> Stage:
    """The stage above `below`, of the architecture's kind."""
    if a.kind == "biva":
        return BivaTopStage(spec, below, a) if top else BivaStage(spec, below, a)
    return (VaeStage if a.kind == "vae" else LvaeStage)(spec, below, a, top=top)
