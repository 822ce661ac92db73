"""Pretraining: the loss is the ELBO's, what is kept is the average, and a killed run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from listener import Listener
from own_images import Own
from run_folders import Interrupted, check_an_interruption, check_kills, longer, metrics
from small_pretrainings import SMALL, losses
from toys import LinearGaussian, ToyConv
from workshop import Workshop

from ebm_prior.data.images import ImageSource, from_array, open_images
from ebm_prior.errors import ConfigurationError, DataError, DivergenceError
from ebm_prior.runs.folder import Run
from ebm_prior.runs.pretrain import pretrain_into
from ebm_prior.storage.checkpoint import backbone_record, load_backbone
from ebm_prior.storage.registry import build
from ebm_prior.storage.weights import fingerprint
from ebm_prior.training import pretrain as stage
from ebm_prior.training.pretrain import evaluate_elbo, pretrain
from ebm_prior.training.pretrain_config import PretrainConfig


def into(out: Path, images: ImageSource, config: PretrainConfig, **how: Any) -> bytes:
    backbone = build(ToyConv, {"width": 6}, seed=config.seed)
    pretrain_into(out, backbone, images, images.subset(range(40)), config, **how)
    return (out / "backbone.safetensors").read_bytes()


def test_the_elbo_rises(images: ImageSource) -> None:
    config = PretrainConfig(iterations=40, batch_size=40, learning_rate=1e-2, ema=0.8)
    before = evaluate_elbo(ToyConv(), images).elbo
    trained = pretrain(ToyConv(), images, config)
    assert evaluate_elbo(trained, images).elbo > before + 2
    assert not trained.training
    assert not any(p.requires_grad for p in trained.parameters())


@pytest.mark.parametrize("place", ["first", "late", "validation"])
def test_images_that_are_none_are_an_error_with_their_number(place: str, images: ImageSource) -> None:
    own = Own.of(images, 5 if place == "first" else 90)
    training, validation = (images, own) if place == "validation" else (own, images)
    with pytest.raises(DataError, match=r"my own: expected float images in \[0, 1\], found NaN .* in image (5|90) "):
        pretrain(ToyConv(), training, PretrainConfig(**SMALL), validation=validation, on_evaluate=lambda _: None)


def test_the_elbo_of_an_exact_posterior_is_the_evidence() -> None:
    backbone = LinearGaussian().double().eval()
    x = backbone.decode(backbone.sample(40, generator=torch.Generator().manual_seed(0))).sample().clamp(0, 1).detach()
    source = from_array(x.float().numpy())
    found = evaluate_elbo(backbone.float(), source, batch_size=7)
    assert found.elbo == pytest.approx(float(backbone.evidence(source.batch(range(40))).detach().mean()), abs=1e-3)
    assert found.elbo == pytest.approx(found.log_likelihood - sum(found.kl))
    assert len(found.kl) == 2


def test_the_loss_is_the_elbo_with_a_warm_up(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(**SMALL)  # β reaches 1 after half of 8 iterations
    found = losses(config, images, monkeypatch)
    for (loss, log_p, kl), beta in zip(found, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1], strict=True):
        assert loss == pytest.approx(float(beta * kl.mean(0).sum() - log_p.mean()), rel=1e-5)


def test_free_nats_are_a_floor_per_group(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(iterations=2, batch_size=16, kl_warmup=0.0, free_nats=5.0)
    for loss, log_p, kl in losses(config, images, monkeypatch):
        per_group = kl.mean(0)
        assert float(per_group.min()) < 5 < float(per_group.max())
        assert loss == pytest.approx(float(per_group.clamp(min=5.0).sum() - log_p.mean()), rel=1e-5)


def test_what_is_kept_is_the_moving_average(images: ImageSource) -> None:
    """The average begins where the warm-up ends: before, it follows the weights."""
    backbone, kept, weights = ToyConv(), [], []

    def note(shown: Mapping[str, Any]) -> None:
        kept.append(shown["backbone"].dense.weight.detach().clone())
        weights.append(backbone.dense.weight.detach().clone())

    class Nowhere:
        def log(self, metrics: Mapping[str, Any]) -> None: ...
        def save_state(self, state: Mapping[str, Any]) -> None: ...
        def load_state(self) -> None: ...

    config = PretrainConfig(**SMALL | {"checkpoint_every": 1, "ema": 0.9})
    trained = pretrain(backbone, images, config, run=Nowhere(), on_evaluate=note)
    assert torch.equal(kept[3], weights[3])
    for t in range(4, 8):
        assert torch.allclose(kept[t], 0.9 * kept[t - 1] + 0.1 * weights[t], atol=1e-7)
    assert torch.equal(trained.dense.weight, kept[-1])


def test_the_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = build(UsuallyInitialised, {}, seed=1)
    torch.manual_seed(6)
    assert fingerprint(build(UsuallyInitialised, {}, seed=1)) == fingerprint(first)
    assert fingerprint(build(UsuallyInitialised, {}, seed=2)) != fingerprint(first)
    for architecture in ({"depth": 3}, {"width": -3}):
        with pytest.raises(ConfigurationError, match=f"ToyConv cannot build {architecture}"):
            build(ToyConv, architecture)


class UsuallyInitialised(ToyConv):
    """By torch's global generator, as networks are."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()


