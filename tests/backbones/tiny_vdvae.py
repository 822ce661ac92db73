"""The smallest VDVAE that has everything in it, and where the official code's arrays are."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ebm_prior.backbones.vdvae.adapter import VDVAE
from ebm_prior.backbones.vdvae.published import PUBLISHED

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/vdvae"
FILES = {
    "cifar10-mini": "model.th",
    "custom-widths": "model.th",
    "ffhq-5bit": "model.th",
    "ddp-imagenet64": "model.th",
    "run-folder": "latest-model-ema.th",
}
REFERENCES = list(FILES)
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference arrays of ../shared are not here")

TINY: dict[str, Any] = {
    "enc_blocks": "8x1,8d2,4x1,4d4,1x1",
    "dec_blocks": "1x1,4m1,8m4,8m1",
    "data_set": "cifar10",
    "width": 4,
    "custom_width_str": "4:6,1:6",
    "zdim": 2,
    "bottleneck_multiple": 0.5,
    "no_bias_above": 4,
    "num_mixtures": 2,
}


def tiny(**changes: Any) -> VDVAE:
    """Colour images of 8 × 8 pixels, four groups, wider maps below the image's side, which has no learned map."""
    return VDVAE(**{**TINY, **changes})


def trained(model: VDVAE, seed: int = 0) -> VDVAE:
    """As if trained: no weight at its special initial value. In eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@cache
def trained_tiny() -> VDVAE:
    torch.manual_seed(0)
    return trained(tiny())


@cache
def trained_smallest() -> VDVAE:
    """Two groups of one side: as few shapes as torch.compile can be shown."""
    torch.manual_seed(0)
    words = {"enc_blocks": "4", "dec_blocks": "4x2", "custom_width_str": "", "no_bias_above": 4}
    return trained(tiny(**words))


def official(name: str) -> VDVAE:
    """The network of a fixture."""
    return VDVAE.load_official(FIXTURES / name / FILES[name])


@cache
def published(name: str) -> VDVAE:
    """The network without its weights."""
    with torch.device("meta"):
        return VDVAE(data_set=name, **PUBLISHED[name])
