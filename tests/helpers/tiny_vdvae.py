"""The smallest VDVAE that has everything in it, and where the official code's arrays are."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import AdapterCase, Official
from ebm_prior.backbones.vdvae.adapter import VDVAE
from ebm_prior.backbones.vdvae.published import PUBLISHED
from torch import Tensor

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
    "enc_blocks": "8x1,8d2,4d4,1x1",
    "dec_blocks": "1x1,4m1,8m4",
    "data_set": "cifar10",
    "width": 4,
    "custom_width_str": "4:6,1:6",
    "zdim": 2,
    "bottleneck_multiple": 0.5,
    "no_bias_above": 4,
    "num_mixtures": 2,
}


def tiny(**changes: Any) -> VDVAE:
    """Colour images of 8 × 8 pixels, three groups, wider maps below the image's side, which has no learned map."""
    return VDVAE(**{**TINY, **changes})


def trained(model: VDVAE, seed: int = 0) -> VDVAE:
    """As if trained: no weight at its special initial value. In eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def seeded(**changes: Any) -> VDVAE:
    torch.manual_seed(0)
    return trained(tiny(**changes))


@cache
def trained_tiny() -> VDVAE:
    return seeded()


@cache
def trained_smallest() -> VDVAE:
    """Two groups of one side: as few shapes as torch.compile can be shown."""
    return seeded(enc_blocks="4", dec_blocks="4x2", custom_width_str="", no_bias_above=4)


def weights(prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in trained_tiny().network.state_dict().items()}


def write_weights(folder: Path, name: str = "latest-model-ema.th", *, state: Any = None) -> Path:
    """The file of weights that the official code leaves behind, of `tiny()` unless told otherwise."""
    torch.save(weights() if state is None else state, folder / name)
    return folder / name


def write_log(folder: Path, name: str = "latest-log.jsonl", **changes: Any) -> Path:
    """The log of a run that began with another width, in which its settings occur twice."""
    logged = {("dataset" if key == "data_set" else key): value for key, value in TINY.items()}
    entries = [{"type": "hparam", "key": key, "value": value} for key, value in {**logged, "width": 3}.items()]
    entries += [{"type": "hparam", "key": key, "value": value} for key, value in {**logged, **changes}.items()]
    entries += [{"type": "hparam", "key": "lr", "value": 0.1}, {"type": "train_loss", "step": 1, "width": 7}]
    text = "".join(json.dumps({"time": "now", **entry}) + "\n" for entry in entries)
    (folder / name).write_text(text + '{"time": "now", "type": "hparam", "key": "wid')  # killed while it wrote
    return folder / name


def write(folder: Path, *, state: Any = None) -> Path:
    """Both files of a run."""
    write_log(folder)
    return write_weights(folder, state=state)


def official(name: str) -> VDVAE:
    """The network of a fixture."""
    return VDVAE.load_official(FIXTURES / name / FILES[name])


@cache
def published(name: str) -> VDVAE:
    """The network without its weights."""
    with torch.device("meta"):
        return VDVAE(data_set=name, **PUBLISHED[name])


CASE = AdapterCase(
    VDVAE,
    {
        "": trained_tiny,
        "of one width, with side 2 and other pixels": lambda: seeded(
            enc_blocks="8d4,2,2d2,1",
            dec_blocks="1,2m1,8m2",
            custom_width_str="",
            **{"data_set": "mine", "shift": -100.0, "scale": 0.02, "bits": 3},
        ),
        "of 5 bits, with a side mixed in twice and from two sides": lambda: seeded(
            dec_blocks="1x1,4m1,4m1,8m1,8m4", data_set="ffhq256"
        ),
    },
    ({"dec_blocks": "1x1,8m2"}, "dec_blocks, 8m2: expected a lower side"),
    Official(
        write,
        trained_tiny,
        weights,
        ("latest-model-ema.th",),
        {"run-folder": FIXTURES / "run-folder" / FILES["run-folder"]},  # of the others see vdvae/test_arrays
    ),
)
