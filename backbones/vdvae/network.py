"""The network of the very deep VAE (Child, 2021), with the official parameter names.

Bottom-up, residual blocks and average pooling leave one activation per side. Top-down, each block has one latent group
and reads and writes the stream of its side; one that begins a side first adds the stream of a lower side.

Source: Child (2021) and its release. New networks also have the initial weights of the release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from ebm_prior.backbones.folding import NetworkCell
from ebm_prior.backbones.vdvae.options import Architecture, Place
from torch import Tensor, nn

from ebm_prior.model.backbone import Draw, Gaussian

Activations = Mapping[int, Tensor]
"""The encoder's output at each side r: (B, C(r), r, r)."""


class Features(NamedTuple):
    """The inputs of the image head: the last stream plus its prior's term (B or 1, C, H, W), and z1 (B, Z, H, W)."""

    stream: Tensor
    z: Tensor


class Block(NetworkCell):
    """Four convolutions, each after a GELU: 1×1, twice 3×3 (1×1 at sides 1 and 2), 1×1.

    (B, C_in, r, r) to (B, C_out, r, r); with `residual` the input is added.
    """

    def __init__(
        self, channels: int, inner: int, out: int, side: int, *, residual: bool = False, last: float = 1.0
    ) -> None:
        """`last`: a factor of the last convolution's first weights."""
        super().__init__()
        kernel = 3 if side > 2 else 1
        self.residual = residual
        self.c1 = _convolution(channels, inner, 1)
        self.c2 = _convolution(inner, inner, kernel)
        self.c3 = _convolution(inner, inner, kernel)
        self.c4 = _convolution(inner, out, 1, scale=last)

    def forward(self, x: Tensor) -> Tensor:
        """h(x), or x + h(x)."""
        y = super().forward(x)
        return x + y if self.residual else y

    def compute(self, x: Tensor) -> Tensor:
        """h(x)."""
        return self.in_branch(self._branch, x)

    def _branch(self, y: Tensor) -> Tensor:
        for convolution in (self.c1, self.c2, self.c3, self.c4):
            y = convolution(F.gelu(y))
        return y


