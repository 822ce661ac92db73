"""Priors that no fit has made."""

from __future__ import annotations

import torch

from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig


def bent(backbone: Backbone, scale: float = 1.0) -> EBMPrior:
    """A prior with random heads, large enough to matter."""
    generator = torch.Generator().manual_seed(3)
    energy = JointEnergy(backbone.groups, EnergyConfig(channels=4, hidden=8, joint=8)).double()
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.copy_(scale * 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return EBMPrior(backbone, energy, sampler=SamplerConfig(proposals=4, steps=3))
