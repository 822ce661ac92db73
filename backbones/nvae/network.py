"""The network of NVAE (Vahdat & Kautz, 2020), with the official module and parameter names.

Bottom-up scale s = 0 … S − 1 has side R/2^(P+s); the top-down path begins with the top scale, s = S − 1. A tower is one
list of cells and combiners, one combiner per latent group: the encoder's, which joins the two paths, and the decoder's,
which takes z in. The top group (index 0) has no encoder combiner, the bottom one's decoder combiner serves the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from ebm_prior.backbones.nvae.cells import Cell, NormedConv2d, decoder_cell, encoder_cell
from ebm_prior.backbones.nvae.distributions import soft_gaussian
from ebm_prior.backbones.nvae.flows import Flow, MaskedConv2d
from ebm_prior.backbones.options import (
    LARGEST_COUNT,
    require_choice,
    require_count,
    require_flag,
    require_list,
    require_number,
    require_option_counts,
)
from torch import Tensor, nn

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Draw, Gaussian

LIKELIHOODS = ("bernoulli", "logistic_mixture", "gaussian")


@dataclass(frozen=True)
class Architecture:
    """The arguments of an NVAE. The defaults are the published colour models of one scale, except for their flows.

    image_shape: (C, H, H). groups_per_scale: latent groups of each scale, from the image up (the highest resolution
    first); the single-group model [1] has no towers. latent_channels: of each group. padding: zeros around the image
    that the network sees and the likelihood does not (MNIST: 2). blocks: number of pre- and of post-processing blocks,
    each of which halves or doubles the side. preprocess_cells, postprocess_cells: cells in each such block.
    encoder_cells, decoder_cells: cells per group. flows: normalizing flows per group. residual_posterior: q's
    parameters are added to p's. likelihood: "bernoulli", "logistic_mixture" (1 or 3 colours, with `components`
    components) or "gaussian" (log_std_floor is the lower bound of log σ in log p(x | z); −2 in VAEBM). bits: bit depth
    of an image; below 8, `observe` reduces images to it.
    """

    image_shape: Sequence[int]
    groups_per_scale: Sequence[int]
    likelihood: str
    latent_channels: int = 20
    encoder_channels: int = 128
    decoder_channels: int = 128
    padding: int = 0
    blocks: int = 1
    preprocess_cells: int = 2
    postprocess_cells: int = 2
    encoder_cells: int = 2
    decoder_cells: int = 2
    flows: int = 0
    squeeze_excite: bool = True
    residual_posterior: bool = True
    components: int = 10
    log_std_floor: float | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        for name in ("image_shape", "groups_per_scale"):
            object.__setattr__(self, name, _counts(name, getattr(self, name)))
        require_option_counts(self, "latent_channels", "encoder_channels", "decoder_channels", "components", "bits")
        require_option_counts(self, "preprocess_cells", "postprocess_cells")  # one of which halves or doubles the side
        require_option_counts(self, "blocks", "encoder_cells", "decoder_cells", "flows", "padding", least=0)
        for name in ("squeeze_excite", "residual_posterior"):
            require_flag(name, getattr(self, name))
        if len(self.image_shape) != 3 or self.image_shape[1] != self.image_shape[2]:
            raise ConfigurationError(f"image_shape: expected (C, H, W) of a square image, found {self.image_shape}")
        require_choice("likelihood", self.likelihood, LIKELIHOODS)
        if self.likelihood == "logistic_mixture" and self.image_shape[0] not in (1, 3):
            raise ConfigurationError(
                f"the logistic mixture models 1 or 3 colours, found images of {self.image_shape[0]}: likelihood "
                "gaussian models any number"
            )
        if self.log_std_floor is not None:
            require_number("log_std_floor", self.log_std_floor, -100, 100)
            if self.likelihood != "gaussian":
                raise ConfigurationError(
                    f"log_std_floor: expected a number, and the Gaussian likelihood, found {self.likelihood}"
                )
        if self.bits > 8 or (self.bits < 8 and self.likelihood == "bernoulli"):
            raise ConfigurationError(f"bits: expected 1 to 8, and 8 with the Bernoulli likelihood, found {self.bits}")
        if self.blocks + self.scales > 32 or self.side % 2 ** (self.blocks + self.scales - 1):
            raise ConfigurationError(
                f"expected a side that {self.blocks} blocks and {self.scales - 1} further scales halve evenly, found "
                f"{self.side} (padding included)"
            )
        if self.cells > LARGEST_COUNT:
            raise ConfigurationError(f"expected at most {LARGEST_COUNT} cells in all, found {self.cells}")
        if self.single and self.encoder_channels != self.decoder_channels:
            raise ConfigurationError(
                f"a single-group model needs encoder and decoder of equal width, found {self.encoder_channels} and "
                f"{self.decoder_channels}"
            )

    @property
    def scales(self) -> int:
        """S, the number of latent resolutions."""
        return len(self.groups_per_scale)

    @property
    def single(self) -> bool:
        """Whether this is the single-group model."""
        return list(self.groups_per_scale) == [1]

    @property
    def side(self) -> int:
        """The side of the image that the network sees."""
        return self.image_shape[1] + 2 * self.padding

    @property
    def group_scales(self) -> list[int]:
        """The scale s of each group, in generation order: S − 1 at the top, 0 for the highest resolution."""
        return [s for s in reversed(range(self.scales)) for _ in range(self.groups_per_scale[s])]

    @property
    def image_channels(self) -> int:
        """The number of parameters of p(x | z) per pixel."""
        if self.likelihood == "logistic_mixture":
            return (10 if self.image_shape[0] == 3 else 3) * self.components
        return self.image_shape[0] * (2 if self.likelihood == "gaussian" else 1)

    @property
    def cells(self) -> int:
        """How many cells, combiners and flows there are, up to those between scales."""
        groups = sum(self.groups_per_scale)
        outer = self.blocks * (self.preprocess_cells + self.postprocess_cells)
        return outer + groups * (self.encoder_cells + self.decoder_cells + 2 + self.flows)

    def latent_shape(self, scale: int) -> tuple[int, int, int]:
        """(C, H, W) of the groups of a scale."""
        side = self.side // 2 ** (self.blocks + scale)
        return self.latent_channels, side, side

    def encoder_width(self, scale: int) -> int:
        """Channels of the bottom-up path."""
        return int(self.encoder_channels * 2 ** (self.blocks + scale))

    def decoder_width(self, scale: int) -> int:
        """Channels of the top-down path."""
        return int(self.decoder_channels * 2 ** (self.blocks + scale))


def _counts(name: str, values: Sequence[int]) -> list[int]:
    require_list(name, values, of="positive integer")
    for value in values:
        require_count(name, value)
    return list(values)


class EncoderCombiner(nn.Module):
    """Bottom-up feature plus a 1×1 convolution of the top-down state."""

    def __init__(self, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.conv = NormedConv2d(decoder_width, encoder_width, 1)

    def forward(self, feature: Tensor, state: Tensor) -> Tensor:
        """(B, C_enc, H, W) and (B, C_dec, H, W) to (B, C_enc, H, W)."""
        joined: Tensor = feature + self.conv(state)
        return joined


class DecoderCombiner(nn.Module):
    """A 1×1 convolution of the top-down state and z."""

    def __init__(self, decoder_width: int, latent_channels: int) -> None:
        super().__init__()
        self.conv = NormedConv2d(decoder_width + latent_channels, decoder_width, 1)

    def forward(self, state: Tensor, z: Tensor) -> Tensor:
        """(B, C_dec, H, W) and (B, L, H, W) to (B, C_dec, H, W)."""
        joined: Tensor = self.conv(torch.cat([state, z], dim=1))
        return joined


class Context(NamedTuple):
    """The values of the top-down pass that a posterior below the top group uses."""

    state: Tensor  # (B, C_dec, H, W)
    raw_prior: Tensor  # (B, 2L, H, W): raw mean and log σ of p(z_i | z_<i)


class Features(NamedTuple):
    """The inputs of the image head: the last top-down state (B, C_dec, H, W) and the last z (B, L, H, W)."""

    state: Tensor
    z: Tensor


class Network(nn.Module):
    """The official module tree."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        top, latents = a.scales - 1, a.latent_channels
        self.prior_ftr0 = nn.Parameter(torch.rand(a.decoder_width(top), *a.latent_shape(top)[1:]))
        self.stem = NormedConv2d(a.image_shape[0], a.encoder_channels, 3)
        self.pre_process = nn.ModuleList(
            encoder_cell(a.encoder_channels * 2**b, 2 if i == a.preprocess_cells - 1 else 1, a.squeeze_excite)
            for b in range(a.blocks)
            for i in range(a.preprocess_cells)
        )
        if a.single:
            self.stem_decoder = NormedConv2d(latents, a.encoder_width(0), 1)
        else:
            self.enc_tower = self._encoder_tower()
            self.dec_tower = self._decoder_tower()
            self.dec_sampler = nn.ModuleList(
                nn.Sequential(nn.ELU(), NormedConv2d(a.decoder_width(s), 2 * latents, 1)) for s in a.group_scales[1:]
            )
        width = a.encoder_width(top)
        self.enc0 = nn.Sequential(nn.ELU(), NormedConv2d(width, width, 1), nn.ELU())
        self.enc_sampler = nn.ModuleList(NormedConv2d(a.encoder_width(s), 2 * latents, 3) for s in a.group_scales)
        self.nf_cells = nn.ModuleList(Flow(latents) for _ in range(a.flows * len(a.group_scales)))
        self.post_process = nn.ModuleList(
            decoder_cell(a.decoder_channels * 2 ** (a.blocks - b - (i > 0)), 1 if i else -1, a.squeeze_excite, 3)
            for b in range(a.blocks)
            for i in range(a.postprocess_cells)
        )
        self.image_conditional = nn.Sequential(nn.ELU(), NormedConv2d(a.decoder_channels, a.image_channels, 3))

    def make_masks(self) -> None:
        """Make the masks of the flows. They are no weights, so a network built on meta lacks them at first."""
        for module in self.modules():
            if isinstance(module, MaskedConv2d):
                module.make_mask()

    def _encoder_tower(self) -> nn.ModuleList:
        a = self.architecture
        tower: list[nn.Module] = []
        for s, groups in enumerate(a.groups_per_scale):
            for g in range(groups):
                tower += [encoder_cell(a.encoder_width(s), 1, a.squeeze_excite) for _ in range(a.encoder_cells)]
                if s < a.scales - 1 or g < groups - 1:  # the last feature up is the top group's own
                    tower.append(EncoderCombiner(a.encoder_width(s), a.decoder_width(s)))
            if s < a.scales - 1:
                tower.append(encoder_cell(a.encoder_width(s), 2, a.squeeze_excite))
        return nn.ModuleList(tower)

    def _decoder_tower(self) -> nn.ModuleList:
        a = self.architecture
        tower: list[nn.Module] = []
        for s in reversed(range(a.scales)):
            for _ in range(a.groups_per_scale[s]):
                if tower:  # the top group follows prior_ftr0 directly
                    tower += [decoder_cell(a.decoder_width(s), 1, a.squeeze_excite, 6) for _ in range(a.decoder_cells)]
                tower.append(DecoderCombiner(a.decoder_width(s), a.latent_channels))
            if s > 0:
                tower.append(decoder_cell(a.decoder_width(s), -1, a.squeeze_excite, 6))
        return nn.ModuleList(tower)

    def generate(self, draw: Draw, batch_size: int) -> Features:
        """Draw every group from the top down, and stop there."""
        state = self.prior_ftr0.expand(batch_size, -1, -1, -1)
        latents, height, width = self.architecture.latent_shape(self.architecture.scales - 1)
        raw = self.prior_ftr0.new_zeros(1, 2 * latents, height, width)
        z = draw(0, soft_gaussian(raw), None)  # N(0, 1.01²), as published
        if self.architecture.single:
            return Features(state, z)
        index = 0
        for module in self.dec_tower:
            if isinstance(module, Cell):
                state = module(state)
                continue
            if index > 0:
                raw = self.dec_sampler[index - 1](state)
                z = draw(index, soft_gaussian(raw), Context(state, raw))
            index += 1
            if index == len(self.enc_sampler):
                break  # the last combiner serves the image alone
            state = module(state, z)
        return Features(state, z)

    def image(self, features: Features) -> Tensor:
        """The raw parameters of p(x | z), (B, image_channels, side, side): the last combiner and the image head."""
        y = self.stem_decoder(features.z) if self.architecture.single else self.dec_tower[-1](*features)
        for cell in self.post_process:
            y = cell(y)
        parameters: Tensor = self.image_conditional(y)
        return parameters

    def encode(self, images: Tensor) -> list[Tensor]:
        """The bottom-up feature of every group, in generation order, from images (B, C, side, side) in [0, 1]."""
        y = self.stem(2 * images - 1)
        for cell in self.pre_process:
            y = cell(y)
        features: list[Tensor] = []
        for module in [] if self.architecture.single else self.enc_tower:
            if isinstance(module, Cell):
                y = module(y)
            else:
                features.append(y)
        return [self.enc0(y), *reversed(features)]

    def posterior(self, index: int, features: Sequence[Tensor], context: Context | None) -> Gaussian:
        """q(z_i | x, z_<i) before the flows, from what `encode` returned; `context` is None at the top."""
        feature = features[index]
        if context is not None:
            feature = self._encoder_combiners[index - 1](feature, context.state)
        raw = self.enc_sampler[index](feature)
        if context is not None and self.architecture.residual_posterior:
            raw = raw + context.raw_prior
        return soft_gaussian(raw)

    def flow(self, index: int, z: Tensor) -> Tensor:
        """The flows of group i, of z's shape."""
        flows = self.architecture.flows
        for k in range(index * flows, (index + 1) * flows):
            z = self.nf_cells[k](z)
        return z

    @property
    def _encoder_combiners(self) -> list[EncoderCombiner]:
        """In generation order, from group 1 on."""
        return [module for module in reversed(self.enc_tower) if isinstance(module, EncoderCombiner)]
