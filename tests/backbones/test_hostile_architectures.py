"""Descriptions that ask for more than a file holds: one stated error each, at once, and without the memory."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_biva import STAGES
from tiny_biva import tiny as tiny_biva
from tiny_hvae import tiny as tiny_hvae
from tiny_nvae import tiny as tiny_nvae
from workshop import Workshop

from ebm_prior.errors import CheckpointError
from ebm_prior.storage.checkpoint import BACKBONE_KEY, load_backbone

NESTED: Any = []
for _ in range(100):
    NESTED = [NESTED]
VALUES: dict[str, Any] = {
    "huge": 4096,
    "endless": 10**9,
    "beyond int64": 10**30,
    "negative": -1,
    "zero": 0,
    "fraction": 3.5,
    "flag": True,
    "nested": NESTED,
    "text": "8" * 100_000,
    "none": None,
}
SHALLOW: dict[str, Any] = {"image_shape": [1, 8, 8], "latents": [3, 2], "width": 4, "hidden": 5, "sigma": 0.3}
PLACES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "shallow width": ("shallow", ("width",)),
    "shallow latents": ("shallow", ("latents", 0)),
    "nvae channels": ("nvae", ("decoder_channels",)),
    "nvae latents": ("nvae", ("latent_channels",)),  # of flows: their masks are as large as their weights
    "nvae groups": ("nvae", ("groups_per_scale", 0)),
    "biva filters": ("biva", ("stages", 0, "blocks", 0, "filters")),
    "biva kernel": ("biva", ("stages", 1, "blocks", 0, "kernel")),
    "hvae latents": ("hvae", ("stages", 1, "latent", "features")),
}
EXTRAS: dict[str, tuple[str, dict[str, Any]]] = {
    "shallow deep": ("shallow", {"latents": [1] * 4000}),
    "shallow longer": ("shallow", {"latents": [1] * 100_000}),
    "shallow sigma": ("shallow", {"sigma": float("inf")}),
    "shallow sigma flag": ("shallow", {"sigma": True}),
    "nvae cells": ("nvae", {"encoder_cells": 1000}),
    "nvae scales": ("nvae", {"groups_per_scale": [1] * 31, "image_shape": [3, 4096, 4096]}),
    "nvae floor": ("nvae", {"likelihood": "gaussian", "log_std_floor": -1e300}),
    "biva deep": ("biva", {"stages": [*STAGES[:1] * 4000, *STAGES[1:]]}),
    "biva blocks": ("biva", {"stages": [{"blocks": [{"filters": 4}] * 100_000, "latent": {"features": 2}}]}),
    "biva init": ("biva", {"init_std": float("nan")}),
    "hvae deep": ("hvae", {"stages": [{"blocks": [{"filters": 1, "kernel": 1}], "latent": {"features": 1}}] * 4000}),
    "hvae flag": ("hvae", {"skips": "no"}),
}
CASES = [*(f"{place}: {value}" for place in PLACES for value in VALUES), *EXTRAS]
assert len(CASES) >= 58


def architecture(adapter: str) -> dict[str, Any]:
    small = {
        "shallow": lambda: SHALLOW,
        "nvae": lambda: tiny_nvae().architecture,
        "biva": lambda: tiny_biva().architecture,
    }
    described = small.get(adapter, lambda: tiny_hvae().architecture)()
    copied: dict[str, Any] = json.loads(json.dumps(described))
    return copied


def described(case: str) -> tuple[str, dict[str, Any]]:
    if case in EXTRAS:
        adapter, changes = EXTRAS[case]
        return adapter, architecture(adapter) | changes
    place, value = case.split(": ")
    adapter, path = PLACES[place]
    whole = architecture(adapter)
    part: Any = whole
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = VALUES[value]
    return adapter, whole


def write(folder: Path, case: str) -> Path:
    adapter, whole = described(case)
    record = {"format": 1, "library": "0", "adapter": adapter, "architecture": whole, "record": {}}
    metadata = {BACKBONE_KEY: json.dumps(record)}  # not by write_tensors, which refuses some of these
    save_file({"weight": torch.zeros(1000)}, folder / "b.safetensors", metadata=metadata)
    return folder / "b.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_architecture_is_refused_at_once(tmp_path: Path, case: str) -> None:
    path = write(tmp_path, case)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load_backbone(None, path)
    assert time.process_time() - began < 3  # a second on a machine that has nothing else to do
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 300
    assert len(str(caught.value)) < 3000
    assert str(path) in str(caught.value)


PROGRAM = """
import resource, sys
from ebm_prior.storage.checkpoint import load_backbone
from ebm_prior.storage.registry import registered, adapter
adapter(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_backbone(None, sys.argv[1])
except Exception as error:
    print(type(error).__name__, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("case", ["shallow width: huge", "nvae latents: huge", "biva filters: huge"])
def test_what_is_refused_takes_no_memory(workshop: Workshop, tmp_path: Path, case: str) -> None:
    """In a process of its own, whose peak no earlier test has raised."""
    path = write(tmp_path, case)
    with workshop.fork("-c", PROGRAM, path, case.split()[0]) as process:
        kind, peak = process.communicate()[0].decode().split()
    assert kind == "CheckpointError"
    assert int(peak) < 300


def test_a_sound_file_costs_a_small_multiple_of_itself(workshop: Workshop, tmp_path: Path) -> None:
    from ebm_prior.backbones.shallow import ShallowGenerator

    from ebm_prior.storage.checkpoint import save_backbone

    path = tmp_path / "wide.safetensors"
    save_backbone(ShallowGenerator(width=64), path)
    program = PROGRAM.replace("load_backbone(None, sys.argv[1])\n", "load_backbone(None, sys.argv[1]); raise OSError\n")
    with workshop.fork("-c", program, path, "shallow") as process:
        peak = int(process.communicate()[0].split()[1])
    assert peak < 4 * path.stat().st_size / 2**20 + 100
