"""Ablations: what differs between their variants, and a whole small table."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from ebm_prior.backbones.shallow import ShallowGenerator
from torch import Tensor

from ebm_prior.data.images import from_array
from ebm_prior.experiments.ablations import (
    ABLATIONS,
    as_picture,
    as_table,
    base_config,
    measure,
    variant_config,
    widened,
)
from ebm_prior.experiments.jobs import run_all
from ebm_prior.storage.weights import count_parameters


class Pixels:
    """A feature extractor that any image passes."""

    name, distance_name = "pixels", "FD(pixels)"

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, ::8]


def test_variants_differ_in_what_they_say() -> None:
    base = base_config(100, 0)
    variants = {name: entry.variants for name, entry in ABLATIONS.items()}
    assert [variant_config(v, base).energy.hidden for v in variants["nef"]] == [10, 20, 50, 100]
    assert [variant_config(v, base).prior_chain.steps for v in variants["steps"]] == [10, 20, 40, 80, 100]
    assert [variant_config(v, base).posterior for v in variants["posterior"]] == ["langevin", "inference"]
    assert [variant_config(v, base).prior for v in variants["capacity"]] == ["ebm"] + 4 * ["gaussian"]


@pytest.mark.parametrize(("width", "times"), [(8, 2), (8, 8), (12, 4), (32, 2), (32, 8)])
def test_capacity_is_in_parameters(width: int, times: int) -> None:
    network = {"image_shape": [1, 28, 28], "latents": [32, 16], "width": width, "hidden": 200}
    one, several = (count_parameters(ShallowGenerator(**widened(network, n))) for n in (1, times))
    assert several / one == pytest.approx(times, rel=0.05)
    assert widened(network, 1) == network


def test_samples_are_of_the_energy() -> None:
    images = from_array(np.random.default_rng(0).random((64, 8, 8)).astype(np.float32))
    small = {"iterations": 1, "width": 2, "latents": (3, 2), "samples": 64}
    row = measure(ABLATIONS["layers"].variants[0], images, images, Pixels(), **small)  # type: ignore[arg-type]
    assert row["fd"] != row["fd_gaussian"]
    assert row["heads"] > 0


def test_a_small_table() -> None:
    random = np.random.default_rng(0)
    train, test = (from_array(random.random((n, 16, 16)).astype(np.float32)) for n in (60, 70))
    variants = [v for v in ABLATIONS["capacity"].variants if v.name[-3:] == "ers" and v.capacity in (1, 4)]
    calls: list[dict[str, Any]] = [
        {"variant": v, "seed": seed, "train": train, "test": test, "extractor": Pixels()}
        for v in variants
        for seed in (0, 1)
    ]
    rows = run_all(partial(measure, iterations=2, width=8, latents=(3, 2), samples=64), calls)
    assert rows[0]["samples"] == 64
    assert all(row["fd"] > 0 for row in rows)
    assert rows[2]["parameters"] / rows[0]["parameters"] == pytest.approx(4, rel=0.2)
    assert all(row["fd"] == row["fd_gaussian"] for row in rows)  # their prior
    text = as_table("capacity", rows)
    assert "FD(pixels)" in text
    assert "±" in text
    assert "37.75" in text  # of the paper, with four times the parameters
    assert "36.10" not in text  # eight times: not measured
    assert "fall" not in text
    assert ", after a fall" in as_table("capacity", [row | {"rollbacks": 1} for row in rows])
    assert as_picture("capacity", rows).size[0] > 600
    assert torch.is_grad_enabled()
