"""A VDVAE folded for inference: the same function, with blocks that keep less and 1×1 convolutions as products.

There is no norm to fold. Exact in eval mode are: gain and bias before the last convolution, in its weights; all
convolutions with constant weights, which for the gradient with respect to the latents need not keep their inputs.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from ebm_prior.backbones.constant_layers import CellPointwise, ConstantConv2d, Pointwise
from ebm_prior.backbones.folding import InferenceCell
from ebm_prior.backbones.vdvae.network import Block, Network, TopDownBlock
from torch import Tensor, nn


def fold(network: Network) -> Network:
    """The network folded, made of the modules of `network`, which is in eval mode and not needed afterwards."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Block):
                setattr(module, name, FoldedBlock(child))
        if isinstance(module, TopDownBlock):
            module.z_proj = Pointwise(*_matrix(cast(nn.Conv2d, module.z_proj)))
    decoder = network.decoder
    weight, bias = _matrix(cast(nn.Conv2d, decoder.out_net.out_conv))
    if decoder.gain is not None and decoder.bias is not None:
        bias = bias + weight @ decoder.bias.flatten()
        weight = weight * decoder.gain.flatten()
        decoder.gain = decoder.bias = None
    decoder.out_net.out_conv = Pointwise(weight, bias)
    return network


class FoldedBlock(InferenceCell):
    """A block with constant weights."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.residual = block.residual
        self.layers = nn.ModuleList(_constant(conv) for conv in (block.c1, block.c2, block.c3, block.c4))

    def branch(self) -> list[nn.Module]:
        """The four convolutions."""
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        """h(x), or x + h(x). What is kept to compute h again is x in the precision of the branch."""
        y = super().forward(x.to(self.branch_dtype or x.dtype))
        return x + y if self.residual else y.to(x.dtype)

    def compute(self, x: Tensor) -> Tensor:
        """h(x)."""
        y = x
        for layer in self.layers:
            y = layer(F.gelu(y))
        return y


def _constant(convolution: nn.Conv2d) -> nn.Module:
    if convolution.kernel_size == (1, 1):
        return CellPointwise(*_matrix(convolution))
    return ConstantConv2d(convolution.weight, cast(Tensor, convolution.bias))


def _matrix(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight (C_out, C_in) and bias (C_out,) of a 1×1 convolution."""
    return convolution.weight.flatten(1), cast(Tensor, convolution.bias)
