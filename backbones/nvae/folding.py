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

from typing import Any, cast

import torch
import torch.nn.functional as F
from ebm_prior.backbones.constant_layers import CellPointwise, ConstantConv2d, Pointwise
from ebm_prior.backbones.folding import InferenceCell
from ebm_prior.backbones.nvae.cells import BatchNorm, Cell, Conv2d, InvertedResidual, NormSwishConv
from ebm_prior.backbones.nvae.network import DecoderCombiner, Network
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

RESIDUAL = 0.1
"""The factor of a cell's residual branch."""


def fold(network: Network) -> Network:
    """The network folded, made of the modules of `network`, which is in eval mode and not needed afterwards."""
    towers = [network.pre_process, network.post_process]
    if not network.architecture.single:
        towers += [network.enc_tower, network.dec_tower]
        _fold_combiners(network)
    for tower in towers:
        for index, cell in enumerate(tower):
            if isinstance(cell, Cell):
                tower[index] = FoldedCell(cell)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv2d):
                setattr(module, name, plain(child))
            elif isinstance(child, nn.ELU):
                setattr(module, name, Elu())
    return network


class Elu(nn.Module):
    """ELU through exp, on a CPU several times faster than torch's through expm1, to an absolute rounding error."""

    def forward(self, x: Tensor) -> Tensor:
        """x where positive, else exp(x) − 1: of x's shape."""
        y: Tensor = _Elu.apply(x)
        return y


class _Elu(torch.autograd.Function):
    """max(x, 0) + exp(min(x, 0)) − 1, whose derivative is exp(min(x, 0))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope = x.clamp(max=0).exp_()
        ctx.save_for_backward(slope)
        return x.clamp(min=0).add_(slope).sub_(1)

    @staticmethod
    @once_differentiable  # the slope is saved as a number: a second derivative is refused
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        product: Tensor = gradient * slope
        return product


class FoldedCombiner(nn.Module):
    """W_s·state + W_z·z + b at every pixel; `constant` is W_s·state + b, (1, C, H, W), where the state is one."""

    constant: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor, constant_state: Tensor | None) -> None:
        super().__init__()
        width = len(weight)
        self.of_state = Pointwise(weight[:, :width], bias)
        self.of_z = Pointwise(weight[:, width:])
        self.register_buffer("constant", None if constant_state is None else self.of_state(constant_state))

    def forward(self, state: Tensor, z: Tensor) -> Tensor:
        """(B, C_dec, H, W) and (B, L, H, W) to (B, C_dec, H, W)."""
        of_state = self.of_state(state) if self.constant is None else self.constant
        sum_: Tensor = of_state + self.of_z(z)
        return sum_


class FoldedCell(InferenceCell, Cell):
    """A cell with the factor of its residual branch in the weights."""

    def __init__(self, cell: Cell) -> None:
        ops = list(cell._ops)
        if isinstance(ops[0], InvertedResidual):
            ops = [FoldedResidual(ops[0])]
        else:
            ops = _fold_encoder_ops(*cast(list[NormSwishConv], ops))
        gate = cell.se
        if gate is not None:
            cast(nn.Linear, gate.se[0]).weight.div_(RESIDUAL)
        super().__init__(_swapped(cell.skip), ops, gate)

    def branch(self) -> list[nn.Module]:
        """The operations and the gate."""
        return [*self._ops, *([] if self.se is None else [self.se])]

    def compute(self, x: Tensor) -> Tensor:
        """The residual sum."""
        y = x.to(self.branch_dtype or x.dtype)
        for op in self._ops:
            y = op(y)
        if self.se is None:
            sum_: Tensor = self.skip(x) + y
            return sum_
        gate: Tensor = self.se.se(y.mean((2, 3)))[:, :, None, None]
        return torch.addcmul(self.skip(x), y, gate) if self.branch_dtype is None else self.skip(x) + y * gate


class FoldedResidual(nn.Module):
    """1×1 → swish [→ nearest ×2] → depthwise 5×5 → swish → 1×1, every batch norm in these."""

    def __init__(self, residual: InvertedResidual) -> None:
        super().__init__()
        *upsample, first, expand, depthwise, project, last = residual.conv
        self.upsample = nn.Sequential(*upsample)
        (conv1, bn1), (conv2, bn2) = cast(Any, expand).conv, cast(Any, depthwise).conv
        (scale0, shift0), (scale3, shift3) = affine(cast(Any, first).bn), affine(cast(Any, last).bn)
        (scale1, shift1), (scale2, shift2) = affine(bn1), affine(bn2)
        weight = conv1.weight.flatten(1)
        self.expand = CellPointwise(scale1[:, None] * weight * scale0, scale1 * (weight @ shift0) + shift1)
        self.depthwise = ConstantConv2d(scale2[:, None, None, None] * conv2.weight, shift2, groups=len(conv2.weight))
        weight = cast(Conv2d, project).weight.flatten(1)
        self.project = CellPointwise(RESIDUAL * scale3[:, None] * weight, RESIDUAL * shift3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H or 2H, W or 2W)."""
        y = self.upsample(F.silu(self.expand(x)))
        projected: Tensor = self.project(F.silu(self.depthwise(y)))
        return projected


def affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as scale and shift, (C,) each."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight / (variance + norm.eps).sqrt()
    return scale, norm.bias - mean * scale


def plain(conv: Conv2d) -> Conv2d | Pointwise:
    """The convolution with its weight as used."""
    if conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1:
        return Pointwise(conv.kernel().flatten(1), conv.bias)
    size, stride, biased = conv.kernel_size[0], conv.stride[0], conv.bias is not None
    folded = Conv2d(conv.in_channels, conv.out_channels, size, stride, groups=conv.groups, bias=biased)
    folded.weight, folded.bias = nn.Parameter(conv.kernel()), conv.bias
    return folded


def _fold_encoder_ops(first: NormSwishConv, second: NormSwishConv) -> list[nn.Module]:
    """bn1, swish, conv1 with bn2 in it; swish, conv2 with the cell's factor in it."""
    scale, shift = affine(second.bn_act)
    conv1, conv2 = (cast(Any, plain(op.conv_0)) for op in (first, second))
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
            conv = module.conv
            network.dec_tower[index] = FoldedCombiner(conv.kernel().flatten(1), cast(Tensor, conv.bias), state)
            state = None
