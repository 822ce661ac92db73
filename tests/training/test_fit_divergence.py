"""A fit that diverges: rolled back once, ended the second time, and the best prior is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from listener import Listener
from run_folders import Interrupted, metrics, save_each_step
from small_fits import OBJECTIVES, into, small
from workshop import Workshop

from ebm_prior.data.images import ImageSource
from ebm_prior.errors import DivergenceError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.runs.fit import fit_into
from ebm_prior.storage.checkpoint import load_prior
from ebm_prior.training import course
from ebm_prior.training.fit import fit
from ebm_prior.training.latents import HeldOut


def spoiled(at: set[int], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the loss be NaN at these calls; the learning rates of all calls are noted."""
    rates: list[float] = []
    true_loss, true_step = course.nce_loss, torch.optim.AdamW.step

    def loss(*arguments: Any) -> torch.Tensor:
        loss.calls += 1  # type: ignore[attr-defined]
        return true_loss(*arguments) * (math.nan if loss.calls in at else 1.0)  # type: ignore[attr-defined]

    def step(self: Any, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return true_step(self, *arguments)

    loss.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(course, "nce_loss", loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return rates


def test_a_picture_whose_chains_diverge_is_left_out_and_training_goes_on(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, drawn, told = small(iterations=10), EBMPrior.sample, Listener()

    def sample(self: EBMPrior, n: int, **how: Any) -> Any:
        if n == 32:
            raise DivergenceError("3 of 32 chains left")
        return drawn(self, n, **how)

    monkeypatch.setattr(EBMPrior, "sample", sample)
    into(tmp_path / "run", workshop, backbone, images, config, progress=told)
    assert told.remarks == ["no picture of iteration 10: 3 of 32 chains left"]
    assert load_prior(tmp_path / "run" / "prior.safetensors").record["rollbacks"] == 0


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
            into(tmp_path / "cut", workshop, backbone, images, config, progress=Listener(stop))
    assert into(tmp_path / "cut", workshop, backbone, images, config, resume=True) == whole
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_state_of_the_clock_is_not_what_a_roll_back_returns_to(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after iteration 3, which then diverges: the last good state is that of the evaluation after iteration 2."""
    config = small()
    with monkeypatch.context() as patch:
        spoiled({4}, patch)
        whole = into(tmp_path / "whole", workshop, backbone, images, config)

    def stop(shown: Mapping[str, Any]) -> None:
        if shown["iteration"] == 3:
            raise Interrupted

    with monkeypatch.context() as patch:
        save_each_step(patch)
        with pytest.raises(Interrupted):
            into(tmp_path / "cut", workshop, backbone, images, config, progress=Listener(stop))
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["iteration"] == 3
    with monkeypatch.context() as patch:
        spoiled({1}, patch)
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
    true_gains, calls = HeldOut.gains, 0

    def falling(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        plain, tempered = true_gains(*arguments)
        fallen = calls in (2, 3)
        return plain._replace(nats=-30.0 if fallen else 0.5), tempered._replace(nats=0.0 if fallen else 0.5)

    monkeypatch.setattr(HeldOut, "gains", falling)
    with pytest.raises(DivergenceError, match=r"the held-out gain fell to -30 nats at iteration 4") as caught:
        fit(backbone, images, small())
    assert caught.value.kept is not None
