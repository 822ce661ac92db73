"""Hidden layers of the heads, which several groups may share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ebm_prior.model.energy import EnergyConfig

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"silu": nn.SiLU, "leaky_relu": partial(nn.LeakyReLU, 0.2)}


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


def hidden_layers(shape: tuple[int, ...], config: EnergyConfig) -> HiddenLayers:
    """The hidden layers of a head, (B, *shape) to (B, width).

    Maps (C, H, W): N × [conv(4, stride 2, pad 1), activation] and N × [Linear, activation], N = log2(side/4), the
    paper's rule for sides 8 to 128 (Table 12), rounded for any other side; at least one linear layer, and no
    convolution on maps smaller than 6. Vectors: `vector_layers` linear layers.

    `local` heads of maps of sides from 3: [conv(3, pad 1), activation], the same N convolutions, one linear layer, and
    the sums of `HiddenLayers`.
    """
    activation = ACTIVATIONS[config.activation]
    layers: list[nn.Module] = []
    local = False
    if len(shape) == 3:
        halvings = max(0, round(math.log2(min(shape[1:]) / 4)))
        channels, height, width = shape
        if local := config.local and min(height, width) >= 3:
            layers += [nn.Conv2d(channels, config.channels, 3, padding=1), activation()]
            channels = config.channels
        for _ in range(halvings):
            layers += [nn.Conv2d(channels, config.channels, 4, stride=2, padding=1), activation()]
            channels, height, width = config.channels, height // 2, width // 2
        features, depth = channels * height * width, 1 if local else max(1, halvings)
    else:
        features, depth = math.prod(shape), config.vector_layers
    layers.append(nn.Flatten())
    for _ in range(depth):
        layers += [nn.Linear(features, config.hidden), activation()]
        features = config.hidden
    return HiddenLayers(layers, local)


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
