"""The second stage as a promise: it improves the prior, a run is a function of its seed, and nothing is lost."""

from __future__ import annotations

import copy
import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_FIT, Workshop

import ebm_prior.fit as stage
from ebm_prior.backbone import Backbone
from ebm_prior.checkpoint import load_backbone, load_prior, save_prior
from ebm_prior.commands import fit_into
from ebm_prior.data import ImageSource, open_images
from ebm_prior.energy import EnergyConfig
from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.fit import FitConfig, fit, paper_preset
from ebm_prior.samplers import SamplerConfig

CHAIN = SamplerConfig(proposals=1, kernel="langevin", steps=3, step_size=0.02)


@pytest.fixture(scope="module")
def backbone(workshop: Workshop) -> Backbone:
    return load_backbone(None, workshop.backbone)


@pytest.fixture(scope="module")
def images(workshop: Workshop) -> ImageSource:
    return open_images(workshop.images)


def small(**changes: Any) -> FitConfig:
    energy, sampler = EnergyConfig(**SMALL_FIT["energy"]), SamplerConfig(**SMALL_FIT["sampler"])
    return FitConfig(**(SMALL_FIT | {"energy": energy, "sampler": sampler} | changes))


OBJECTIVES = {
    "nce": small(iterations=8),
    "mle": replace(small(iterations=8), objective="mle", chains="persistent", chain=CHAIN, refresh=0.3),
}


class Interrupted(BaseException):
    pass


def into(
    out: Path, workshop: Workshop, backbone: Backbone, images: ImageSource, config: FitConfig, **how: Any
) -> bytes:
    fit_into(out, backbone, images, config, checkpoint=str(workshop.backbone), **how)
    return (out / "prior.safetensors").read_bytes()


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# What it learns.


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
    assert small(iterations=1, sampler=None).recorded_sampler == SamplerConfig()
    assert replace(OBJECTIVES["mle"], sampler=None).recorded_sampler == CHAIN
    assert fit(backbone, images, small(iterations=1)).sampler == replace(SamplerConfig(), proposals=2)
    assert paper_preset().recorded_sampler.steps == 2 * paper_preset().chain.steps


def test_a_refiner_keeps_its_last_state_untempered(backbone: Backbone, images: ImageSource) -> None:
    config = replace(OBJECTIVES["mle"], regime="refiner", target="published")
    prior = fit(backbone, images, config)
    assert (prior.regime, prior.target, prior.tau) == ("refiner", "published", 1.0)
    assert prior.record["best_iteration"] == config.iterations


def test_too_few_images(backbone: Backbone, images: ImageSource) -> None:
    with pytest.raises(ConfigurationError, match="at least 10 images to fit a prior, found 9"):
        fit(backbone, images.subset(range(9)), small())


