"""The smallest NVAE that has everything in it, its official file, and where the official code's arrays are."""

from __future__ import annotations

import argparse
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import AdapterCase, Official
from ebm_prior.backbones.nvae.adapter import NVAE
from torch import Tensor

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/nvae"
REFERENCES = ["mnist", "cifar10-logistic", "imagenet32-gaussian-5bit", "celeba64-logistic-min-groups"]
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference arrays of ../shared are not here")
# Convolutions of inverted residuals, whose weight the official files hold twice.
UNNORMED = re.compile(r"(tower|process)\.\d+\._ops\.0\.conv\.\d(\.conv\.0)?\.weight")


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


def tiny_args(**changes: Any) -> argparse.Namespace:
    """`tiny()` as the official code records it, with options that have no effect on the model."""
    options = {
        "dataset": "imagenet_8",
        "arch_instance": "res_mbconv",
        "num_latent_scales": 2,
        "num_groups_per_scale": 2,
        "ada_groups": True,
        "min_groups_per_scale": 1,
        "num_latent_per_group": 2,
        "num_channels_enc": 3,
        "num_channels_dec": 4,
        "num_preprocess_blocks": 1,
        "num_postprocess_blocks": 1,
        "num_preprocess_cells": 1,
        "num_postprocess_cells": 1,
        "num_cell_per_cond_enc": 1,
        "num_cell_per_cond_dec": 1,
        "num_nf": 1,
        "num_mixture_dec": 2,
        "num_x_bits": 8,
        "use_se": True,
        "res_dist": True,
        "learning_rate": 0.01,
        "save": "/tmp/run",
    }
    return argparse.Namespace(**{**options, **changes})


def seeded(**changes: Any) -> NVAE:
    torch.manual_seed(0)
    return trained(tiny(**changes))


@cache
def trained_tiny() -> NVAE:
    return seeded()


def weights(model: NVAE) -> dict[str, Tensor]:
    state = model.network.state_dict()
    aliases = {f"{key}_normalized": tensor for key, tensor in state.items() if UNNORMED.search(key)}
    return {**state, **aliases}


def write(folder: Path, *, args: Any = None, state: Any = None, **more: Any) -> Path:
    """The file that the official code leaves behind, of `tiny()` unless told otherwise."""
    model = trained_tiny()
    state = weights(model) if state is None else state
    optimizer = {i: {"exp_avg": torch.ones_like(p), "exp_inf": p * 2} for i, p in enumerate(model.parameters())}
    content = {
        "epoch": 3,
        "state_dict": state,
        "optimizer": {"state": optimizer, "param_groups": []},
        "args": args or tiny_args(),
        "arch_instance": {"normal_enc": ["res_bnswish", "res_bnswish"]},
        **more,
    }
    torch.save(content, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


CASE = AdapterCase(
    NVAE,
    {
        "": trained_tiny,
        "of one group": lambda: seeded(groups_per_scale=[1], encoder_channels=4, squeeze_excite=False),
        "of combiners": lambda: seeded(blocks=0, encoder_cells=0, decoder_cells=0, image_shape=[3, 4, 4]),
    },
    ({"image_shape": [3, 8, 4]}, "square"),
    Official(
        write,
        trained_tiny,
        lambda: weights(trained_tiny()),
        ("checkpoint.pt",),
        {name: FIXTURES / name / "checkpoint.pt" for name in REFERENCES},
    ),
)
