"""The network of BIVA: its stages, numbered from the image (stage 0 holds z1), and the image head."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, cast

from ebm_prior.backbones.biva.options import Architecture
from ebm_prior.backbones.biva.stages import Conditional, Rising, Stage, build_stage
from ebm_prior.backbones.biva_family.layers import SameConv2d
from ebm_prior.backbones.biva_family.paths import ACTIVATIONS, Skips, require_meeting_shapes
from torch import Tensor, nn

from ebm_prior.model.backbone import Draw


class Features(NamedTuple):
    """The inputs of the image head: the latents of stage 0, each (B, *shape), and the skip inputs of its blocks."""

    z: tuple[Tensor, ...]
    skips: tuple[Tensor, ...]


class Network(nn.Module):
    """The official module tree."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        stages: list[Stage] = []
        for i, spec in enumerate(a.stages):
            stages.append(build_stage(spec, stages[-1] if stages else None, a, top=i == len(a.stages) - 1))
        require_meeting_shapes((stage.h_shape, stage.p_convs) for stage in reversed(stages))
        self.stages = nn.ModuleList(stages)
        # The official module has the activation as its entry 0.
        filters = stages[0].p_convs.blocks[-1].filters
        self.projection = nn.ModuleDict({"1": SameConv2d(filters, a.image_channels, 1, init_std=a.init_std)})

    def encode(self, x: Tensor, noise: Sequence[Tensor]) -> list[Conditional]:
        """The way up from x (B, C, H, W), scaled as the network expects it: the posterior of every group.

        `noise` (B, *shape) and the posteriors are in generation order.
        """
        posteriors: list[Conditional] = []
        rising, end = Rising(x, x, None), len(noise)
        for stage in self.bottom_up:
            begin = end - len(stage.sides)
            rising, own = stage.rise(rising, noise[begin:end])
            posteriors, end = own + posteriors, begin
        return posteriors

    def generate(self, draw: Draw) -> Features:
        """Draw every group from the top down, without the image head. The context of a draw is d, None at the top."""
        skips: Skips = deque(maxlen=self.skip_length)
        d: Tensor | None = None
        index = 0
        z: list[Tensor] = []
        for number in reversed(range(len(self.stages))):
            stage, z = self.bottom_up[number], []
            for head in stage.heads:
                z.append(draw(index, head.p(d), d))
                index += 1
            if number > 0:
                d = stage.p_convs(stage.start(z), skips)
        return Features(tuple(z), tuple(skips))

    def image(self, features: Features) -> Tensor:
        """The raw parameters of p(x | z), (B, image_channels, H, W): the way down of stage 0 and the image head.

        Leaves `features` as they are.
        """
        bottom = self.bottom_up[0]
        skips: Skips = deque(features.skips, maxlen=self.skip_length)
        y = bottom.p_convs(bottom.start(features.z), skips)
        parameters: Tensor = self.projection["1"](ACTIVATIONS[self.architecture.activation](y))
        return parameters

    @property
    def skip_length(self) -> int:
        """The number of the top stage's blocks."""
        return len(self.bottom_up[-1].p_convs.layers)

    @property
    def bottom_up(self) -> list[Stage]:
        """The stages in order, with their type."""
        return cast(list[Stage], list(self.stages))