@pytest.mark.parametrize("after", [longer(1), 2, 5, longer(7)])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(images: ImageSource, tmp_path: Path, after: int) -> None:
    def run(out: Path, **how: Any) -> bytes:
        return into(out, images, PretrainConfig(**SMALL), **how)

    check_an_interruption(run, tmp_path, "backbone.safetensors", after)
    assert [line["iteration"] for line in metrics(tmp_path / "cut")] == [2, 4, 6, 8]
    assert run(tmp_path / "again") == run(tmp_path / "cut", resume=True)


def test_states_of_earlier_versions_are_read(images: ImageSource) -> None:
    """They name the weights of the moving average module.* and count its updates."""
    config = PretrainConfig(**SMALL)
    states: list[dict[str, Any]] = []

    class Cut:
        def log(self, metrics: Mapping[str, Any]) -> None: ...
        def save_state(self, state: Mapping[str, Any]) -> None:
            states.append(dict(state))

        def load_state(self) -> dict[str, Any] | None:
            return states[0] if states else None

    whole = pretrain(ToyConv(), images, config, run=Cut())
    assert list(states[0]) == ["iteration", "rate", "rollbacks", "backbone", "average", "optimizer"]
    wrapped = {f"module.{name}": weights for name, weights in states[0]["average"].items()}
    states[0]["average"] = {"n_averaged": torch.tensor(1), **wrapped}
    assert fingerprint(pretrain(ToyConv(), images, config, run=Cut())) == fingerprint(whole)


def test_another_configuration_is_not_resumed(images: ImageSource, tmp_path: Path) -> None:
    into(tmp_path / "run", images, PretrainConfig(**SMALL))
    with pytest.raises(ConfigurationError, match=r"ema: 0\.5 before, 0\.6 now"):
        into(tmp_path / "run", images, PretrainConfig(**SMALL | {"ema": 0.6}), resume=True)
    with pytest.raises(ConfigurationError, match=r"architecture\.width: 6 before, 8 now"):
        pretrain_into(tmp_path / "run", ToyConv(), images, images, PretrainConfig(**SMALL), resume=True)


def test_training_runs_in_the_precision_of_the_network(images: ImageSource) -> None:
    trained = pretrain(ToyConv().double(), images, PretrainConfig(**SMALL))
    assert trained.dense.weight.dtype == torch.float64
    expected = evaluate_elbo(pretrain(ToyConv(), images, PretrainConfig(**SMALL)), images).elbo
    assert evaluate_elbo(trained, images).elbo == pytest.approx(expected, abs=3)  # nats: the noise is another


def test_what_is_shown_is_what_is_logged(images: ImageSource, tmp_path: Path) -> None:
    shown: list[Mapping[str, Any]] = []
    run = Run(tmp_path, {}, {})
    trained = pretrain(ToyConv(), images, PretrainConfig(**SMALL), run=run, validation=images, on_evaluate=shown.append)
    assert [line["iteration"] for line in run.metrics()] == [entry["iteration"] for entry in shown] == [2, 4, 6, 8]
    assert [line["elbo"] for line in run.metrics()] == [entry["elbo"].elbo for entry in shown]
    assert shown[-1]["elbo"] == evaluate_elbo(trained, images)


# Divergence.


