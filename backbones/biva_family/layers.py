"""The layers of the BIVA family (BIVA, hvae-oodd): SAME convolutions with weight norm, and the residual block on them.

Parameter names are those of the official files: `initialized`, `conv.{bias,weight_g,weight_v}`, `linear.{…}`.

A weight-normed layer that has seen no data rescales itself on its first batch in train mode (Salimans & Kingma, 2016):
its outputs there have mean 0 and standard deviation `init_std` in every channel. The buffer `initialized` records it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebm_prior.errors import CheckpointError, ConfigurationError, few

Activation = Callable[[Tensor], Tensor]
Shape = tuple[int, int, int]
"""(C, H, W), without the batch axis."""
Network = TypeVar("Network", bound=nn.Module)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis of `size`, such that the output has ceil(size / stride) entries."""
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    return total // 2, total - total // 2


def pad_same(x: Tensor, kernel: int, stride: int) -> tuple[Tensor, tuple[int, int]]:
    """x (B, C, H, W), padded where SAME padding is lopsided, and the symmetric padding left to the operation itself."""
    top, bottom = same_padding(x.shape[2], kernel, stride)
    left, right = same_padding(x.shape[3], kernel, stride)
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


class Affine(nn.Module):
    """The parameters of an affine map: a bias per output channel, and a weight, normed as w = g·v/‖v‖ or plain.

    The norm runs over all axes but `out_axis`, the axis of the output channels. Calling the module returns w.
    """

    def __init__(self, shape: tuple[int, ...], *, out_axis: int = 0, weight_norm: bool = True) -> None:
        super().__init__()
        weight = torch.empty(shape)
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(shape[out_axis]))
        self.weight_norm = weight_norm
        self._axes = [axis for axis in range(len(shape)) if axis != out_axis]
        if weight_norm:
            self.weight_g = nn.Parameter(torch.ones([1 if a in self._axes else n for a, n in enumerate(shape)]))
            self.weight_v = nn.Parameter(weight)
        else:
            self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """The weight, of the shape that the operation expects."""
        if not self.weight_norm:
            return self.weight
        norm: Tensor = torch.linalg.vector_norm(self.weight_v, dim=self._axes, keepdim=True)
        return self.weight_v * (self.weight_g / norm)

    def fold(self) -> None:
        """Make the weight, as it is now, a plain one."""
        if self.weight_norm:
            self.weight = nn.Parameter(self().detach())
            self.weight_norm = False
            del self.weight_g, self.weight_v


class DataInitialized(nn.Module):
    """Base of the layers below: the flag, and the first forward that sets g and b from the data."""

    initialized: Tensor

    def __init__(self, init_std: float, *, weight_norm: bool) -> None:
        super().__init__()
        self.init_std, self.weight_norm = init_std, weight_norm
        self.register_buffer("initialized", torch.tensor(False))

    def _initialize(self, affine: Affine, response: Tensor) -> None:
        """g and b such that `response` (B, C, …), the outputs at g = 1 and b = 0, gets mean 0 and std `init_std`."""
        values = response.transpose(0, 1).flatten(1)
        if values.shape[1] < 2:
            raise ConfigurationError(
                "the first batch in train mode sets the weight norms from its own statistics: expected at least 2 "
                "images, found 1; begin with a larger batch"
            )
        scale = self.init_std / (values.var(1) + 1e-8).sqrt()
        affine.weight_g.copy_(scale.view_as(affine.weight_g))
        affine.bias.copy_(-scale * values.mean(1))
        self.initialized.fill_(True)

    @property
    def _waits(self) -> bool:
        return self.training and self.weight_norm and not bool(self.initialized)


def fold_weight_norm(network: Network) -> Network:
    """The network with weight norm in the weights, changed in place: what folds of the BIVA family for inference."""
    for module in network.modules():
        if isinstance(module, Affine):
            module.fold()
    return network


def require_initialized(network: nn.Module, path: Path) -> None:
    """Every weight-normed layer must have seen data. Raises CheckpointError with the names of those that have not.

    `path`: the file or folder that the weights come from.
    """
    raw = [
        key
        for key, layer in network.named_modules()
        if isinstance(layer, DataInitialized) and layer.weight_norm and not bool(layer.initialized)
    ]
    if raw:
        raise CheckpointError(
            f"{path} holds layers that were never initialised from data ({few(raw)}): expected the weights "
            "of a model that has been trained; save them again after the first training step"
        )


class SameConv2d(DataInitialized):
    """Convolution with SAME padding: (B, C, H, W) to (B, out_channels, ceil(H/stride), ceil(W/stride))."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        *,
        weight_norm: bool = True,
        init_std: float = 1.0,
    ) -> None:
        super().__init__(init_std, weight_norm=weight_norm)
        self.kernel, self.stride = kernel, stride
        self.conv = Affine((out_channels, in_channels, kernel, kernel), weight_norm=weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, ceil(H/stride), ceil(W/stride))."""
        x, padding = pad_same(x, self.kernel, self.stride)
        if self._waits:
            with torch.no_grad():
                self.conv.weight_g.fill_(1)
                self._initialize(self.conv, F.conv2d(x, self.conv(), None, self.stride, padding))
        return F.conv2d(x, self.conv(), self.conv.bias, self.stride, padding)


