"""BIVA: architectures published and small, what cannot be built, the contract, and the passes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from ebm_prior.backbones.biva import BIVA
from tiny_biva import FIXTURES, REFERENCES, STAGES, initialised, needs_fixtures, tiny

from ebm_prior.testing import check_backbone

# The published configurations, as a person writes them.


def published(filters: int, down: tuple[int, ...], latents: list[dict[str, int]]) -> list[dict[str, Any]]:
    """Stages of three blocks, kernels 5 at the image and 3 above, stride 2 at the end of the stages `down`."""
    stages = []
    for i, latent in enumerate(latents):
        block = {"filters": filters, "kernel": 5} if i == 0 else {"filters": filters}
        stages.append({"blocks": [block, block, {**block, "stride": 2 if i in down else 1}], "latent": latent})
    return stages


MNIST: dict[str, Any] = {
    "image_shape": [1, 28, 28],
    "likelihood": "bernoulli",
    "stages": published(64, (0, 5), [{"features": n} for n in (48, 40, 32, 24, 16, 8)]),
}
KERNELS = [16] * 10 + [8] * 4 + [4]
CIFAR10: dict[str, Any] = {
    "image_shape": [3, 32, 32],
    "likelihood": "logistic_mixture",
    "stages": published(96, (0, 10, 14), [{"features": 38 - 2 * i, "kernel": k} for i, k in enumerate(KERNELS)]),
}
# Options, parameters, state-dict entries, groups, latent dimensions.
PUBLISHED = {
    "MNIST": (MNIST, 31_550_946, 825, 11, 328),
    "MNIST, VAE": ({**MNIST, "kind": "vae"}, 17_804_706, 505, 6, 168),
    "MNIST, LVAE": ({**MNIST, "kind": "lvae"}, 16_524_450, 549, 6, 168),
    "CIFAR-10": (CIFAR10, 102_948_560, 2005, 29, 156_320),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_have_the_published_size(name: str) -> None:
    options, parameters, entries, groups, dimensions = PUBLISHED[name]
    with torch.device("meta"):
        model = BIVA(**options)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.network.state_dict()) == entries
    assert len(model.groups) == groups
    assert sum(torch.Size(group.shape).numel() for group in model.groups) == dimensions


def test_groups_are_named_after_stage_and_side() -> None:
    assert [group.name for group in tiny().groups] == ["z3", "z2_td", "z2_bu", "z1_td", "z1_bu"]
    assert [group.shape for group in tiny().groups] == [(3,), (3,), (3,), (2, 4, 4), (2, 4, 4)]
    assert [group.name for group in tiny(kind="lvae").groups] == ["z3", "z2", "z1"]


# The contract, in float64 with small networks whose densities can be formed whole.


def wide_image(kind: str) -> dict[str, Any]:
    """Maps in every stage, more channels in than filters, even kernels, stride 2 first in the bottom stage."""
    stages = [
        {
            "blocks": [{"filters": 3, "kernel": 2, "stride": 2}, {"filters": 2, "kernel": 1}, {"filters": 3}],
            "latent": {"features": 4, "kernel": 2},
        },
        {"blocks": [{"filters": 3}] * 2 + [{"filters": 3, "stride": 2}], "latent": {"features": 1, "kernel": 3}},
        {"blocks": [{"filters": 3}] * 3, "latent": {"features": 5, "kernel": 1}},
    ]
    return {"image_shape": [3, 8, 8], "likelihood": "logistic_mixture", "components": 2, "stages": stages, "kind": kind}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "biva": {},
    "lvae": {"kind": "lvae"},
    "vae": {"kind": "vae"},
    "no skips": {"skips": False},
    "lvae without skips": {"kind": "lvae", "skips": False},
    "log variance bounded, ReLU": {"log_variance": "tanh", "activation": "ReLU"},
    "log variance free": {"log_variance": "none"},
    "colours": wide_image("biva"),
    "colours, lvae": wide_image("lvae"),
    "colours, vae": wide_image("vae"),
    "one stage": {"stages": STAGES[:1]},
    "one stage of vae": {"stages": [{**STAGES[0], "latent": {"features": 3}}], "kind": "vae"},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_keeps_the_backbone_contract(name: str) -> None:
    torch.manual_seed(0)
    report = check_backbone(initialised(tiny(**CONFIGURATIONS[name])))
    assert not report.skipped


@needs_fixtures
@pytest.mark.parametrize("name", REFERENCES)
def test_official_models_keep_the_backbone_contract(name: str) -> None:
    assert not check_backbone(BIVA.load_official(FIXTURES / name), batch_size=2).skipped


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_architecture_survives_json(name: str) -> None:
    model = tiny(**CONFIGURATIONS[name])
    again = BIVA(**json.loads(json.dumps(model.architecture)))
    assert again.architecture == model.architecture
    assert (again.groups, again.image_shape) == (model.groups, model.image_shape)
