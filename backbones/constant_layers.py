"""Convolutions with constant weights, which keep less for a backward pass; 1×1 convolutions are matrix products.

Maps are channels last, where a 1×1 convolution is a matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pointwise(nn.Module):
    """A 1×1 convolution as a matrix product over the channels: (B, C_in, H, W) to (B, C_out, H, W), channels last."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous())  # (C_out, C_in)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """W x + b at every pixel."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class CellPointwise(Pointwise):
    """A 1×1 convolution in a cell. On a GPU in float32 it runs as a convolution, which torch computes in TF32.

    The unfolded network does the same. As a matrix product torch would compute it in full float32, at a quarter of the
    speed.
    """

    def forward(self, x: Tensor) -> Tensor:
        """W x + b at every pixel."""
        if x.is_cuda and x.dtype == torch.float32:
            return F.conv2d(x, self.weight[:, :, None, None], self.bias)
        return super().forward(x)


class ConstantConv2d(nn.Module):
    """A convolution that keeps the side, with a constant weight: (B, C_in, H, W) to (B, C_out, H, W).

    weight: (C_out, C_in/groups, K, K), K odd, with as many channels out as in where there are groups of one each.
    bias: (C_out,). groups: 1, or C_in for a depthwise convolution.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, groups: int = 1) -> None:
        super().__init__()
        self.weight, self.bias, self.groups = nn.Parameter(weight), nn.Parameter(bias), groups

    def forward(self, x: Tensor) -> Tensor:
        """The cross-correlation, plus a bias per channel."""
        y: Tensor = _ConstantConv2d.apply(x, self.weight, self.bias, self.groups)
        return y


class _ConstantConv2d(torch.autograd.Function):
    """The autograd function. Its gradient is the convolution with the turned kernel, so x need not be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.groups = groups
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        turned = weight.flip(2, 3)
        if ctx.groups == 1:  # a depthwise kernel is its own transpose
            turned = turned.transpose(0, 1)
        return F.conv2d(gradient, turned, padding=weight.shape[-1] // 2, groups=ctx.groups), None, None, None
