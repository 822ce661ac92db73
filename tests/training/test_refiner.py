"""Refiners: their chains stay in the typical set, in training and in sampling, and their recipe is one word."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_fits import CHAIN, OBJECTIVES, small
from workshop import SMALL_FIT

from ebm_prior.data.images import ImageSource
from ebm_prior.model import drawing
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.samplers import SamplerChanges, SamplerConfig
from ebm_prior.training import fit_config
from ebm_prior.training.fit import Fitting, fit
from ebm_prior.training.fit_config import refiner_preset

REFINER = replace(small(iterations=4), objective="mle", regime="refiner", chain=CHAIN)


def test_the_limit_bounds_the_posteriors_norms(backbone: Backbone, images: ImageSource) -> None:
    fitting = Fitting(backbone, images, REFINER)
    norms = fitting.bench.draws.norms(fitting.bench.training)
    limit = fitting.course.sampler.norm_limit
    dimensions = sum(math.prod(group.shape) for group in backbone.groups)
    assert norms.shape == (len(fitting.bench.training),)
    assert limit >= 1 + 3 / math.sqrt(2 * dimensions)
    assert float((norms <= limit).double().mean()) > 0.98
    prior = fit(backbone, images, REFINER)
    assert prior.sampler == replace(CHAIN, norm_limit=limit, **SMALL_FIT["sampler"])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (replace(REFINER, refuse=False), 0.0),
        (replace(REFINER, sampler=SamplerChanges(norm_limit=0.0)), 0.0),
        (replace(REFINER, chain=replace(CHAIN, norm_limit=1.5)), 1.5),
        (OBJECTIVES["mle"], 0.0),
        (small(iterations=4), 0.0),
    ],
)
def test_who_has_a_limit(backbone: Backbone, images: ImageSource, config: Any, expected: float) -> None:
    assert Fitting(backbone, images, config).course.sampler.norm_limit == expected


@pytest.mark.parametrize("chains", ["fresh", "persistent"])
def test_chains_of_training_are_refused_too(
    backbone: Backbone, images: ImageSource, monkeypatch: pytest.MonkeyPatch, chains: Any
) -> None:
    """Every chain begins anew, since none can be below the limit; persistent ones begin anew from p_β."""
    started: list[torch.Tensor] = []
    true_draw = drawing._drawn

    def spy(potential: Any, propose: Any, *rest: Any) -> Any:
        started.append(propose()[0])
        return true_draw(potential, lambda: [*propose()], *rest)

    monkeypatch.setattr(drawing, "_drawn", spy)
    chain = replace(CHAIN, norm_limit=0.1)
    fit(backbone, images, replace(REFINER, iterations=1, chains=chains, chain=chain))
    assert len(started) >= 1 + drawing.RESTARTS
    first = started[0]
    assert not any(torch.equal(first, again[: len(first)]) for again in started[1 : 1 + drawing.RESTARTS])


def test_gradients_are_clipped(backbone: Backbone, images: ImageSource) -> None:
    fitting = Fitting(backbone, images, replace(REFINER, gradient_clip=1e-3))
    fitting.step()
    squares = [p.grad.square().sum() for p in fitting.network.parameters() if p.grad is not None]
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(1e-3, rel=1e-4)


def test_the_recipe_is_one_word() -> None:
    preset = refiner_preset()
    assert fit_config.PRESETS["refiner"] is refiner_preset
    assert (preset.objective, preset.regime, preset.target, preset.refuse) == ("mle", "refiner", "exact", True)
    assert preset.recorded_sampler == SamplerConfig(proposals=1, kernel="langevin", steps=40, step_size=0.01)
