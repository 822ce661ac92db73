"""Stages: the draws of the prior so far, and what ends a stage. Their sum is held to closed forms in test_exactness."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from small_fits import small
from toys import LinearGaussian

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.samplers import norm
from ebm_prior.training.courses import OneRatio
from ebm_prior.training.fit import Fitting, fit
from ebm_prior.training.objectives import Gain
from ebm_prior.training.stages import StageConfig, Stages


@pytest.fixture
def stages() -> Stages:
    backbone = LinearGaussian(2, 3).eval().requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = JointEnergy(backbone.groups, EnergyConfig(hidden=8, joint=0)).requires_grad_(False)
    config = StageConfig(particles=400, held_out=200, moves=2, settle=4)
    return Stages(backbone, energy, config, derived_generator(1), at_once=64)


def sloped(energy: JointEnergy, slope: float) -> JointEnergy:
    """f = slope · (the first feature of the top head), up to a constant."""
    tilted = copy.deepcopy(energy)
    tilted._heads()[0].last.weight[0, 0] = slope
    return tilted


def test_the_first_draws_are_the_backbones(stages: Stages) -> None:
    assert stages.gain == stages.log_z == 0
    assert stages.ess_fraction(stages.reference) == pytest.approx(1)


def test_draws_that_the_memory_does_not_hold_are_left_out_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StageConfig().at_most(10_000) == StageConfig()
    backbone = LinearGaussian(2, 3).eval().requires_grad_(False)
    monkeypatch.setattr("ebm_prior.training.stages.DRAW_BYTES", 60 * sum(g.shape[0] for g in backbone.groups) * 4)
    energy = JointEnergy(backbone.groups, EnergyConfig(hidden=8, joint=0)).requires_grad_(False)
    suited = StageConfig(particles=400, held_out=200).suited(backbone, 40)
    few = Stages(backbone, energy, suited, derived_generator(1), at_once=64)
    assert [len(e) for e in few.eps] == [60, 60]
    assert few.config.particles == 2 * few.config.held_out == 40
    with pytest.raises(
        ConfigurationError,
        match="parts must be at most 40, as no more draws of a stage fit in memory for such latents, found 41",
    ):
        StageConfig(particles=400, held_out=200).suited(backbone, 41)


def test_a_stage_changes_its_weights_in_place(stages: Stages) -> None:
    """As graphs need it, which read them where they were when they were recorded."""
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in stages.reference.state_dict().items()}
    found = Gain(1.0, 0.5, 1.0)
    stages.advance(sloped(stages.reference, 0.3), found, 1, [derived_generator(3)])
    stages.restore(stages.state())
    after = stages.reference.state_dict()
    assert all(after[name].data_ptr() == place for name, (place, _) in before.items())
    assert any(not torch.equal(after[name], value) for name, (_, value) in before.items())


def test_negatives_move_and_held_out_draws_stay(stages: Stages) -> None:
    before = [e.clone() for e in stages.eps]
    moved = stages.moved(100, derived_generator(2))
    assert all(torch.equal(e, old) for e, old in zip(stages.eps, before, strict=True)), "not yet put back"
    stages.put_back([moved])
    assert [len(e) for e in moved.eps] == [100, 100]
    assert 0.8 < norm(moved.eps).mean() < 1.2
    assert all(torch.equal(e[400:], old[400:]) for e, old in zip(stages.eps, before, strict=True))
    changed = (stages.eps[0] != before[0]).any(1)
    assert int(changed.sum()) == 100
    assert [len(e) for e in stages.moved(1_000, derived_generator(3)).eps] == [400, 400]
    halves = [stages.moved(1_000, derived_generator(3), part=part, parts=2).rows for part in range(2)]
    assert torch.equal(torch.cat(halves).sort().values, torch.arange(400))


def test_a_step_too_far_is_halved_until_its_weights_are_even_enough(stages: Stages) -> None:
    far = sloped(stages.reference, 400.0)
    assert stages.ess_fraction(far) < 0.1
    stages.temper(far)
    assert 0.25 <= stages.ess_fraction(far) < 1
    near = sloped(stages.reference, 0.5)
    kept = copy.deepcopy(near.state_dict())
    stages.temper(near)
    assert all(torch.equal(value, kept[key]) for key, value in near.state_dict().items())


def test_a_stage_along_a_known_energy_goes_as_far_as_its_ess_allows(stages: Stages) -> None:
    near, far = sloped(stages.reference, 0.1), sloped(stages.reference, 4_000.0)
    assert stages.next_tau(near, 0.0) == 1.0
    tau = stages.next_tau(far, 0.0)
    assert 0 < tau < 1
    far.scale(tau)
    assert stages.ess_fraction(far) == pytest.approx(stages.config.ess, abs=0.01)


def test_the_draws_of_the_next_stage_have_a_higher_f(stages: Stages) -> None:
    energy = sloped(stages.reference, 4.0)
    before = energy(stages._seen(stages.eps))
    stages.advance(energy, Gain(0.3, 0.7, 1.0), 7, [derived_generator(4)])
    after = energy(stages._seen(stages.eps))
    for part in (slice(400), slice(400, None)):
        assert after[part].mean() > before[part].mean()
    (stage,) = stages.done
    assert {key: stage[key] for key in ("iteration", "gain", "ess_fraction")} == {
        "iteration": 7,
        "gain": 0.3,
        "ess_fraction": 0.7,
    }
    expected = float(before[400:].double().logsumexp(0)) - torch.tensor(200.0).log()
    assert stage["log_z"] == pytest.approx(float(expected), abs=1e-5)


def test_clipping_is_one_more_ratio(stages: Stages) -> None:
    """What it adds to the gain and to log Z is that of min(f, ceiling) − f, on draws of p_k."""
    stages.advance(sloped(stages.reference, 4.0), Gain(0.3, 0.7, 1.0), 7, [derived_generator(4)])
    positive = stages._seen(stages.backbone.standard_normal(1_000, generator=derived_generator(5)))
    clipped = stages.clipped(positive)
    f_q, f_p = stages.reference(positive).double(), stages.reference(stages._held_out).double()
    assert (f_q > clipped.ceiling).double().mean() == pytest.approx(0.01, abs=2e-3)
    assert (f_p > clipped.ceiling).any(), "else there is nothing to clip"
    change = (f_p.clamp(max=clipped.ceiling) - f_p).exp().mean().log()
    assert clipped.log_z == pytest.approx(float(change), abs=1e-6)
    assert clipped.gain.nats == pytest.approx(float((f_q.clamp(max=clipped.ceiling) - f_q).mean() - change), abs=1e-6)


def test_a_staged_prior_has_a_ceiling_and_one_ratio_none(backbone: Backbone, images: ImageSource) -> None:
    stage = StageConfig(particles=100, held_out=100)
    staged = fit(backbone, images, small(iterations=20, ratios="staged", batch_size=64, stage=stage))
    assert staged.record["stages"]
    assert staged.energy.config.bound >= 3
    observed = staged.backbone.observe(images.batch(range(len(images))), generator=derived_generator(1))
    z = staged.backbone.infer(observed, generator=derived_generator(2)).z
    assert 0 < (staged.f(z) == staged.ceiling).double().mean() < 0.2  # 1 % of the held-out ones
    gains = math.fsum(stage["gain"] for stage in staged.record["stages"])
    assert staged.record["held_out"]["plain"]["nats"] == pytest.approx(gains + staged.record["clipped"]["gain"])
    one = fit(backbone, images, small(iterations=4, ratios="one"))
    assert (one.ceiling, one.energy.config.bound) == (math.inf, 0)


def test_stages_of_which_none_is_accepted_leave_no_ceiling(backbone: Backbone, images: ImageSource) -> None:
    prior = fit(backbone, images, small(iterations=4, ratios="staged", learning_rate=1e-12))
    assert (prior.record["stages"], prior.ceiling) == ([], math.inf)


def test_a_return_to_one_ratio_takes_the_bounds_off(backbone: Backbone, images: ImageSource) -> None:
    """As where stages diverge at once: the last good state is then one from before them."""
    running = Fitting(backbone, images, small())
    before = running.state()
    assert isinstance(running.course, OneRatio)
    running.course = running.course.hand_over(Gain(0.0, 0.0, 1.0), 1)
    assert running.network.config.bound >= 3
    running.restore(before)
    assert isinstance(running.course, OneRatio)
    assert [head.bound for energy in (running.network, running.average) for head in energy._heads()] == [0] * 6


def test_heads_see_as_far_as_draws_of_the_backbone_lie() -> None:
    """Where p_β is ten posterior standard deviations away f has to tell how far."""
    energy = JointEnergy(LinearGaussian(2, 3).groups, EnergyConfig(hidden=8, joint=0))
    near = [torch.randn(500, *group.shape, generator=derived_generator(6)) for group in LinearGaussian(2, 3).groups]
    energy.standardize(energy.moments([5 + 2 * z for z in near]))
    assert energy.spread([5 + 2 * z for z in near]) == pytest.approx(1, abs=1e-4)
    assert energy.spread([25 + 2 * z for z in near]) == pytest.approx(10, rel=0.1)


def test_a_fit_takes_batches_larger_than_the_draws(backbone: Backbone, images: ImageSource) -> None:
    """Positives and negatives are then unequal in number, and are not mistaken for one another."""
    config = small(iterations=4, ratios="staged", batch_size=32, stage=StageConfig(particles=8, held_out=8, every=1))
    assert fit(backbone, images, config).record["stages"] is not None


def test_stages_begin_with_the_groups_own_ratios(backbone: Backbone, images: ImageSource) -> None:
    stage = StageConfig(particles=400, held_out=200, groupwise=0.5)
    config = small(iterations=40, ratios="staged", batch_size=64, learning_rate=1e-2, ema=0.0, stage=stage)
    done = fit(backbone, images, config).record["stages"]
    first = [each for each in done if each["iteration"] == 20]
    assert first
    assert all(each["gain"] > 0 and each["ess_fraction"] > 0.45 for each in first)


def test_a_refiner_is_not_staged(backbone: Backbone, images: ImageSource) -> None:
    with pytest.raises(ConfigurationError, match="the regime calibrated, found staged"):
        small(ratios="staged", regime="refiner")


@pytest.mark.parametrize("change", [{"particles": 0}, {"moves": 0}, {"ess": 1.0}, {"step_size": 3.0}, {"bound": -1.0}])
def test_impossible_stages(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ConfigurationError, match=f"{name} must be .*, found {change[name]}"):
        StageConfig(**change)
