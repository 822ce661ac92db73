"""The deterministic paths of the BIVA family (BIVA, LVAE and VAE of its code, HVAE), built from the shared layers.

A stage holds a latent, blocks that lead up to it and, reversed and transposed, blocks that lead down from it. The
generator's blocks are numbered t = 0, 1, 2, … from the top through all stages. With n blocks in the top stage, each
block t ≥ n has the output of block t − n as its auxiliary input (the skips).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from ebm_prior.backbones.biva_family.layers import Activation, ResidualBlock, Shape
from ebm_prior.backbones.options import require_choice, require_count, require_number
from torch import Tensor, nn

from ebm_prior.errors import ConfigurationError, shown


def identity(x: Tensor) -> Tensor:
    """Return x unchanged."""
    return x


ACTIVATIONS: dict[str, Activation] = {
    "Identity": identity,
    "ReLU": F.relu,
    "LeakyReLU": F.leaky_relu,
    "SELU": F.selu,
    "ELU": F.elu,
    "Tanh": torch.tanh,
    "Swish": F.silu,
}
LIKELIHOODS = ("bernoulli", "logistic_mixture")

Skips = deque[Tensor]
"""The outputs of the last n generator blocks, oldest first; full once the top stage, of n blocks, has run."""


def require_model_options(
    image_shape: Sequence[int], likelihood: str, activation: str, q_dropout: float, p_dropout: float
) -> Shape:
    """The image shape as a tuple, if these make sense together. Raises ConfigurationError."""
    if not isinstance(image_shape, (list, tuple)) or len(image_shape) != 3 or image_shape[1] != image_shape[2]:
        raise ConfigurationError(f"image_shape: expected (C, H, W) of a square image, found {shown(image_shape)}")
    for size in image_shape:
        require_count("image_shape", size)
    channels, height, width = image_shape
    require_choice("likelihood", likelihood, LIKELIHOODS)
    if likelihood == "logistic_mixture" and channels != 3:
        raise ConfigurationError(f"the logistic mixture models 3 colours, found images of shape {list(image_shape)}")
    require_choice("activation", activation, ACTIVATIONS)
    for which, rate in (("q_dropout", q_dropout), ("p_dropout", p_dropout)):
        require_number(f"dropout rates in [0, 1): {which}", rate, 0, 0.999)
    return channels, height, width


Block = TypeVar("Block", bound=ResidualBlock)


def chain(
    kind: type[Block], specs: Iterable[Any], in_shape: Shape, *, first_residual: bool, **options: Any
) -> list[Block]:
    """Blocks one after another: each spec is a dataclass of arguments of `kind`, `options` are those common to all."""
    blocks: list[Block] = []
    for spec in specs:
        start = blocks[-1].out_shape if blocks else in_shape
        blocks.append(kind(start, **asdict(spec), residual=bool(blocks) or first_residual, **options))
    return blocks


class InferencePath(nn.Module):
    """The blocks of a stage on the way up; all have the same auxiliary input."""

    def __init__(self, blocks: Iterable[ResidualBlock]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor, aux: Tensor | None) -> Tensor:
        """The stage's features h."""
        for block in self.layers:
            x = block(x, aux)
        return x

    @property
    def out_shape(self) -> Shape:
        """(C, H, W) of the features."""
        return cast(ResidualBlock, self.layers[-1]).out_shape


class GenerativePath(nn.Module):
    """The blocks of a stage on the way down; each takes the oldest skip as auxiliary input and appends its output."""

    def __init__(self, blocks: Iterable[ResidualBlock]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, d: Tensor, skips: Skips) -> Tensor:
        """The features that the stage below, or the likelihood, starts from. Advances `skips`."""
        for block in self.layers:
            d = block(d, skips[0] if len(skips) == skips.maxlen else None)
            skips.append(d)
        return d

    @property
    def blocks(self) -> list[ResidualBlock]:
        """The blocks in order, with their type."""
        return cast(list[ResidualBlock], list(self.layers))


def require_meeting_shapes(stages: Iterable[tuple[Shape, GenerativePath]]) -> None:
    """Check that the features from the stage above have the shape of a stage's own features h, from the top down.

    `stages`: for each the shape of h and its way down. Raises ConfigurationError.
    """
    skips: deque[Shape] | None = None
    arriving: Shape | None = None
    for shape, path in stages:
        if arriving is not None and arriving != shape:
            raise ConfigurationError(
                f"a stage's features have shape {shape}, but the stage above generates {arriving}: its "
                "first block must have as many filters as the last block of the stage below"
            )
        skips = deque(maxlen=len(path.blocks)) if skips is None else skips
        for block in path.blocks:
            if block.aux_op is not None and skips[0] != block.aux_shape:
                raise ConfigurationError(
                    f"a generator block expects a skip of shape {block.aux_shape}, but its turn in the queue brings "
                    f"{skips[0]}: use equal numbers of blocks per stage, with the strides in the last ones"
                )
            arriving = block.out_shape
            skips.append(arriving)
