"""The anomaly protocol: the split, the pool, and a whole small run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ebm_prior.data.images import from_array
from ebm_prior.errors import ConfigurationError
from ebm_prior.experiments.anomaly_table import FORMS, MODELS, as_table, averaged, pooled, run_digit, split_by_digit
from ebm_prior.experiments.jobs import run_all
from ebm_prior.model.prior import EBMPrior


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
    assert len(pooled([parts[0], parts[0]])) == 4  # a file has no splits: none of its images twice
    with pytest.raises(ConfigurationError, match="labels"):
        pooled([from_array(pixels)])


def test_what_was_held_out_scores_as_an_outlier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bright images among dark ones, in the epochs that count."""
    random = np.random.default_rng(0)
    labels = np.arange(400) % 4
    pixels = (0.2 * random.random((400, 8, 8)) + 0.8 * (labels == 3)[:, None, None]).astype(np.float32)
    scored, scores = list[int](), EBMPrior.scores

    def noted(prior: EBMPrior, *given: Any, **settings: Any) -> Any:
        scored.append(prior.record["iterations"])
        return scores(prior, *given, **settings)

    monkeypatch.setattr(EBMPrior, "scores", noted)
    rows = run_digit(from_array(pixels, labels), 3, latents=(3, 2), width=4, draws=2, epochs=6)
    assert scored == [8, 10, 12]  # epochs of two batches
    assert [row["model"] for row in rows] == [f"EBM, L=2{name}" for name in FORMS]
    assert all(row["auroc"] > 0.9 and row["auprc_trapezoid"] > 0.9 for row in rows[:2])


def test_a_figure_is_of_epochs_in_which_the_energy_has_a_part() -> None:
    assert [averaged(epochs) for epochs in (1, 2, 8, 16, 24, 60)] == [1, 1, 4, 8, 10, 10]


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
        "EBM, L=2, prior alone",
        "EBM, L=2, prior alone, f = 0",
        "Gaussian, L=2",
        "Gaussian, L=2, prior alone",
        "LEBM, L=1",
        "LEBM, L=1, f = 0",
        "LEBM, L=1, prior alone",
        "LEBM, L=1, prior alone, f = 0",
    ]
    assert "paper" in as_table(rows)
    assert all(0 <= row["auprc_trapezoid"] <= 1 and row["auprc_sd"] >= 0 for row in rows)
