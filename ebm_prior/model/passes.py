"""How a backbone is computed: its device, its precision, and how its cells save memory or time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Passes:
    """Device and precision of a backbone, and how its cells are run. Results differ only by rounding.

    dtype: type of weights and computation; torch.bfloat16 means float32 with the network's cells in bfloat16.
    checkpointing: recompute the cells in a backward pass, to save memory.  compiled: fuse them with torch.compile.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    compiled: bool = False

    def place(self, network: Backbone) -> Backbone:
        """Move the network's weights to the device and into the precision, in place; returns the network."""
        return network.to(device=self.device, dtype=torch.float32 if self.dtype == torch.bfloat16 else self.dtype)

    def apply(self, backbone: Backbone) -> Backbone:
        """The frozen and placed `backbone` with its cells run in this way; its weights are the same.

        Raises ConfigurationError where the adapter does not support it.
        """
        if self.dtype == torch.bfloat16 and backbone.precision != "bf16":
            backbone = backbone.for_inference(cells=self.dtype)
        if self.checkpointing:
            backbone = backbone.checkpointing()
        return backbone.compiled() if self.compiled else backbone

    def precision(self, backbone: Backbone) -> str:
        """The precision in which the placed `backbone` computes, under its command-line name."""
        return "bf16" if self.dtype == torch.bfloat16 else backbone.precision

    def learning(self, backbone: Backbone) -> Backbone:
        """The placed `backbone`, which is in train mode, with its cells run in this way, for the steps of a training.

        Its tensors are those of `backbone`. Raises ConfigurationError where the adapter, the weights or the device do
        not support it.
        """
        if self.checkpointing:
            raise ConfigurationError("a network in training keeps its cells' maps: leave out --checkpointing")
        half = self.dtype == torch.bfloat16
        if half:
            _require_bfloat16(next(backbone.parameters()))
        return backbone.for_training(cells=self.dtype if half else None, compiled=self.compiled)


def _require_bfloat16(like: torch.Tensor) -> None:
    """Raise ConfigurationError where a network with parameters as `like` cannot have its cells in bfloat16."""
    kind = like.device.type
    if like.dtype != torch.float32:
        found = str(like.dtype).removeprefix("torch.")
        raise ConfigurationError(f"--precision bf16: expected weights in float32, found {found}: use .float()")
    if not torch.amp.is_autocast_available(kind) or (kind == "cuda" and not torch.cuda.is_bf16_supported()):
        raise ConfigurationError(f"--precision bf16: the device {like.device} has no bfloat16: leave it out")


PLAIN = Passes()
"""The default: the backbone as it is placed, or on the CPU in float32, with cells run in the plain way."""