class SameConvTranspose2d(DataInitialized):
    """Transposed convolution, cropped (or extended with zeros) to exactly `stride` times the input's size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        *,
        weight_norm: bool = True,
        init_std: float = 1.0,
    ) -> None:
        super().__init__(init_std, weight_norm=weight_norm)
        self.stride = stride
        self.surplus = kernel - stride  # of the full output (H − 1)·stride + kernel
        self.conv = Affine((in_channels, out_channels, kernel, kernel), out_axis=1, weight_norm=weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H·stride, W·stride)."""
        if self._waits:
            with torch.no_grad():  # the statistics are those of the full output
                self.conv.weight_g.fill_(1)
                self._initialize(self.conv, F.conv_transpose2d(x, self.conv(), None, self.stride))
        before = self.surplus // 2
        if before < 0:  # a kernel smaller than the stride leaves gaps at the border
            y = F.conv_transpose2d(x, self.conv(), self.conv.bias, self.stride)
            return F.pad(y, 2 * (-before, before - self.surplus))
        y = F.conv_transpose2d(x, self.conv(), self.conv.bias, self.stride, padding=before)
        return y[:, :, : x.shape[2] * self.stride, : x.shape[3] * self.stride]  # drops an odd surplus's last entry


class Dense(DataInitialized):
    """Affine map of everything but the batch axis: (B, …) flattened in C, H, W order, to (B, out_features)."""

    def __init__(self, in_features: int, out_features: int, *, weight_norm: bool = True, init_std: float = 1.0) -> None:
        super().__init__(init_std, weight_norm=weight_norm)
        self.linear = Affine((out_features, in_features), weight_norm=weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) to (B, out_features)."""
        x = x.flatten(1)
        if self._waits:
            with torch.no_grad():
                self.linear.weight_g.fill_(1)
                self._initialize(self.linear, F.linear(x, self.linear()))
        return F.linear(x, self.linear(), self.linear.bias)


class ResidualBlock(nn.Module):
    """conv1 → + aux_op(auxiliary input) → activation → dropout → conv2 → gate → + shortcut, as hvae-oodd has it.

    `transposed` blocks multiply the image's size by `stride`, others divide it. `residual` blocks activate their input
    first and add it to the output, where that is not larger. `aux_shape` declares an auxiliary input; the layer for it
    exists only where shape or size differ from conv1's output, and otherwise the auxiliary input has no effect.
    """

    every_aux_has_layer: ClassVar[bool] = False

    def __init__(
        self,
        in_shape: Shape,
        filters: int,
        kernel: int,
        stride: int,
        *,
        activation: Activation,
        gated: bool,
        residual: bool,
        transposed: bool,
        aux_shape: Shape | None = None,
        dropout: float = 0.0,
        weight_norm: bool = True,
        init_std: float = 1.0,
    ) -> None:
        super().__init__()
        channels, size, _ = in_shape
        if not transposed and size % stride:
            raise ConfigurationError(
                f"expected image sizes that the strides divide, found size {size}, stride {stride}"
            )
        out_size = size * stride if transposed else size // stride
        self.out_shape: Shape = (filters, out_size, out_size)
        self.aux_shape = aux_shape
        self.filters, self.stride, self.dropout = filters, stride, dropout
        self.activation, self.gated, self.residual = activation, gated, residual
        self.shortcut = residual and out_size <= size
        self._layer_options: dict[str, Any] = {"weight_norm": weight_norm, "init_std": init_std}
        self.conv1 = SameConv2d(channels, filters, kernel, **self._layer_options)
        self.aux_op = None if aux_shape is None else self._build_aux_op(aux_shape, (filters, size, size), kernel)
        conv2 = SameConvTranspose2d if transposed and stride > 1 else SameConv2d
        self.conv2 = conv2(filters, 2 * filters if gated else filters, kernel, stride, **self._layer_options)

    def _build_aux_op(self, aux: Shape, target: Shape, kernel: int) -> nn.Module | None:
        """The layer from the auxiliary input's shape to that of conv1's output; None where they agree, as a rule."""
        if aux == target and not self.every_aux_has_layer:
            return None
        larger, smaller = max(aux[1], target[1]), min(aux[1], target[1])
        if larger % smaller:
            raise ConfigurationError(f"expected sizes that divide each other, found auxiliary {aux} and block {target}")
        if aux[1] < target[1]:
            return SameConvTranspose2d(aux[0], target[0], kernel, larger // smaller, **self._layer_options)
        return SameConv2d(
            aux[0], target[0], 1 if larger == smaller else kernel, larger // smaller, **self._layer_options
        )

    def _shortcut(self, x: Tensor) -> Tensor:
        """x with its surplus channels cut, or missing ones appended as zeros, average-pooled to the output's size."""
        missing = self.filters - x.shape[1]
        if missing:
            x = F.pad(x, (0, 0, 0, 0, 0, missing))
        if self.stride == 1:
            return x
        x, padding = pad_same(x, 3, self.stride)
        return F.avg_pool2d(x, 3, self.stride, padding)  # padded zeros count: always divides by 9

    def forward(self, x: Tensor, aux: Tensor | None = None) -> Tensor:
        """(B, *in_shape), and (B, *aux_shape) where aux_op exists, to (B, *out_shape)."""
        y: Tensor = self.conv1(self.activation(x) if self.residual else x)
        if self.aux_op is not None:
            if aux is None:
                raise ConfigurationError(f"the block expects an auxiliary input (B, *{self.aux_shape}), found none")
            y = y + self.aux_op(self.activation(aux))
        y = self.activation(y)
        if self.training and self.dropout:
            y = F.dropout(y, self.dropout)
        y = self.conv2(y)
        if self.gated:
            y = F.glu(y, dim=1)
        return y + self._shortcut(x) if self.shortcut else y
