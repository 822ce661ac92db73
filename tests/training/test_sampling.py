"""Choices on held-out images: the distance that makes them, the number of steps, and the refiner that follows a fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_fits import CHAIN, small
from small_priors import bent

from ebm_prior.data.images import ImageSource
from ebm_prior.errors import DivergenceError, SettingError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerChanges, SamplerConfig
from ebm_prior.training.fit import fit
from ebm_prior.training.fit_config import FitConfig, may_follow, refiner_preset, refining
from ebm_prior.training.latents import split
from ebm_prior.training.sampling import HeldOutViews, choose_steps, energy_distance, viewed

SATURATED: dict[str, Any] = {"saturated": {"iteration": 100, "ess_fraction": 0.001}, "iterations": 900}
REFINER = replace(small(iterations=4), objective="mle", regime="refiner", chain=CHAIN, sampler=SamplerChanges())


def test_the_distance_is_the_energy_distance() -> None:
    """By hand: 2 E|a − b| = 2 · 5/2, E|a − a'| = 1 and E|b − b'| = 2 over different pairs."""
    a, b = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[2.0], [4.0]]).double()
    assert energy_distance(a, b) == energy_distance(b, a) == pytest.approx(2.0)


def test_equal_distributions_have_distance_0_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [
        energy_distance(*torch.randn(2, 20, 3, generator=generator, dtype=torch.float64).unbind()) for _ in range(400)
    ]
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / 20
    assert abs(mean) < 3 * error < 0.02


def test_views_are_means_of_areas() -> None:
    images = torch.arange(32.0).view(1, 2, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)  # 16 × 16
    seen = viewed(images)
    assert seen.shape == (1, 2 * 8 * 8)
    assert torch.equal(seen.view(2, 8, 8)[:, ::2, ::2], torch.arange(32.0).view(2, 4, 4).double())
    assert torch.equal(viewed(images[..., :5, :3]), images[..., :5, :3].flatten(1).double())


def test_views_are_of_held_out_images_alone(backbone: Backbone, images: ImageSource) -> None:
    asked: list[int] = []

    class Spied:
        name = "spied"

        def __len__(self) -> int:
            return len(images)

        def batch(self, indices: Any) -> torch.Tensor:
            asked.extend(indices.tolist())
            return images.batch(indices)

    views = HeldOutViews.of(backbone, Spied(), small())
    training, held_out = split(backbone, images, small())
    assert asked == held_out.tolist()
    assert not set(asked) & set(training.tolist())
    assert torch.equal(HeldOutViews.of(backbone, images, small()).views, views.views)


def test_samples_that_are_farther_have_the_larger_distance(backbone: Backbone, images: ImageSource) -> None:
    """Draws of p_β against chains that end at three times its spread."""
    held_out, prior = HeldOutViews.of(backbone, images, small()), bent(backbone, 0.0)
    hot = SamplerConfig(proposals=1, kernel="langevin", steps=40, step_size=0.2, temperature=3.0)
    assert held_out.distance(prior, ANCESTRAL) < held_out.distance(prior, hot)


@pytest.mark.parametrize(
    ("distances", "chosen"),
    [
        ({3: 0.3, 6: 0.2, 12: 0.4}, 6),
        ({3: 0.1, 6: 0.2, 12: 0.4}, 3),
        ({3: 0.1, 6: 0.2, 12: -0.01}, 12),
        ({6: 0.2, 12: 0.1}, 12),  # 3 steps diverge
        ({}, 6),
    ],
)
def test_the_number_of_steps_is_the_nearest_of_three(
    backbone: Backbone, images: ImageSource, monkeypatch: pytest.MonkeyPatch, distances: dict[int, float], chosen: int
) -> None:
    def distance(self: HeldOutViews, prior: EBMPrior, sampler: SamplerConfig, *_: Any) -> float:
        if sampler.steps not in distances:
            raise DivergenceError("too far")
        return distances[sampler.steps]

    prior = bent(backbone)
    prior.sampler = SamplerConfig(steps=6)
    monkeypatch.setattr(HeldOutViews, "distance", distance)
    choose_steps(prior, HeldOutViews.of(backbone, images, small()))
    assert prior.sampler == SamplerConfig(steps=chosen)
    tried = [{"steps": steps, "distance": value} for steps, value in distances.items()]
    assert prior.record["steps"] == {"images": 12, "tried": tried}


def test_a_fit_chooses_unless_the_number_is_given(backbone: Backbone, images: ImageSource) -> None:
    chosen = fit(backbone, images, replace(REFINER, choose_steps=True))
    assert [each["steps"] for each in chosen.record["steps"]["tried"]] == [3, 6, 12]
    best = min(chosen.record["steps"]["tried"], key=lambda each: float(each["distance"]))
    assert chosen.sampler.steps == best["steps"]
    given = fit(backbone, images, replace(REFINER, choose_steps=True, sampler=SamplerChanges(steps=5)))
    assert "steps" not in given.record
    assert given.sampler.steps == 5
    assert refiner_preset().choose_steps


def test_the_refiner_takes_as_many_steps_as_the_stages() -> None:
    """By default 800 iterations of 128 draws and 5 leapfrogs: as many as 800 of 32 chains and 20 steps."""
    second = refining(FitConfig(seed=3), SATURATED)
    assert second == replace(refiner_preset(), iterations=800, seed=3)
    half = refining(FitConfig(batch_size=128), SATURATED)
    assert half is not None
    assert half.iterations == 400
    parted = refining(FitConfig(batch_size=210, parts=3, refine=7), SATURATED)
    assert parted is not None
    assert (parted.batch_size, parted.parts, parted.iterations) == (33, 3, 7)


@pytest.mark.parametrize(
    ("config", "record"),
    [
        (FitConfig(), {"saturated": None, "iterations": 2400}),
        (FitConfig(refine=0), SATURATED),
        (FitConfig(ratios="staged"), {"saturated": None, "iterations": 2400}),
        (refiner_preset(), {"saturated": None, "iterations": 900}),
    ],
)
def test_no_refiner_follows(config: FitConfig, record: dict[str, Any]) -> None:
    assert refining(config, record) is None


def test_what_may_follow_is_known_before_the_fit() -> None:
    assert may_follow(FitConfig()) is not None
    assert may_follow(FitConfig(ratios="one", refine=5)) == replace(refiner_preset(), iterations=5)
    for config in (FitConfig(ratios="one"), FitConfig(refine=0), refiner_preset()):
        assert may_follow(config) is None


@pytest.mark.parametrize("wrong", [{"refine": -1}, {"choose_steps": True}, {"refine": 3, "regime": "refiner"}])
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="must"):
        FitConfig(**{"objective": "mle", **wrong})
