"""The smallest BIVA that has everything in it, and where the official code's arrays are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ebm_prior.backbones.biva.adapter import BIVA

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/biva"
REFERENCES = ["binmnist-mini", "cifar-mini", "lvae-mini", "vae-mini", "fashion-trained"]
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference arrays of ../shared are not here")

STAGES: list[dict[str, Any]] = [
    {"blocks": [{"filters": 4, "stride": 2}], "latent": {"features": 2, "kernel": 2}},
    {"blocks": [{"filters": 4}], "latent": {"features": 3}},
    {"blocks": [{"filters": 4}, {"filters": 4, "stride": 2}], "latent": {"features": 3}},
]


def tiny(**changes: Any) -> BIVA:
    """Three stages for binary images of 8 × 8 pixels: unequal numbers of blocks, maps below vectors."""
    options = {"image_shape": [1, 8, 8], "likelihood": "bernoulli", "stages": STAGES, "init_std": 0.5}
    return BIVA(**{**options, **changes})


def initialised(model: BIVA, batch: int = 16) -> BIVA:
    """As if trained: initialised on one batch to outputs wide enough for all layers to matter. In eval mode."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, *model.image_shape, generator=generator)
    model.train()
    model.likelihood(model.infer(model.observe(images, generator=generator), generator=generator).features)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()