def _convolution(channels: int, out: int, kernel: int, *, scale: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps the side. At first its bias is 0, and its weight is torch's times `scale`."""
    convolution = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
    nn.init.zeros_(cast(Tensor, convolution.bias))
    with torch.no_grad():
        convolution.weight.mul_(scale)
    return convolution


class Encoder(nn.Module):
    """The bottom-up path."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.architecture = a
        self.in_conv = _convolution(3, a.width, 3)
        self.enc_blocks = nn.ModuleList(self._block(place.side) for place in a.encoder)

    def _block(self, side: int) -> Block:
        a = self.architecture
        width, inner = a.width_at(side), a.inner_width_at(side)
        return Block(width, inner, width, side, residual=True, last=len(a.encoder) ** -0.5)

    def forward(self, images: Tensor) -> Activations:
        """The activations of images (B, 3, H, H) in [0, 1].

        That of a side is the output of its last block that does not pool, or else what pooling brought there.
        """
        a = self.architecture
        y = self.in_conv(a.pixels.normalised(images))
        activations = {a.image_side: y}
        for place, block in zip(a.encoder, self.enc_blocks, strict=True):
            y, side = block(y), place.side
            if place.other is not None:
                side //= place.other
                y = F.avg_pool2d(y, place.other)
                y = F.pad(y, (0, 0, 0, 0, 0, a.width_at(side) - y.shape[1]))  # zeros behind the channels of before
            activations[side] = y
        return activations


class TopDownBlock(nn.Module):
    """The modules of one latent group."""

    def __init__(self, a: Architecture, place: Place) -> None:
        super().__init__()
        side, width, inner = place.side, a.width_at(place.side), a.inner_width_at(place.side)
        scale = len(a.decoder) ** -0.5
        self.zdim = a.zdim
        self.enc = Block(2 * width, inner, 2 * a.zdim, side)
        self.prior = Block(width, inner, 2 * a.zdim + width, side, last=0.0)  # at first N(0, 1)
        self.z_proj: nn.Module = _convolution(a.zdim, width, 1, scale=scale)
        self.resnet = Block(width, inner, width, side, residual=True, last=scale)

    def conditional(self, stream: Tensor) -> tuple[Gaussian, Tensor]:
        """p(z_i | z_<i), (B, Z, r, r), and the stream (B, C, r, r) with what the prior's block adds to it.

        σ is the exponential of what the network says; nothing is clamped.
        """
        mean, log_std, moved = self.prior(stream).split([self.zdim, self.zdim, stream.shape[1]], dim=1)
        return Gaussian(mean, log_std.exp()), stream + moved

    def posterior(self, stream: Tensor, activation: Tensor) -> Gaussian:
        """q(z_i | x, z_<i), from the stream as `conditional` takes it and the encoder's activation (B, C, r, r)."""
        mean, log_std = self.enc(torch.cat([stream.expand_as(activation), activation], dim=1)).chunk(2, dim=1)
        return Gaussian(mean, log_std.exp())

    def forward(self, stream: Tensor, z: Tensor) -> Tensor:
        """The stream after the block (B, C, r, r), from what `conditional` returned and z (B, Z, r, r)."""
        joined: Tensor = self.resnet(stream + self.z_proj(z))
        return joined


class Output(nn.Module):
    """The last convolution, under its official name."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.out_conv: nn.Module = _convolution(a.width, 10 * a.num_mixtures, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, H) to (B, 10·M, H, H)."""
        parameters: Tensor = self.out_conv(x)
        return parameters


class Decoder(nn.Module):
    """The top-down path.

    `gain` and `bias`, (1, C, 1, 1) each, stand before the last convolution; None where they are in its weights.
    """

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.architecture = a
        self.dec_blocks = nn.ModuleList(TopDownBlock(a, place) for place in a.decoder)
        self.mapped_sides = [side for side in a.sides if side <= a.no_bias_above]
        self.bias_xs = nn.ParameterList(
            nn.Parameter(torch.zeros(1, a.width_at(side), side, side)) for side in self.mapped_sides
        )
        self.gain: nn.Parameter | None = nn.Parameter(torch.ones(1, a.width, 1, 1))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(1, a.width, 1, 1))
        self.out_net = Output(a)

    def generate(self, draw: Draw) -> Features:
        """Draw every group from the top down, and stop there. A draw's context is the stream before its prior's block.

        Until the first draw has entered a stream it has batch axis 1.
        """
        a, streams, blocks = self.architecture, self._first_streams(), cast(list[TopDownBlock], list(self.dec_blocks))
        for index, ((side, other), block) in enumerate(zip(a.decoder, blocks, strict=True)):
            stream = streams[side]
            if other is not None:
                mixed = streams[other][:, : a.width_at(side)]
                stream = stream + F.interpolate(mixed, scale_factor=side // other)
            prior, moved = block.conditional(stream)
            z = draw(index, prior, stream)
            if index < len(blocks) - 1:  # the rest of the last block is the image's alone
                streams[side] = block(moved, z)
        return Features(moved, z)

    def _first_streams(self) -> dict[int, Tensor]:
        """Of each side, (1, C, r, r): its learned map, or zeros above."""
        a, like = self.architecture, self.bias_xs[0]
        streams = dict(zip(self.mapped_sides, self.bias_xs, strict=True))
        for side in a.sides[len(streams) :]:
            streams[side] = like.new_zeros(1, a.width_at(side), side, side)
        return streams

    def image(self, features: Features) -> Tensor:
        """The parameters of p(x | z), (B, 10·M, H, H)."""
        y = self.dec_blocks[-1](*features)
        if self.gain is not None and self.bias is not None:
            y = y * self.gain + self.bias
        parameters: Tensor = self.out_net(y)
        return parameters


class Network(nn.Module):
    """The official module tree."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder, self.decoder = Encoder(architecture), Decoder(architecture)

    def posterior(self, index: int, activations: Activations, stream: Tensor) -> Gaussian:
        """q(z_i | x, z_<i) from the encoder's activations and the context of the draw."""
        block = cast(TopDownBlock, self.decoder.dec_blocks[index])
        return block.posterior(stream, activations[self.architecture.decoder[index].side])
