"""How a backbone is computed: on which device, in which precision, and how its cells save memory or time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ebm_prior.model.backbone import Backbone

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Passes:
    """Device and precision of a backbone, and what its cells do in a pass. Results differ by rounding alone.

    dtype: of weights and computation; torch.bfloat16 means float32 with the network's cells in bfloat16.
    checkpointing: cells keep less for a backward pass, and compute the rest again.  compiled: torch.compile fuses them.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    compiled: bool = False

    def place(self, network: Backbone) -> Backbone:
        """Move the network's weights to the device and into the precision, in place; returns the network."""
        return network.to(device=self.device, dtype=torch.float32 if self.dtype == torch.bfloat16 else self.dtype)

    def apply(self, backbone: Backbone) -> Backbone:
        """A frozen backbone, already placed, with its cells computed as this says; it has the same weights.

        Raises ConfigurationError where the adapter has no cells of this kind.
        """
        if self.dtype == torch.bfloat16 and backbone.precision != "bf16":
            backbone = backbone.for_inference(cells=self.dtype)
        if self.checkpointing:
            backbone = backbone.checkpointing()
        return backbone.compiled() if self.compiled else backbone


PLAIN = Passes()
"""On the CPU in float32, or as the backbone was placed by its owner, and nothing else."""
