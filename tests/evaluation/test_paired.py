"""Paired differences between priors: known differences within intervals, and narrower than unpaired ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from workshop import Workshop

from ebm_prior.evaluation.metrics import frechet_distance
from ebm_prior.evaluation.paired import WIDEST, Paired, differences


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_gain_of_a_better_prior() -> None:
    """Of f = a x − ½ a² the log Z under N(0, 1) is 0; under N(1, 1) its gain is a − ½ a²."""
    misses, margins = 0, []
    for seed in range(200):
        q, p = 1 + normal(2 * seed, 400), normal(2 * seed + 1, 400)
        better, worse = (Paired(a * q - a * a / 2, a * p - a * a / 2, None) for a in (0.8, 0.7))
        found = differences(better, worse, None)
        assert set(found) == {"gain_nats"}
        misses += not found["gain_nats"]["low"] < (0.8 - 0.32) - (0.7 - 0.245) < found["gain_nats"]["high"]
        margins.append(found["gain_nats"]["high"] - found["gain_nats"]["difference"])
        estimate = [
            float(each.f_posterior.mean() - (each.f_backbone.logsumexp(0) - math.log(400))) for each in (better, worse)
        ]  # type: ignore[union-attr]
        assert found["gain_nats"]["difference"] == pytest.approx(estimate[0] - estimate[1])
    assert misses <= 20  # of 200, with 10 expected
    assert sum(margins) / len(margins) < 0.02  # whereas either gain alone has a standard error of .06


def test_a_log_z_that_the_fit_has_set_to_0_is_not_estimated() -> None:
    q, p = normal(0, 300), normal(1, 300)
    found = differences(Paired(q, None, None), Paired(0 * q, 0 * p, None), None)["gain_nats"]
    assert found["difference"] == pytest.approx(float(q.mean()))
    assert found["high"] - found["difference"] == pytest.approx(1.96 * float(q.std()) / math.sqrt(300))


def test_the_distance_of_samples_that_are_further_away() -> None:
    real, noise = normal(0, 2000, 4), normal(1, 2000, 4)
    far, near = Paired(noise[:, 0], None, noise + 0.5), Paired(noise[:, 0], None, noise + 0.4)
    found = differences(far, near, real)["fd_prior"]
    expected = 4 * (0.25 - 0.16)
    assert found["difference"] == pytest.approx(
        frechet_distance(noise + 0.5, real) - frechet_distance(noise + 0.4, real)
    )
    assert found["low"] < expected < found["high"]
    assert found["low"] > 0  # on the same noise, 2,000 samples tell them apart
    alone = Paired(noise[:, 0], None, normal(2, 2000, 4) + 0.4)
    unpaired = differences(far, alone, real)["fd_prior"]
    assert unpaired["high"] - unpaired["low"] > 1.5 * (found["high"] - found["low"])
    assert differences(far, far, real)["fd_prior"] == {"difference": 0, "low": 0, "high": 0}
    wide = torch.zeros(10, WIDEST + 1)
    assert "fd_prior" not in differences(Paired(q := noise[:, 0], None, wide), Paired(q, None, wide), wide)


def test_eval_compares_priors_with_the_first(workshop: Workshop, fitted: Path) -> None:
    prior = fitted / "prior.safetensors"
    words = ("eval", prior, prior, "--data", workshop.images, "--samples", 60, "--no-auc")
    first, second = json.loads(workshop.run(*words, "--json").stdout)
    assert "paired" not in first
    assert second["paired"]["with"] == str(prior)
    assert second["paired"]["gain_nats"] == {"difference": 0, "low": 0, "high": 0}
    said = workshop.run(*words).stdout
    assert f"less the same of {prior}" in said
    assert "gain (nats)" in said