def test_patience_ends_a_run_without_progress(
    backbone: Backbone, images: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = iter([0.1, 0.2, 0.15, 0.2, 0.1, 0.1, 0.1, 0.1])  # as good as the best is not better
    monkeypatch.setattr(stage, "temper", lambda *_, **__: stage.Gain(next(gains, 0.0), 1.0, 1.0))
    prior = fit(backbone, images, small(iterations=1000, patience=3))
    assert (prior.record["best_iteration"], prior.record["iterations"]) == (4, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations must be positive, found 0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, found nan"),
        ({"learning_rate": math.inf}, "learning_rate must be positive, found inf"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), found 1.0"),
        ({"betas": (0.9, 1.5)}, r"betas must be in \[0, 1\), found 1.5"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"refresh": 2.0}, "refresh must be in"),
        ({"objective": "nec"}, "objective must be nce or mle, found 'nec'"),
        ({"optimizer": "sgd"}, "optimizer must be adamw or adam"),
        ({"regime": "other"}, "regime must be calibrated or refiner"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FitConfig(**settings)


# A run is a function of its seed.


def test_equal_seeds_give_equal_files(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path
) -> None:
    config = small()
    first, second = (into(tmp_path / name, workshop, backbone, images, config) for name in "ab")
    assert first == second
    assert into(tmp_path / "c", workshop, backbone, images, replace(config, seed=1)) != first


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("after", [1, 2, 5, 7])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, objective: str, after: int
) -> None:
    config = OBJECTIVES[objective]

    def stop(shown: Mapping[str, Any]) -> None:
        if shown["iteration"] == after:
            raise Interrupted

    whole = into(tmp_path / "whole", workshop, backbone, images, config)
    with pytest.raises(Interrupted):
        into(tmp_path / "cut", workshop, backbone, images, config, on_step=stop)
    assert not (tmp_path / "cut" / "prior.safetensors").exists()
    assert into(tmp_path / "cut", workshop, backbone, images, config, resume=True) == whole
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert [line["iteration"] for line in metrics(tmp_path / "cut")] == [2, 4, 6, 8]
    assert into(tmp_path / "cut", workshop, backbone, images, config, resume=True) == whole  # nothing left to do


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

    draw = stage.draw
    monkeypatch.setattr(stage, "draw", spy)
    fit(backbone, images, replace(OBJECTIVES["mle"], iterations=4))
    kept = [int((a[0] == b[0]).all(1).sum()) for a, b in zip(started[1:], ended, strict=False)]
    assert len(kept) == 3
    assert 0.4 * 24 < sum(kept) < 24  # a share of 0.3 is restarted on average


@pytest.mark.parametrize("moment", ["before the state", "while the state is written", "while the metrics are written"])
def test_a_kill_at_the_worst_moments(
    workshop: Workshop,
    backbone: Backbone,
    images: ImageSource,
    tmp_path: Path,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ebm_prior import files, runs

    whole = into(tmp_path / "whole", workshop, backbone, images, small())
    count = 0

    def second(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal count
            count += "metrics" in moment or Path(arguments[0]).name.startswith((".state", "state"))
            if count == 2:
                if "metrics" in moment:
                    with arguments[0].open("a") as file:
                        file.write(arguments[1][:20])
                raise Interrupted
            return function(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        if moment == "before the state":
            patch.setattr(runs, "write_atomically", second(runs.write_atomically))
        elif moment == "while the state is written":
            patch.setattr(files.Path, "replace", second(Path.replace))
        else:
            patch.setattr(runs, "append_line", second(runs.append_line))
        with pytest.raises(Interrupted):
            into(tmp_path / "cut", workshop, backbone, images, small())
    assert into(tmp_path / "cut", workshop, backbone, images, small(), resume=True) == whole
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_process_goes_on(workshop: Workshop, small_options: list[str], tmp_path: Path, objective: str) -> None:
    """kill -9 at two moments: shortly after the first state, and after a resume some states later."""
    arguments = ["fit", "--ckpt", workshop.backbone, "--data", workshop.images, *small_options]
    arguments += ["--iterations", 120, "--evaluate-every", 10, "--patience", 100, "--objective", objective]
    arguments += ["--chains", "persistent", "--chain-steps", 2, "--seed", 5]
    workshop.run(*arguments, "--out", tmp_path / "whole")
    out = tmp_path / "cut"
    for lines, more in ((1, ()), (4, ("--resume",))):
        process = workshop.popen("-m", "ebm_prior", *arguments, "--out", out, *more)
        log, deadline = out / "metrics.jsonl", time.monotonic() + 240
        while not (log.exists() and log.read_text().count("\n") >= lines):
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "prior.safetensors").exists()
    workshop.run(*arguments, "--out", out, "--resume")
    assert (out / "prior.safetensors").read_bytes() == (tmp_path / "whole" / "prior.safetensors").read_bytes()
    assert metrics(out) == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, r"learning_rate: 0.002 before, 0.5 now"),
        ({"energy": EnergyConfig(channels=4, hidden=4, joint=8)}, r"energy.hidden: 8 before, 4 now"),
        ({"seed": 4}, "seed: 0 before, 4 now"),
    ],
)
def test_another_configuration_is_not_resumed(
    workshop: Workshop,
    backbone: Backbone,
    images: ImageSource,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    into(tmp_path / "run", workshop, backbone, images, small(iterations=2))
    other = small(iterations=2, **change)
    with pytest.raises(ConfigurationError, match=message):
        into(tmp_path / "run", workshop, backbone, images, other, resume=True)


def test_other_images_backbones_and_precisions_are_not_resumed(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path
) -> None:
    from toys import ToyConv

    config = small(iterations=2)
    into(tmp_path / "run", workshop, backbone, images, config)
    other = ToyConv(seed=1).eval().requires_grad_(False)
    double = copy.deepcopy(backbone).double()
    for which, source, message in (
        (backbone, images.subset(range(100)), "images: "),
        (other, images, "backbone: "),
        (double, images, "dtype: 'torch.float32' before, 'torch.float64' now"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            into(tmp_path / "run", workshop, which, source, config, resume=True)


# Divergence.


def spoiled(at: set[int], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the loss be NaN at these calls; the learning rates of all calls are noted."""
    rates: list[float] = []
    true_loss, true_step = stage.nce_loss, torch.optim.AdamW.step

    def loss(f_q: torch.Tensor, f_p: torch.Tensor) -> torch.Tensor:
        loss.calls += 1  # type: ignore[attr-defined]
        return true_loss(f_q, f_p) * (math.nan if loss.calls in at else 1.0)  # type: ignore[attr-defined]

    def step(self: Any, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return true_step(self, *arguments)

    loss.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(stage, "nce_loss", loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return rates


def test_one_divergence_is_rolled_back_at_half_the_rate(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(decay=False)
    rates = spoiled({4}, monkeypatch)  # in iteration 3: back to the state of iteration 2
    fit_into(tmp_path / "run", backbone, images, config, checkpoint=str(workshop.backbone))
    assert rates == [config.learning_rate] * 3 + [config.learning_rate / 2] * 4
    prior = load_prior(tmp_path / "run" / "prior.safetensors")
    assert prior.record["rollbacks"] == 1
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [2, 2, 4, 6]
    assert "not finite at iteration 3" in lines[1]["rolled_back"]


def test_a_roll_back_is_part_of_the_state(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    with monkeypatch.context() as patch:
        spoiled({4}, patch)
        whole = into(tmp_path / "whole", workshop, backbone, images, config)

    def stop(shown: Mapping[str, Any]) -> None:
        if shown["iteration"] == 3 and (tmp_path / "cut" / "metrics.jsonl").read_text().count("\n") == 2:
            raise Interrupted

    with monkeypatch.context() as patch:
        spoiled({4}, patch)
        with pytest.raises(Interrupted):
            into(tmp_path / "cut", workshop, backbone, images, config, on_step=stop)
    assert into(tmp_path / "cut", workshop, backbone, images, config, resume=True) == whole
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_the_second_divergence_ends_the_run_and_keeps_the_best(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled({4, 7}, monkeypatch)
    path = tmp_path / "run" / "prior.safetensors"
    with pytest.raises(DivergenceError, match=r"again after a roll-back at half the rate.*iteration") as caught:
        fit_into(tmp_path / "run", backbone, images, small(), checkpoint=str(workshop.backbone))
    kept = load_prior(path)
    assert str(path) in str(caught.value)
    assert kept.record["best_iteration"] in (2, 4)
    assert kept.record["rollbacks"] == 1
    assert all(t.isfinite().all() for t in kept.energy.state_dict().values())


def test_an_absurd_rate_ends_with_exit_code_3(workshop: Workshop, small_options: list[str], tmp_path: Path) -> None:
    error = workshop.error(
        *("fit", "--ckpt", workshop.backbone, "--data", workshop.images, "--out", tmp_path / "run", *small_options),
        *("--learning-rate", 1e30, "--iterations", 10),
        code=3,
    )
    assert "diverged" in error
    assert "Lower the learning rate" in error
    assert load_prior(tmp_path / "run" / "prior.safetensors").tau == 0  # the backbone's own prior
    shown = workshop.run("sample", tmp_path / "run" / "prior.safetensors", "--out", tmp_path / "a.png", "-n", 4)
    assert "wrote" in shown.stdout


def test_chains_that_leave_the_typical_set_are_noticed(backbone: Backbone, images: ImageSource) -> None:
    wild = SamplerConfig(proposals=1, kernel="langevin", steps=5, step_size=1.9)
    with pytest.raises(DivergenceError, match=r"chains left the typical set at iteration 0: ‖ε‖/√D"):
        fit(backbone, images, replace(OBJECTIVES["mle"], chain=wild))


def test_a_gain_that_collapses_is_noticed(
    backbone: Backbone, images: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_gains, calls = stage.HeldOut.gains, 0

    def falling(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        plain, tempered = true_gains(*arguments)
        fallen = calls in (2, 3)
        return plain._replace(nats=-30.0 if fallen else 0.5), tempered._replace(nats=0.0 if fallen else 0.5)

    monkeypatch.setattr(stage.HeldOut, "gains", falling)
    with pytest.raises(DivergenceError, match=r"the held-out gain fell to -30 nats at iteration 4") as caught:
        fit(backbone, images, small())
    assert caught.value.prior is not None


def test_metrics_hold_what_is_needed_to_judge_a_run(fitted: Path) -> None:
    lines = metrics(fitted)
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    wanted = {"iteration", "loss", "f_gap", "gain", "ess_fraction", "tempered_gain", "tau"}
    assert all(wanted <= set(line) for line in lines)
    assert lines[-1]["tau"] >= 0


def test_a_prior_is_saved_by_a_library_user(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path
) -> None:
    prior = fit(backbone, images, small())
    save_prior(prior, tmp_path / "p.safetensors", checkpoint=str(workshop.backbone))
    again = load_prior(tmp_path / "p.safetensors")
    assert torch.equal(again.sample(3).images, prior.sample(3).images)
    assert again.record["config"]["energy"]["channels"] == 4
