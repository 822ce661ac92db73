"""Hidden layers of the heads, which several groups may share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn


class HiddenLayers(nn.Sequential):
    """The hidden layers of a head: (B, *shape) to (B, width).

    With `sums` the sums over all places of the units of each convolution follow the units of the last layer. So a last
    layer on top of them can see single places, and learns from them from its first step on.
    """

    def __init__(self, layers: Sequence[nn.Module], sums: bool) -> None:
        super().__init__(*layers)
        self.sums, self.first = sums, int(isinstance(layers[0], nn.Flatten))
        convolutions = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)]
        *_, last = (layer.out_features for layer in layers if isinstance(layer, nn.Linear))
        self.width = last + sums * sum(convolutions)

    def forward(self, x: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The last hidden layer, and sums. change: a function on the first layer's units before their activation."""
        sums: list[Tensor] = []
        for index, layer in enumerate(self):
            x = layer(x)
            if change and index == self.first:
                x = change(x)
            if self.sums and x.dim() == 4 and not isinstance(layer, nn.Conv2d):
                sums.append(x.sum((2, 3)))
        return torch.cat([x, *sums], dim=1) if sums else x


class SharedBody(nn.Module):
    """Hidden layers that several groups share, as one of the groups sees them: (B, *shape) to (B, width).

    The units h of the first hidden layer become (1 + gain) h + offset before their activation; both start at 0.
    """

    def __init__(self, layers: HiddenLayers) -> None:
        super().__init__()
        self.layers = (layers,)  # in a tuple, since their weights belong to the JointEnergy
        self.width = layers.width
        first = layers[layers.first]
        units, *_ = cast(Tensor, first.weight).shape
        each = (units, 1, 1) if isinstance(first, nn.Conv2d) else (units,)
        self.gain, self.offset = nn.Parameter(torch.zeros(each)), nn.Parameter(torch.zeros(each))

    def forward(self, x: Tensor) -> Tensor:
        """See `HiddenLayers`."""
        (layers,) = self.layers
        return layers(x, lambda units: torch.addcmul(units + self.offset, units, self.gain))  # type: ignore[no-any-return]
