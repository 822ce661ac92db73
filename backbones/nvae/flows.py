"""The normalizing flows of NVAE's posterior: volume-preserving autoregressive shifts z → z − m(z).

m_i depends only on the elements before element i, in the order (raster position, channel) or, mirrored, (reverse raster
position, channel). So the Jacobian is unit triangular and log q keeps its value. The prior has no flows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from ebm_prior.backbones.nvae.cells import NormedConv2d
from torch import Tensor, nn

WIDENING = 6
"""Hidden channels of a shift, per latent channel."""


def causal_mask(
    latents: int, out_channels: int, in_channels: int, kernel: int, *, strict: bool, mirror: bool
) -> Tensor:
    """(C_out, C_in, K, K) of 0 and 1: earlier positions, and at the centre the channels of earlier latents.

    Channels belong to the `latents` in equal runs; the latent itself is among the earlier ones unless `strict`. A
    depthwise convolution (`in_channels` 1) has each channel see itself. Mirroring turns the raster, not the channels.
    """
    owner = np.arange(out_channels) // (out_channels // latents)
    seen = owner[:, None] if in_channels == 1 < out_channels else np.arange(in_channels) // (in_channels // latents)
    before = seen < owner[:, None] if strict else seen <= owner[:, None]
    mask = np.zeros((out_channels, in_channels, kernel, kernel), dtype=np.float32)
    c = (kernel - 1) // 2
    mask[:, :, :c] = 1
    mask[:, :, c, :c] = 1
    mask[:, :, c, c] = before
    return torch.from_numpy(mask[:, :, ::-1, ::-1].copy() if mirror else mask)


class MaskedConv2d(NormedConv2d):
    """Weight-normed convolution of the masked weight: the norm counts what the mask leaves.

    `mask`: the arguments of `causal_mask`. The mask itself is a buffer outside the state dict; on the device "meta" it
    has a shape alone, until `make_mask` is called.
    """

    mask: Tensor

    def __init__(
        self,
        latents: int,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        strict: bool,
        mirror: bool,
        depthwise: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, groups=in_channels if depthwise else 1, bias=bias)
        self._order = (latents, strict, mirror)
        self.register_buffer("mask", torch.empty_like(self.weight, requires_grad=False), persistent=False)
        if not self.weight.is_meta:
            self.make_mask()
            self.log_weight_norm = nn.Parameter((self._norm(self.weight.detach() * self.mask) + 1e-2).log())

    def make_mask(self) -> None:
        """Make the mask anew, where the weight is."""
        latents, strict, mirror = self._order
        out_channels, in_channels, kernel, _ = self.weight.shape
        self.mask = causal_mask(latents, out_channels, in_channels, kernel, strict=strict, mirror=mirror).to(
            self.weight.device
        )

    def kernel(self) -> Tensor:
        """ŵ of the masked weight, (C_out, C_in/groups, K, K)."""
        weight = self.weight * self.mask
        return self.log_weight_norm.exp() * weight / (self._norm(weight) + 1e-5)


class Shift(nn.Module):
    """z − m(z), with m: masked 3×3, ELU, masked depthwise 5×5, ELU, ELU, masked 1×1."""

    def __init__(self, latents: int, *, mirror: bool) -> None:
        super().__init__()
        hidden = WIDENING * latents
        first = MaskedConv2d(latents, latents, hidden, 3, strict=True, mirror=mirror)
        second = MaskedConv2d(latents, hidden, hidden, 5, strict=False, mirror=mirror, depthwise=True)
        convz = nn.Sequential(first, nn.ELU(), second, nn.ELU())
        mu = MaskedConv2d(latents, hidden, latents, 1, strict=False, mirror=mirror, bias=True)
        mu.log_weight_norm.data -= math.log(10)  # near the identity at first
        self.conv = nn.ModuleDict({"convz": convz})
        self.mu = nn.ModuleDict({"conv_0": mu})

    def forward(self, z: Tensor) -> Tensor:
        """(B, L, H, W), of the same shape."""
        shift: Tensor = self.mu["conv_0"](F.elu(self.conv["convz"](z)))  # the second ELU in a row, as published
        return z - shift


class Flow(nn.Module):
    """One normalizing flow: a shift in raster order, then one in the mirrored order."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.cell1 = Shift(latents, mirror=False)
        self.cell2 = Shift(latents, mirror=True)

    def forward(self, z: Tensor) -> Tensor:
        """(B, L, H, W), of the same shape; the log-determinant is 0."""
        y: Tensor = self.cell2(self.cell1(z))
        return y
