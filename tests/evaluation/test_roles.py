"""Choices on held-out images: the distance that makes them, the number of steps, and the refiner that follows a fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from listener import Listener
from small_fits import CHAIN, small
from small_priors import bent

from ebm_prior.api import fit
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import DivergenceError, SettingError
from ebm_prior.evaluation.classifier import bundled_classifier
from ebm_prior.evaluation.roles import COLOUR, GREY, HeldOutGauge, add_refiner, features_of, with_steps
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerChanges, SamplerConfig
from ebm_prior.training.fit_config import FitConfig, may_follow, refiner_preset, refining
from ebm_prior.training.latents import split

SATURATED: dict[str, Any] = {"saturated": {"iteration": 100, "ess_fraction": 0.001}, "iterations": 900}
REFINER = replace(small(iterations=4), objective="mle", regime="refiner", chain=CHAIN, sampler=SamplerChanges())


def test_images_of_any_kind_have_features() -> None:
    """Images that the classifier knows are seen as they are; others are resized, and grey unless of three channels."""
    generator = torch.Generator().manual_seed(0)
    for shape in (COLOUR, GREY):
        classifier, images = bundled_classifier(shape), torch.rand(3, *shape, generator=generator)
        known = classifier.features(images)
        assert torch.equal(features_of(images, classifier), known)
        plain = torch.rand(3, shape[0], 1, 1, generator=generator).double()  # of one colour each
        small, large = (features_of(plain.expand(3, -1, *size), classifier) for size in ((8, 6), (64, 80)))
        assert torch.allclose(small, large, atol=1e-4)
        assert torch.allclose(small, features_of(plain.expand(3, *shape), classifier), atol=1e-4)
    assert torch.allclose(features_of(images.expand(3, 5, 28, 28), classifier), known, atol=1e-4)


def test_a_gauge_is_of_held_out_images_alone(backbone: Backbone, images: ImageSource) -> None:
    asked: list[int] = []

    class Spied:
        name = "spied"

        def __len__(self) -> int:
            return len(images)

        def batch(self, indices: Any) -> torch.Tensor:
            asked.extend(indices.tolist())
            return images.batch(indices)

    gauge = HeldOutGauge.of(backbone, Spied(), small())
    training, held_out = split(backbone, images, small())
    assert asked == held_out.tolist()
    assert not set(asked) & set(training.tolist())
    again = HeldOutGauge.of(backbone, images, small())
    assert gauge is not None
    assert again is not None
    assert gauge.reference.digest == again.reference.digest
    assert gauge.images == len(held_out)


def test_samples_that_are_farther_have_the_larger_distance(backbone: Backbone, images: ImageSource) -> None:
    """Draws of p_β against chains that end at three times its spread."""
    held_out, prior = HeldOutGauge.of(backbone, images, small()), bent(backbone, 0.0)
    assert held_out is not None
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
    def distance(self: HeldOutGauge, prior: EBMPrior, sampler: SamplerConfig, *_: Any) -> float:
        if sampler.steps not in distances:
            raise DivergenceError("too far")
        return distances[sampler.steps]

    prior = bent(backbone)
    prior.sampler = SamplerConfig(steps=6)
    monkeypatch.setattr(HeldOutGauge, "distance", distance)
    assert with_steps(prior, images, replace(REFINER, choose_steps=True)) is prior
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


def test_a_single_held_out_image_chooses_nothing(backbone: Backbone, images: ImageSource) -> None:
    few, said, prior = images.subset(range(10)), Listener(), bent(backbone)
    assert HeldOutGauge.of(backbone, few, small()) is None
    assert with_steps(prior, few, replace(REFINER, choose_steps=True)).record == {}
    add_refiner(prior, few, small(refine=4), lambda second: pytest.fail("a refiner is fitted"), progress=said)
    assert said.remarks == ["the prior has no refiner: a single held-out image cannot tell whose samples are nearer"]


@pytest.mark.parametrize("wrong", [{"refine": -1}, {"choose_steps": True}, {"refine": 3, "regime": "refiner"}])
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="must"):
        FitConfig(**{"objective": "mle", **wrong})
