"""Ablations: what differs between their variants, and a whole small table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ebm_prior.ablations import ABLATIONS, Variant, ablate, as_table, base_config, variant_config
from ebm_prior.data import from_array


class Pixels:
    """A feature extractor that any image passes."""

    name, distance_name = "pixels", "FD(pixels)"

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, ::8]


def test_variants_differ_in_what_they_say() -> None:
    base = base_config(100, 0)
    assert [variant_config(v, base).energy.hidden for v in ABLATIONS["nef"]] == [10, 20, 50, 100]
    assert [variant_config(v, base).prior_chain.steps for v in ABLATIONS["steps"]] == [10, 20, 40, 80, 100]
    assert [variant_config(v, base).posterior for v in ABLATIONS["posterior"]] == ["langevin", "inference"]
    assert [variant_config(v, base).prior for v in ABLATIONS["capacity"]] == ["ebm"] + 4 * ["gaussian"]


def test_a_small_table() -> None:
    random = np.random.default_rng(0)
    train, test = (from_array(random.random((n, 16, 16)).astype(np.float32)) for n in (60, 70))
    variants = [Variant("plain", "1.00", {"prior": "gaussian"}), Variant("four", "2.00", capacity=4)]
    rows = ablate(variants, train, test, Pixels(), iterations=2, width=8, latents=(3, 2), samples=64)
    assert rows[0]["samples"] == 64
    assert all(row["fd"] > 0 for row in rows)
    assert rows[1]["parameters"] / rows[0]["parameters"] == pytest.approx(4, rel=0.2)
    assert "FD(pixels)" in as_table(rows, Pixels(), "noise")
    assert torch.is_grad_enabled()
