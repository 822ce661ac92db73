"""The cells of NVAE (Vahdat & Kautz, 2020), with the official parameter names.

A cell is out = skip(x) + 0.1·SE(ops(x)). Encoder-side cells hold two BN-swish-conv operations, decoder-side cells one
inverted residual with a depthwise 5×5 convolution. Its first operation changes width and size, where the cell does.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from ebm_prior.backbones.folding import NetworkCell
from torch import Tensor, nn

Stride = Literal[-1, 1, 2]
"""The stride of a cell: 2 halves the side and doubles the channels, −1 doubles the side and halves the channels."""


class Conv2d(nn.Conv2d):
    """Base of all convolutions of NVAE: padding (K − 1)/2, and the weight that `kernel()` returns."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, groups: int = 1, bias: bool = True
    ) -> None:
        padding = kernel // 2
        super().__init__(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=bias)

    def kernel(self) -> Tensor:
        """The weight as used, (C_out, C_in/groups, K, K)."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H/stride, W/stride)."""
        return F.conv2d(x, self.kernel(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormedConv2d(Conv2d):
    """Weight-normed convolution: ŵ_o = exp(log_weight_norm_o)·w_o/(‖w_o‖ + 1e-5) for each output channel o."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=bias)
        if self.weight.is_meta:  # there is no norm to compute, and torch would import modules for seconds
            self.log_weight_norm = nn.Parameter(self.weight.new_empty(out_channels, 1, 1, 1))
        else:
            self.log_weight_norm = nn.Parameter((self._norm(self.weight.detach()) + 1e-2).log())

    @staticmethod
    def _norm(weight: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
        return norm

    def kernel(self) -> Tensor:
        """ŵ, (C_out, C_in/groups, K, K)."""
        return self.log_weight_norm.exp() * self.weight / (self._norm(self.weight) + 1e-5)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with NVAE's momentum: running statistics move by 5 % per batch in train mode."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.05)


class BatchNormSwish(BatchNorm):
    """Batch norm, then swish: x·sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), of the same shape."""
        return F.silu(super().forward(x))


class WrappedBatchNorm(nn.Module):
    """Batch norm under the name `bn`, as the official files have it inside inverted residuals."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), of the same shape."""
        y: Tensor = self.bn(x)
        return y


class NormSwishConv(nn.Module):
    """BN, swish, 3×3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn_act = BatchNormSwish(in_channels)
        self.conv_0 = NormedConv2d(in_channels, out_channels, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H/stride, W/stride)."""
        y: Tensor = self.conv_0(self.bn_act(x))
        return y


class _ConvNormSwish(nn.Module):
    """Convolution without weight norm, BN, swish."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        conv = Conv2d(in_channels, out_channels, kernel, groups=groups, bias=False)
        self.conv = nn.Sequential(conv, BatchNormSwish(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W)."""
        y: Tensor = self.conv(x)
        return y


class InvertedResidual(nn.Module):
    """[nearest ×2] → BN → 1×1 to E·C_in → BN, swish → depthwise 5×5 → BN, swish → 1×1 → BN."""

    def __init__(self, in_channels: int, out_channels: int, stride: Stride, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = [nn.Upsample(scale_factor=2, mode="nearest")] if stride == -1 else []
        layers += [
            WrappedBatchNorm(in_channels),
            _ConvNormSwish(in_channels, hidden, 1, groups=1),
            _ConvNormSwish(hidden, hidden, 5, groups=hidden),
            Conv2d(hidden, out_channels, 1, bias=False),
            WrappedBatchNorm(out_channels),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H or 2H, W or 2W)."""
        y: Tensor = self.conv(x)
        return y


class SqueezeExcite(nn.Module):
    """x times a gate per channel, from the means over height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.se = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), of the same shape."""
        gate: Tensor = self.se(x.mean((2, 3)))
        return x * gate[:, :, None, None]


class PhaseSkip(nn.Module):
    """The skip that halves the side: swish, and one 1×1 convolution for each of the four phases of the pixel grid.

    The phases are taken apart first: the gradient of a 1×1 convolution with stride 2 and fewer than 8 channels-last
    channels corrupts memory in oneDNN on CPUs with AVX2 alone (torch 2.14).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = out_channels // 4
        self.conv_1, self.conv_2, self.conv_3 = (NormedConv2d(in_channels, quarter, 1) for _ in range(3))
        self.conv_4 = NormedConv2d(in_channels, out_channels - 3 * quarter, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H/2, W/2)."""
        y = F.silu(x)
        phases = [
            self.conv_1(y[:, :, ::2, ::2]),
            self.conv_2(y[:, :, 1::2, 1::2]),
            self.conv_3(y[:, :, ::2, 1::2]),
            self.conv_4(y[:, :, 1::2, ::2]),
        ]
        return torch.cat(phases, dim=1)


def _skip(in_channels: int, out_channels: int, stride: Stride) -> nn.Module:
    if stride == 1:
        return nn.Identity()
    if stride == 2:
        return PhaseSkip(in_channels, out_channels)
    bilinear = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    return nn.Sequential(bilinear, NormedConv2d(in_channels, out_channels, 1, bias=False))


class Cell(NetworkCell):
    """skip(x) + 0.1·SE(ops(x)): (B, C_in, H, W) to (B, C_out, …) of the size that the stride says."""

    def __init__(self, skip: nn.Module, ops: list[nn.Module], squeeze_excite: SqueezeExcite | None) -> None:
        super().__init__()
        self.skip = skip
        self._ops = nn.ModuleList(ops)
        self.se = squeeze_excite

    def compute(self, x: Tensor) -> Tensor:
        """The residual sum."""
        y = self.in_branch(self._residual, x)
        sum_: Tensor = self.skip(x) + 0.1 * y
        return sum_

    def _residual(self, y: Tensor) -> Tensor:
        for op in self._ops:
            y = op(y)
        return y if self.se is None else self.se(y)


def _width(channels: int, stride: Stride) -> int:
    return {1: channels, 2: 2 * channels, -1: channels // 2}[stride]


def encoder_cell(channels: int, stride: Stride, squeeze_excite: bool) -> Cell:
    """A cell of the bottom-up side: two BN-swish-conv operations."""
    out = _width(channels, stride)
    ops: list[nn.Module] = [NormSwishConv(channels, out, stride), NormSwishConv(out, out, 1)]
    return Cell(_skip(channels, out, stride), ops, SqueezeExcite(out) if squeeze_excite else None)


def decoder_cell(channels: int, stride: Stride, squeeze_excite: bool, expansion: int) -> Cell:
    """A cell of the top-down side: one inverted residual, which widens `expansion` times inside."""
    out = _width(channels, stride)
    ops: list[nn.Module] = [InvertedResidual(channels, out, stride, expansion)]
    return Cell(_skip(channels, out, stride), ops, SqueezeExcite(out) if squeeze_excite else None)
