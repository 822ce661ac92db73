"""Ablations: what differs between their variants, and a whole small table."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ebm_prior.ablations import ABLATIONS, as_picture, as_table, base_config, measure, variant_config
from ebm_prior.data import from_array
from ebm_prior.jobs import run_all


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
    text = as_table("capacity", rows)
    assert "FD(pixels)" in text
    assert "±" in text
    assert "37.75" in text  # of the paper, with four times the parameters
    assert "36.10" not in text  # eight times: not measured
    assert as_picture("capacity", rows).size[0] > 600
    assert torch.is_grad_enabled()