def spoiled(at: set[int], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the loss be NaN at these steps, counted from 1; the learning rates of the steps taken are noted."""
    rates: list[float] = []
    steps = 0
    true_terms, true_step = stage._elbo_terms, torch.optim.Adam.step

    def terms(*arguments: Any) -> Any:
        nonlocal steps
        steps += torch.is_grad_enabled()
        log_p, kl = true_terms(*arguments)
        return log_p, kl * (math.nan if steps in at and torch.is_grad_enabled() else 1)

    def step(self: Any, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return true_step(self, *arguments)

    monkeypatch.setattr(stage, "_elbo_terms", terms)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return rates


def test_one_divergence_is_rolled_back_at_half_the_rate(
    images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainConfig(**SMALL)
    rates = spoiled({6}, monkeypatch)  # in iteration 5: back to the state of iteration 4
    into(tmp_path / "run", images, config)
    cosine = [config.learning_rate * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    assert rates == pytest.approx(cosine[:5] + [rate / 2 for rate in cosine[4:]])
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [2, 4, 4, 6, 8]
    assert "not finite at iteration 5" in lines[2]["rolled_back"]
    assert lines[2]["rate"] == 0.5


def test_a_roll_back_returns_to_the_very_state(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first checkpoint: to the beginning, so that the run is one at half the rate."""
    config = PretrainConfig(**SMALL, learning_rate=2e-3)
    half = pretrain(ToyConv(), images, replace(config, learning_rate=1e-3))
    spoiled({2}, monkeypatch)
    assert fingerprint(pretrain(ToyConv(), images, config)) == fingerprint(half)


def test_a_roll_back_is_part_of_the_state(images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(**SMALL)
    with monkeypatch.context() as patch:
        spoiled({6}, patch)
        whole = into(tmp_path / "whole", images, config)

    def stop(shown: Mapping[str, Any]) -> None:
        if shown["iteration"] == 5 and len(metrics(tmp_path / "cut")) == 3:
            raise Interrupted

    with monkeypatch.context() as patch:
        spoiled({6}, patch)
        with pytest.raises(Interrupted):
            into(tmp_path / "cut", images, config, progress=Listener(stop))
    assert into(tmp_path / "cut", images, config, resume=True) == whole
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_the_second_divergence_ends_the_run_with_advice_that_works(
    images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainConfig(**SMALL)
    with monkeypatch.context() as patch:
        spoiled({6, 8}, patch)
        with pytest.raises(DivergenceError, match=r"again.*iteration 5\. .*start anew \(--overwrite.*lower learning"):
            into(tmp_path / "run", images, config)
    kept = backbone_record(tmp_path / "run" / "backbone.safetensors")["record"]
    assert "Kept: the backbone of iteration 4" in kept["diverged"]
    assert load_backbone(None, tmp_path / "run" / "backbone.safetensors")
    assert into(tmp_path / "run", images, replace(config, learning_rate=1e-3), overwrite=True)


@pytest.mark.parametrize(
    "settings",
    [
        *({"iterations": 0}, {"learning_rate": math.nan}, {"seed": -1}),
        *({"kl_warmup": 1.5}, {"ema": 1.0}, {"free_nats": -1.0}),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(settings))}.*found"):
        PretrainConfig(**settings)


# The command.

OPTIONS = ("--backbone", "toy", "--batch-size", 16, "--checkpoint-every", 10, "--ema", 0.9)


def test_the_command_writes_a_backbone_that_fit_takes(
    workshop: Workshop, small_options: list[str], tmp_path: Path
) -> None:
    architecture = tmp_path / "architecture.json"
    architecture.write_text('{"width": 5}')
    out, data = tmp_path / "run", ("--data-root", workshop.data_root)
    arguments = (*OPTIONS, "--iterations", 20, "--data", "mnist", *data, "--architecture", architecture, "--out", out)
    shown = json.loads(workshop.run("pretrain", *arguments, "--json").stdout)
    path = out / "backbone.safetensors"
    assert shown["backbone"] == str(path)
    assert {p.name for p in out.iterdir()} == {
        *("backbone.safetensors", "config.json", "data.json", "metrics.jsonl", "state.pt"),
        *("samples-000010.png", "samples-000020.png"),
    }
    backbone = load_backbone(None, path)
    assert backbone.architecture["width"] == 5
    record = backbone_record(path)["record"]
    assert record["data"] == {"name": "mnist/train", "images": 120}
    measured = evaluate_elbo(backbone, open_images("mnist", split="test", data_root=workshop.data_root))
    assert measured.elbo == pytest.approx(record["test_elbo"]["elbo"], abs=1e-4)
    assert metrics(out)[-1]["elbo"] == pytest.approx(measured.elbo, abs=1e-4)
    fitted = workshop.run("fit", "--ckpt", path, *data, "--out", tmp_path / "fit", *small_options, "--json")
    assert json.loads(fitted.stdout)["iterations"] == 6  # the data set is the backbone's own


def test_a_killed_process_goes_on(workshop: Workshop, tmp_path: Path) -> None:
    arguments = ["pretrain", *OPTIONS, "--iterations", 60, "--data", workshop.images]
    check_kills(workshop, arguments, tmp_path, "backbone.safetensors", lambda out: (out / "state.pt").exists())


@pytest.mark.parametrize("rate", [1e20, 1e37])
def test_an_absurd_rate_ends_with_exit_code_3(workshop: Workshop, tmp_path: Path, rate: float) -> None:
    """Also where every loss is finite and the last step overflows the weights."""
    out = tmp_path / "run"
    words = (*OPTIONS, "--iterations", 1 if rate == 1e37 else 30, "--data", workshop.images, "--out", out)
    assert "start anew" in workshop.error("pretrain", *words, "--learning-rate", rate, code=3)
    assert not (out / "backbone.safetensors").exists()


def test_errors_of_the_command(workshop: Workshop, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run", "--data", workshop.images)
    bad = tmp_path / "bad.json"
    for content, message in (("[1]", "expected a JSON object"), ("{", "cannot be read as JSON")):
        bad.write_text(content)
        assert message in workshop.error("pretrain", *OPTIONS, *out, "--architecture", bad)
    bad.write_text('{"depth": 2}')
    assert "cannot build {'depth': 2}" in workshop.error("pretrain", *OPTIONS, *out, "--architecture", bad)
    assert "no backbone adapter" in workshop.error("pretrain", "--backbone", "nonesuch", *out)
    assert "--data" in workshop.run("pretrain", "--backbone", "toy", code=2).stderr
    assert not (tmp_path / "run").exists()
