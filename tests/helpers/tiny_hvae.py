"""The smallest HVAE that has everything in it, and where the official code's arrays are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import AdapterCase, Official
from ebm_prior.backbones.hvae.adapter import HVAE

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/hvae"
REFERENCES = ["fashion-mini", "cifar-mini", "fashion-trained"]
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference arrays of ../shared are not here")


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


# The official folder.


def tiny_record() -> dict[str, Any]:
    """`tiny()` as the official code records it; every option that has an official default is left out."""
    block = {"block": "ResBlockConv2d", "out_channels": 4, "kernel_size": 3, "weightnorm": True}
    return {
        "input_shape": torch.Size([1, 8, 8]),
        "likelihood_module": "BernoulliLikelihoodConv2d",
        "config_deterministic": [
            [{**block, "stride": 2, "gated": False}],
            [dict(block), {**block, "stride": 2, "gated": False}],
        ],
        "config_stochastic": [
            {"block": "GaussianConv2d", "latent_features": 2},
            {"block": "GaussianDense", "latent_features": 3, "weightnorm": True},
        ],
        "activation": "ReLU",
        "padded_shape": None,
    }


def write_run(folder: Path, *, record: dict[str, Any] | None = None, name: str = "VAE", state: Any = None) -> Path:
    """The folder that the official code leaves behind, of `tiny()` unless told otherwise."""
    state = trained_tiny().network.state_dict() if state is None else state
    torch.save(name, folder / "model_class_name.pt")
    torch.save({"kwargs": record or tiny_record()}, folder / "model_kwargs.pt")
    torch.save(state, folder / "model_state_dict.pt")
    return folder


def trained_tiny(**changes: Any) -> HVAE:
    torch.manual_seed(0)
    return initialised(tiny(**changes))


CASE = AdapterCase(
    HVAE,
    {"": trained_tiny},
    ({"image_shape": [1, 8, 4]}, "square"),
    Official(
        write_run,
        trained_tiny,
        lambda: trained_tiny().network.state_dict(),
        ("model_class_name.pt", "model_kwargs.pt", "model_state_dict.pt"),
        {name: FIXTURES / name for name in REFERENCES},
    ),
)
