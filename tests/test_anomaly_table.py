"""The anomaly protocol: the split, the pool, and a whole small run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ebm_prior.anomaly_table import MODELS, as_table, pooled, run_digit, split_by_digit
from ebm_prior.data import from_array
from ebm_prior.errors import ConfigurationError
from ebm_prior.jobs import run_all


def test_split() -> None:
    labels = torch.arange(1000) % 10
    split = split_by_digit(labels, 4, seed=1)
    assert len(split.train) == 720
    assert len(split.test) == 180 + 100
    assert not set(split.train.tolist()) & set(split.test.tolist())
    assert not (labels[split.train] == 4).any()
    assert (split.anomalous == (labels[split.test] == 4).numpy()).all()
    with pytest.raises(ConfigurationError, match="digit 11"):
        split_by_digit(labels, 11)


def test_pool() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    parts = [from_array(pixels[:4], np.arange(4)), from_array(pixels[4:], np.arange(2))]
    both = pooled(parts)
    assert both.labels is not None
    assert both.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert torch.equal(both.batch(range(6)), torch.cat([part.batch(range(len(part))) for part in parts]))


def test_a_small_run() -> None:
    random = np.random.default_rng(0)
    pool = from_array(random.random((120, 8, 8)).astype(np.float32), np.arange(120) % 4)
    calls: list[dict[str, Any]] = [
        {"pool": pool, "digit": 3, "model": model, "latents": (3, 2), "width": 4, "draws": 2, "epochs": 2}
        for model in MODELS
    ]
    done: list[int] = []
    found = run_all(run_digit, calls, jobs=2, on_done=lambda found: done.append(len(found)))
    rows = [row for part in found for row in part]
    assert done == [1, 2, 3]
    assert rows[0]["auroc"] == pytest.approx(run_digit(**calls[0])[0]["auroc"], abs=0.02)  # of one thread or several
    assert [row["model"] for row in rows] == [
        "EBM, L=2",
        "EBM, L=2, f = 0",
        "Gaussian, L=2",
        "LEBM, L=1",
        "LEBM, L=1, f = 0",
    ]
    assert "paper" in as_table(rows)
    assert all(0 <= row["auprc_trapezoid"] <= 1 and row["auprc_sd"] >= 0 for row in rows)
