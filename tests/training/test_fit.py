"""Fitting: it improves the prior, leaves everything else as it was, and says what it did."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from listener import Listener
from run_folders import metrics
from small_fits import CHAIN, OBJECTIVES, SATURATING, small
from toys import LinearGaussian
from workshop import SMALL_FIT, Workshop

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.data.images import ImageSource, from_array
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.samplers import SamplerChanges, SamplerConfig
from ebm_prior.storage.checkpoint import load_prior, save_prior
from ebm_prior.training import courses
from ebm_prior.training.fit import Fitting, fit
from ebm_prior.training.fit_config import FitConfig, paper_preset
from ebm_prior.training.objectives import Gain


def test_it_learns_a_prior_that_explains_held_out_latents(backbone: Backbone, images: ImageSource) -> None:
    prior = fit(backbone, images, small(iterations=60, batch_size=64, learning_rate=5e-3, evaluate_every=20))
    assert prior.record["held_out"]["tempered"]["nats"] > 0.3
    assert prior.record["data"] == {"name": images.name, "training": 108, "held_out": 12}
    assert prior.regime == "calibrated"
    assert not any(p.requires_grad for p in prior.energy.parameters())


def test_the_backbone_is_left_as_it_was(backbone: Backbone, images: ImageSource) -> None:
    before = copy.deepcopy(backbone.state_dict())
    for config in OBJECTIVES.values():
        fit(backbone, images, config)
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())


def test_the_global_random_state_is_left_as_it_was(backbone: Backbone, images: ImageSource) -> None:
    before = torch.get_rng_state()
    fit(backbone, images, small(iterations=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_sampler_that_is_recorded(backbone: Backbone, images: ImageSource) -> None:
    as_found = SamplerChanges()
    assert small(iterations=1, sampler=as_found).recorded_sampler == SamplerConfig()
    assert replace(OBJECTIVES["mle"], sampler=as_found).recorded_sampler == SamplerConfig()
    refiner = replace(OBJECTIVES["mle"], sampler=as_found, regime="refiner")
    assert refiner.recorded_sampler == replace(CHAIN, steps=6)
    assert replace(refiner, sampler=SamplerChanges(steps=9)).recorded_sampler == replace(CHAIN, steps=9)
    assert fit(backbone, images, small(iterations=1)).sampler == replace(SamplerConfig(), **SMALL_FIT["sampler"])
    assert paper_preset().recorded_sampler.steps == 40
    with pytest.raises(ConfigurationError, match="accepts every step"):
        replace(refiner, sampler=SamplerChanges(adapt_steps=1))


def test_the_published_target_is_for_refiners() -> None:
    with pytest.raises(ConfigurationError, match="target must be exact with regime calibrated"):
        small(target="published")


def test_small_batches_of_prior_draws_are_no_divergence() -> None:
    """Two draws in five dimensions are often beyond 1.2 in norm; nce has no chains that could leave."""
    tiny = LinearGaussian().eval()
    images = from_array(torch.rand(20, *tiny.image_shape, generator=derived_generator(0)).numpy(), name="noise")
    assert fit(tiny, images, small(iterations=20, batch_size=2)).record["rollbacks"] == 0


def test_a_refiner_keeps_its_last_state_untempered(backbone: Backbone, images: ImageSource) -> None:
    config = replace(OBJECTIVES["mle"], regime="refiner", target="published")
    prior = fit(backbone, images, config)
    assert (prior.regime, prior.target, prior.tau) == ("refiner", "published", 1.0)
    assert prior.record["best_iteration"] == config.iterations


def test_where_one_ratio_saturates_stages_take_over(
    backbone: Backbone, images: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(backbone, images, SATURATING).record["stages"] == []
    monkeypatch.setattr(courses, "SATURATED_SHARE", 1.0)
    steps, said = list[Mapping[str, Any]](), list[tuple[int, str]]()
    watch, asked = Listener(steps.append, lambda text: said.append((len(steps), text))), SATURATING
    prior = fit(backbone, images, asked, progress=watch)
    saturated, found = prior.record["saturated"], prior.record["config"]
    assert saturated["iteration"] <= 6
    assert saturated["ess_fraction"] < asked.ess_floor
    assert (prior.regime, found["objective"], found["ratios"]) == ("calibrated", "nce", "staged")
    assert found["batch_size"] == asked.batch_size // 2
    assert prior.record["iterations"] == found["iterations"] == saturated["iteration"] + asked.iterations // 3
    ((before, text),) = said
    assert "now in stages" in text
    assert steps[before]["iteration"] == saturated["iteration"]
    assert steps[-1]["iterations"] == steps[-1]["iteration"]
    assert "stage" in steps[-1]
    one = fit(backbone, images, replace(asked, ratios="one"))
    assert (one.record["stages"], one.record["saturated"]) == ([], None)


def test_the_schedule_begins_anew_where_stages_take_over(
    backbone: Backbone, images: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    rate = Fitting.learning_rate

    def noted(self: Fitting) -> float:
        rates.append(rate(self))
        return rates[-1]

    monkeypatch.setattr(Fitting, "learning_rate", noted)
    monkeypatch.setattr(courses, "SATURATED_SHARE", 1.0)
    saturated = fit(backbone, images, SATURATING).record["saturated"]["iteration"]
    assert rates[0] == SATURATING.learning_rate
    assert rates[saturated] == SATURATING.learning_rate
    assert rates[saturated:] == sorted(rates[saturated:], reverse=True)
    assert rates[-1] < rates[saturated] / 2


def test_too_few_images(backbone: Backbone, images: ImageSource) -> None:
    with pytest.raises(ConfigurationError, match="at least 10 images to fit a prior, found 9"):
        fit(backbone, images.subset(range(9)), small())


def test_patience_ends_a_run_without_progress(
    backbone: Backbone, images: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = iter([0.1, 0.2, 0.15, 0.2, 0.1, 0.1, 0.1, 0.1])  # as good as the best is not better
    monkeypatch.setattr("ebm_prior.training.latents.temper", lambda *_, **__: Gain(next(gains, 0.0), 1.0, 1.0))
    prior = fit(backbone, images, small(iterations=1000, patience=3))
    assert (prior.record["best_iteration"], prior.record["iterations"]) == (4, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations must be positive, found 0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive and finite, found nan"),
        ({"learning_rate": math.inf}, "learning_rate must be positive and finite, found inf"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), found 1.0"),
        ({"betas": (0.9, 1.5)}, r"betas must be in \[0, 1\), found 1.5"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative"),
        ({"refresh": 2.0}, "refresh must be in"),
        ({"objective": "nec"}, "objective must be nce or mle, found 'nec'"),
        ({"optimizer": "sgd"}, "optimizer must be adamw or adam"),
        ({"regime": "other"}, "regime must be calibrated or refiner"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FitConfig(**settings)


def test_persistent_chains_are_part_of_the_state(
    backbone: Backbone, images: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chains go on from where they were, but for the share that is restarted."""
    started: list[list[torch.Tensor]] = []
    ended: list[list[torch.Tensor]] = []

    def spy(potential: Any, propose: Any, *rest: Any) -> Any:
        started.append(propose())
        drawn = draw(potential, propose, *rest)
        ended.append(drawn.eps)
        return drawn

    draw = courses.draw
    monkeypatch.setattr(courses, "draw", spy)
    fit(backbone, images, replace(OBJECTIVES["mle"], iterations=4))
    kept = [int((a[0] == b[0]).all(1).sum()) for a, b in zip(started[1:], ended, strict=False)]
    assert len(kept) == 3
    assert 0.4 * 24 < sum(kept) < 24  # a share of 0.3 is restarted on average


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_state_has_the_names_that_earlier_versions_gave(
    objective: str, backbone: Backbone, images: ImageSource
) -> None:
    """So that a run that one of these began can be resumed."""
    state = Fitting(backbone, images, OBJECTIVES[objective]).state()
    counters, weights = ["iteration", "rate", "rollbacks"], ["energy", "average", "optimizer"]
    assert list(state) == [*counters, *weights, "chains", "best", "saturated", "stages"]
    assert list(state["best"]) == ["gain", "iteration", "energy"]
    if state["stages"]:
        assert list(state["stages"]) == ["eps", "reference", "step_size", "rate", "done"]
    assert bool(state["stages"]) == (objective == "staged")


def test_metrics_hold_what_is_needed_to_judge_a_run(fitted: Path) -> None:
    lines = metrics(fitted)
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    wanted = {"iteration", "loss", "f_gap", "gain", "ess_fraction", "tempered_gain", "tau"}
    assert all(wanted <= set(line) for line in lines)
    assert all(line["tempered_gain"] >= max(0.0, line["gain"]) - 1e-6 for line in lines)  # the ESS is above the floor


def test_a_prior_is_saved_by_a_library_user(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path
) -> None:
    prior = fit(backbone, images, small())
    save_prior(prior, tmp_path / "p.safetensors", checkpoint=str(workshop.backbone))
    again = load_prior(tmp_path / "p.safetensors")
    assert torch.equal(again.sample(3).images, prior.sample(3).images)
    assert again.record["config"]["energy"]["channels"] == 4


def test_a_long_chain_of_a_refiner_is_not_doubled_beyond_the_most_steps() -> None:
    chain = replace(CHAIN, steps=60_000)
    plain = replace(OBJECTIVES["mle"], chain=chain, sampler=SamplerChanges())
    assert plain.recorded_sampler == SamplerConfig()
    assert replace(plain, regime="refiner").recorded_sampler.steps == 100_000
