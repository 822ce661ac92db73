"""The smallest BIVA that has everything in it, and where the official code's arrays are."""

from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from adapter_cases import AdapterCase, Official
from ebm_prior.backbones.biva.adapter import BIVA
from torch import Tensor

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


# The official folder.


def named(module: str, name: str) -> type:
    """A class that a pickle names module.name."""
    return type(name, (), {"__module__": module})


STAGE = {kind: named("biva.model.stage", f"{kind.capitalize()}Stage") for kind in ("biva", "lvae", "vae")}
DENSE, CONV = (named("biva.model.stochastic", name) for name in ("DenseNormal", "ConvNormal"))


def dumps(value: Any, protocol: int = 3) -> bytes:
    """A pickle, written as if the official package were installed."""
    modules = {name: types.ModuleType(name) for name in ("biva", "biva.model", "biva.model.stage", "elsewhere")}
    modules["biva.model.stochastic"] = types.ModuleType("biva.model.stochastic")
    for kind in (*STAGE.values(), DENSE, CONV, ELSEWHERE):
        setattr(modules[kind.__module__], kind.__name__, kind)
    with mock.patch.dict(sys.modules, modules):
        return pickle.dumps(value, protocol=protocol)


ELSEWHERE = named("elsewhere", "Normal")


def tiny_record(**changes: Any) -> dict[str, Any]:
    """`tiny()` as the official code records it."""
    latents: list[dict[str, Any]] = [
        {"N": latent["features"], "kernel": latent["kernel"], "block": CONV}
        if "kernel" in latent
        else {"N": latent["features"], "block": DENSE}
        for latent in (stage["latent"] for stage in STAGES)
    ]
    return {
        "Stage": STAGE["biva"],
        "tensor_shp": (-1, 1, 8, 8),
        "stages": [[[b["filters"], 3, b.get("stride", 1)] for b in s["blocks"]] for s in STAGES],
        "latents": latents,
        "nonlinearity": "elu",
        "q_dropout": 0.5,
        "p_dropout": 0,
        "type": "biva",
        "features_out": 1,
        "no_skip": False,
        "log_var_act": torch.nn.Softplus,
        **changes,
    }


def tiny_config(**changes: Any) -> dict[str, Any]:
    return {"root": "runs/", "dataset": "binmnist", "model_type": "biva", "nr_mix": 10, **changes}


def write_run(
    folder: Path,
    *,
    record: Any = None,
    config: Any = None,
    state: dict[str, Tensor] | None = None,
    protocol: int = 3,
    legacy: bool = True,
) -> Path:
    """The folder that the official code leaves behind, of `tiny()` unless told otherwise; torch 1.3 wrote no zips."""
    state = weights() if state is None else state
    (folder / "hyperparameters.p").write_bytes(dumps(tiny_record() if record is None else record, protocol))
    (folder / "config.json").write_text(json.dumps(tiny_config() if config is None else config))
    torch.save(state, folder / "model.pth", _use_new_zipfile_serialization=not legacy)
    return folder


def weights(**changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state: dict[str, Tensor] = initialised(tiny(**changes)).network.state_dict()
    return state


def written() -> BIVA:
    """What `write_run` wrote."""
    model = tiny(q_dropout=0.5, p_dropout=0, init_std=0.01)
    model.network.load_state_dict(weights())
    return model.eval()


def trained_tiny(**changes: Any) -> BIVA:
    torch.manual_seed(0)
    return initialised(tiny(**changes))


CASE = AdapterCase(
    BIVA,
    {"": trained_tiny},
    ({"image_shape": [1, 8, 4]}, "square"),
    Official(
        write_run,
        written,
        weights,
        ("hyperparameters.p", "config.json", "model.pth"),
        {name: FIXTURES / name for name in REFERENCES},
    ),
)
