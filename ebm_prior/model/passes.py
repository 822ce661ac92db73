"""How a backbone is computed: its device, its precision, and how its cells save memory or time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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


PLAIN = Passes()
"""The default: the backbone as it is placed, or on the CPU in float32, with cells run in the plain way."""
