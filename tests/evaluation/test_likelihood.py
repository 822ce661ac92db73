"""`ebm-prior likelihood` on the linear-Gaussian model, whose posterior is exact, and as a command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_form import ArrayImages, Problem, Quadratic, images_of, latent_prior, tilt
from toys import LinearGaussian
from workshop import Workshop

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.errors import RegimeError, SettingError
from ebm_prior.evaluation.likelihood import LikelihoodConfig, measure_likelihood
from ebm_prior.model.normalizer import AnnealingConfig
from ebm_prior.model.prior import EBMPrior
from ebm_prior.reports.likelihood import likelihood_text

FEW = LikelihoodConfig(samples=400, draws=8, annealing=AnnealingConfig(chains=4, moves=10))
SHORT = ("--samples", 30, "--draws", 2, "--annealing-repetitions", 4, "--annealing-chains", 2, "--annealing-moves", 2)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """With the best f, shifted so that log Z is 1, and what is known of it in closed form."""
    backbone = LinearGaussian().double().eval().requires_grad_(False)
    problem = Problem.of(backbone)
    f = Quadratic(problem.best.c + 1, problem.best.b, problem.best.Q).requires_grad_(False)
    images = images_of(backbone, problem.source, 500, derived_generator(95)).clamp(0, 1)
    prior = EBMPrior(backbone, f)  # type: ignore[arg-type]
    found = measure_likelihood(prior, ArrayImages(images), FEW)
    chosen = images  # all means over images are compared within their intervals
    return {
        "found": found,
        "evidence": float(backbone.evidence(chosen).mean()),
        "log_z": float(tilt(latent_prior(backbone), f.scaled(1.0))[1]),
        "kl": problem.q.kl(problem.p),
        "expected_f": float(problem.q.kl(problem.p)) + 1,
    }


def test_without_f_both_bounds_are_the_evidence(measured: dict[str, Any]) -> None:
    """The posterior is exact, so that every draw has the weight p(x)."""
    found = measured["found"]
    for name in ("elbo", "iw"):
        plain = found[name]["f=0"]
        assert plain["low"] < measured["evidence"] < plain["high"]
        assert plain["high"] - plain["low"] == pytest.approx(2 * 1.96 * plain["error"], rel=1e-3)
    assert found["elbo"]["f=0"]["nats"] == pytest.approx(found["iw"]["f=0"]["nats"])


def test_the_gain_of_the_best_f_is_the_kullback_leibler_divergence(measured: dict[str, Any]) -> None:
    found, gain = measured["found"], measured["found"]["elbo"]["gain"]
    assert measured["log_z"] == pytest.approx(1)
    assert found["log_z"]["low"] < 1 < found["log_z"]["high"]
    assert found["f_posterior"]["low"] < measured["expected_f"] < found["f_posterior"]["high"]
    assert gain["low"] < measured["kl"] < gain["high"]
    assert gain["at_upper"] == pytest.approx(found["f_posterior"]["nats"] - found["log_z"]["upper"])
    assert gain["at_lower"] == pytest.approx(found["f_posterior"]["nats"] - found["log_z"]["lower"])
    assert (
        gain["low"] < min(gain["at_upper"], gain["at_lower"]) <= max(gain["at_upper"], gain["at_lower"]) < gain["high"]
    )
    assert found["iw"]["f"]["at_upper"] > found["elbo"]["f"]["at_upper"]  # f varies over q(z | x), so that K draws help


def test_chains_begin_at_images_of_the_whole_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at its first ones, which in a sorted set are of one class."""
    backbone = LinearGaussian().double().eval().requires_grad_(False)
    images, begun = torch.linspace(0, 1, 400, dtype=torch.float64)[:, None, None, None].expand(-1, 1, 2, 2), []
    log_normalizer = EBMPrior.log_normalizer

    def seen(prior: EBMPrior, **how: Any) -> Any:
        begun.append(how["images"][:, 0, 0, 0])
        return log_normalizer(prior, **how)

    monkeypatch.setattr(EBMPrior, "log_normalizer", seen)
    quick = AnnealingConfig(repetitions=8, chains=4, moves=2)
    prior = EBMPrior(backbone, Problem.of(backbone).best)  # type: ignore[arg-type]
    measure_likelihood(prior, ArrayImages(images.contiguous()), LikelihoodConfig(samples=400, draws=1, annealing=quick))
    assert len(begun[0]) == 16
    assert begun[0].min() < 0.25
    assert begun[0].max() > 0.75


def test_the_words(measured: dict[str, Any]) -> None:
    said = likelihood_text(measured["found"])
    assert "400 images of closed form, 8 posterior draws each, seed 0" in said
    assert "gain of the ELBO" in said
    assert "bits per dimension" not in said  # of a density
    assert "NO CLAIM" not in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"upper": 2.0}, "the bounds on log Z differ by 1.00 nats, more than 0.5: more --annealing-chains"),
        ({"upper": 0.0}, "the upper bound lies 1.00 nats below the lower one"),
        ({"settled": False}, "f differs by more than 3 standard errors where it should not"),
    ],
)
def test_where_nothing_is_claimed(measured: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    found = measured["found"]
    doubtful = found | {"log_z": found["log_z"] | {"lower": 1.0} | changes}
    assert f"NO CLAIM on the likelihood: {words}" in likelihood_text(doubtful)


def test_bits_per_dimension_are_of_discrete_images(measured: dict[str, Any]) -> None:
    said = likelihood_text(measured["found"] | {"dimensions": 100})
    row = next(line for line in said.splitlines() if line.startswith("ELBO, f = 0"))
    expected = -measured["found"]["elbo"]["f=0"]["nats"] / (100 * math.log(2))
    assert f"{expected:.4f}" in row


def test_the_command(workshop: Workshop, fitted: Path, tmp_path: Path) -> None:
    words = ("likelihood", fitted / "prior.safetensors", "--data", workshop.images, *SHORT)
    result = workshop.run(*words, "--json").stdout
    found = json.loads(result)
    assert found["images"] == 30
    assert found["log_z"]["repetitions"] == 4
    assert found["log_z"]["apart"] is not None
    assert json.loads(workshop.run(*words, "--json").stdout) == found
    assert "log Z (nats)" in workshop.run(*words).stdout
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"draws": 3, "annealing": {"chains": 3}}))
    other = json.loads(workshop.run(*words[:4], "--config", settings, *SHORT[:2], *SHORT[4:6], "--json").stdout)
    assert (other["draws"], other["log_z"]["chains"]) == (3, 3)


def test_a_refiner_has_no_likelihood() -> None:
    backbone = LinearGaussian().double().eval().requires_grad_(False)
    prior = EBMPrior(backbone, Problem.of(backbone).best, regime="refiner")  # type: ignore[arg-type]
    with pytest.raises(RegimeError, match="a likelihood needs a calibrated prior"):
        measure_likelihood(prior, ArrayImages(torch.rand(4, 1, 2, 2)), FEW)


@pytest.mark.parametrize(("name", "value"), [("samples", 1), ("draws", 0), ("chunk", 0), ("seed", -1)])
def test_settings_out_of_range(name: str, value: int) -> None:
    with pytest.raises(SettingError, match=f"{name} must"):
        LikelihoodConfig(**{name: value})
