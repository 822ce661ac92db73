"""NVAE folded for inference: the same function with weight norm, masks and batch norms in the convolutions' weights.

What folds exactly in eval mode:

- weight norm and the flows' masks are constants;
- all batch norms of an inverted residual: the first into the columns of the 1×1 that follows, the others into the rows
  of the convolution before them;
- of an encoder cell's two batch norms the second; the first is between the residual stream and a swish;
- a cell's factor 0.1, into its last convolution (and 10 into the gate's first layer, which sees the result);
- nearest and bilinear upsampling commute with a 1×1 convolution, which then runs at a quarter of the pixels;
- a decoder combiner's 1×1 of (state, z) is the sum of two; the first one's state is a constant, and so is its half.

Maps are channels last, where a 1×1 convolution is a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nvae_cells import BatchNorm, Cell, Conv2d, InvertedResidual, NormSwishConv, SqueezeExcite
from .nvae_network import DecoderCombiner, Network

RESIDUAL = 0.1
"""The factor of a cell's residual branch."""


def fold(network: Network) -> Network:
    """The network folded, made of the modules of `network`, which is in eval mode and not needed afterwards."""
    with_towers = [network.pre_process, network.post_process]
    if not network.architecture.single:
        with_towers += [network.enc_tower, network.dec_tower]
        _fold_combiners(network)
    for tower in with_towers:
        for index, cell in enumerate(tower):
            if isinstance(cell, Cell):
                tower[index] = FoldedCell(cell)
    for module, name, conv in list(_convolutions(network)):
        setattr(module, name, plain(conv))
    return network


class Pointwise(nn.Module):
    """A 1×1 convolution as a matrix product over the channels: (B, C_in, H, W) to (B, C_out, H, W), channels last."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)  # (C_out, C_in)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """W x + b at every pixel."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class FoldedCombiner(nn.Module):
    """W_s·state + W_z·z + b at every pixel; `constant` W_s·state + b, (1, C, H, W), where the state is one."""

    def __init__(self, weight: Tensor, bias: Tensor, constant_state: Tensor | None) -> None:
        super().__init__()
        width = len(weight)
        of_state = Pointwise(weight[:, :width].contiguous(), bias)
        self.of_state = of_state if constant_state is None else None
        self.register_buffer("constant", None if constant_state is None else of_state(constant_state))
        self.register_buffer("weight", weight[:, width:].contiguous())

    def forward(self, state: Tensor, z: Tensor) -> Tensor:
        """(B, C_dec, H, W) and (B, L, H, W) to (B, C_dec, H, W)."""
        sum_ = self.constant if self.of_state is None else self.of_state(state)
        return sum_ + F.linear(z.permute(0, 2, 3, 1), self.weight).permute(0, 3, 1, 2)


class FoldedCell(Cell):
    """A cell with the factor of its residual branch in the weights."""

    def __init__(self, cell: Cell) -> None:
        *first, last = cell._ops
        ops = [FoldedResidual(op) if isinstance(op, InvertedResidual) else op for op in cell._ops]
        if isinstance(last, NormSwishConv):
            ops = _fold_encoder_ops(*cast(list[NormSwishConv], [*first, last]))
        super().__init__(_swapped(cell.skip), ops, cell.se)
        if self.se is not None:
            self.se.se[0].weight.div_(RESIDUAL)

    def forward(self, x: Tensor) -> Tensor:
        """The residual sum."""
        y = x
        for op in self._ops:
            y = op(y)
        if self.se is None:
            return self.skip(x) + y
        gate = cast(SqueezeExcite, self.se).se(y.mean((2, 3)))
        return torch.addcmul(self.skip(x), y, gate[:, :, None, None])


class FoldedResidual(nn.Module):
    """1×1 → swish [→ nearest ×2] → depthwise 5×5 → swish → 1×1, every batch norm in these."""

    def __init__(self, residual: InvertedResidual) -> None:
        super().__init__()
        layers = list(residual.conv)
        self.upsample = layers.pop(0) if isinstance(layers[0], nn.Upsample) else nn.Identity()
        first, expand, depthwise, project, last = layers
        (scale0, shift0), (scale3, shift3) = affine(first.bn), affine(last.bn)
        (conv1, bn1), (conv2, bn2) = expand.conv, depthwise.conv
        (scale1, shift1), (scale2, shift2) = affine(bn1), affine(bn2)
        weight = conv1.weight.flatten(1)
        self.expand = Pointwise(scale1[:, None] * weight * scale0, scale1 * (weight @ shift0) + shift1)
        self.depthwise = Conv2d(len(weight), len(weight), conv2.kernel_size[0], groups=len(weight))
        _set(self.depthwise, scale2[:, None, None, None] * conv2.weight, shift2)
        scale3, shift3 = RESIDUAL * scale3, RESIDUAL * shift3
        self.project = Pointwise(scale3[:, None] * project.weight.flatten(1), shift3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H or 2H, W or 2W)."""
        y = self.upsample(F.silu(self.expand(x)))
        return self.project(F.silu(self.depthwise(y)))


def affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as scale and shift, (C,) each."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def plain(conv: Conv2d) -> nn.Module:
    """The convolution with its weight as used."""
    if conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1:
        return Pointwise(conv.kernel().flatten(1), conv.bias)
    folded = Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size[0],
        conv.stride[0],
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    return _set(folded, conv.kernel(), conv.bias)


def _set(conv: Conv2d, weight: Tensor, bias: Tensor | None) -> Conv2d:
    conv.weight = nn.Parameter(weight)
    conv.bias = None if bias is None else nn.Parameter(bias)
    return conv


def _fold_encoder_ops(first: NormSwishConv, second: NormSwishConv) -> list[nn.Module]:
    """bn1, swish, conv1 with bn2 in it; swish, conv2 with the cell's factor in it."""
    scale, shift = affine(second.bn_act)
    conv1, conv2 = plain(first.conv_0), plain(second.conv_0)
    conv1.weight.mul_(scale[:, None, None, None])
    conv1.bias.mul_(scale).add_(shift)
    conv2.weight.mul_(RESIDUAL)
    conv2.bias.mul_(RESIDUAL)
    return [nn.Sequential(first.bn_act, conv1), nn.Sequential(nn.SiLU(), conv2)]


def _swapped(skip: nn.Module) -> nn.Module:
    """A skip that upsamples, with the 1×1 convolution first; any other as it is."""
    return nn.Sequential(skip[1], skip[0]) if isinstance(skip, nn.Sequential) else skip


def _fold_combiners(network: Network) -> None:
    state: Tensor | None = network.prior_ftr0[None]
    for index, module in enumerate(network.dec_tower):
        if isinstance(module, DecoderCombiner):
            network.dec_tower[index] = FoldedCombiner(module.conv.kernel().flatten(1), module.conv.bias, state)
            state = None


def _convolutions(network: nn.Module) -> Iterator[tuple[nn.Module, str, Conv2d]]:
    """Every convolution, with the module that holds it and its name there."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, Conv2d):
                yield module, name, child
