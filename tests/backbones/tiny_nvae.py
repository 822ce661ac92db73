"""The smallest NVAE that has everything in it, and where the official code's arrays are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ebm_prior.backbones.nvae import NVAE

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/nvae"
REFERENCES = ["mnist", "cifar10-logistic", "imagenet32-gaussian-5bit", "celeba64-logistic-min-groups"]
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference arrays of ../shared are not here")


def tiny(**changes: Any) -> NVAE:
    """Two scales of two groups and one, one flow, colour images of 8 × 8 pixels."""
    options = {
        "image_shape": [3, 8, 8],
        "groups_per_scale": [2, 1],
        "likelihood": "logistic_mixture",
        "latent_channels": 2,
        "encoder_channels": 3,
        "decoder_channels": 4,
        "preprocess_cells": 1,
        "postprocess_cells": 1,
        "encoder_cells": 1,
        "decoder_cells": 1,
        "flows": 1,
        "components": 2,
    }
    return NVAE(**{**options, **changes})


def trained(model: NVAE, seed: int = 0) -> NVAE:
    """As if trained: no weight at its special initial value, running statistics of data. In eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.train()
        for _ in range(3):
            images = torch.rand(16, *model.image_shape, generator=generator)
            posterior = model.infer(model.observe(images, generator=generator), generator=generator)
            model.likelihood(posterior.features)
    return model.eval()
