"""The smallest HVAE that has everything in it."""

from __future__ import annotations

from typing import Any

import torch
from ebm_prior.backbones.hvae.adapter import HVAE


def tiny(**changes: Any) -> HVAE:
    """Two stages, unequal block counts, a latent map below a latent vector."""
    stages = [
        {"blocks": [{"filters": 4, "kernel": 3, "stride": 2}], "latent": {"features": 2, "kernel": 3}},
        {
            "blocks": [{"filters": 4, "kernel": 3, "gated": True}, {"filters": 4, "kernel": 3, "stride": 2}],
            "latent": {"features": 3},
        },
    ]
    return HVAE(**{"image_shape": [1, 8, 8], "likelihood": "bernoulli", "stages": stages, **changes})


def initialised(model: HVAE, batch: int = 16) -> HVAE:
    """Show the network one batch in train mode."""
    images = torch.rand(batch, *model.image_shape, generator=torch.Generator().manual_seed(1))
    model.train()
    model.likelihood(model.infer(model.observe(images)).features)
    return model.eval()
