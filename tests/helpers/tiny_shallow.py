"""A small shallow generator."""

from __future__ import annotations

from typing import Any

import torch
from adapter_cases import AdapterCase
from ebm_prior.backbones.shallow import ShallowGenerator


def small(**changes: Any) -> ShallowGenerator:
    torch.manual_seed(0)
    return ShallowGenerator(**{"image_shape": (1, 28, 28), "latents": (4, 3), "width": 4, "hidden": 6, **changes})


CASE = AdapterCase(ShallowGenerator, {"": lambda: small().eval()}, ({"image_shape": [1, 28, 14]}, "image_shape"))
