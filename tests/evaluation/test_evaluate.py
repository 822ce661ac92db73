"""What `eval` prints: consistent with itself, fair between the priors, and zero where nothing was learned."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import ToyConv
from workshop import Workshop

from ebm_prior.data.images import ImageSource, open_images
from ebm_prior.errors import ConfigurationError, DataError
from ebm_prior.evaluation.classifier import FeatureClassifier, save_classifier
from ebm_prior.evaluation.evaluate import EvalConfig, Reference, evaluate
from ebm_prior.evaluation.gauge import GaugeConfig
from ebm_prior.evaluation.metrics import FeatureStatistics, extract, frechet_distance
from ebm_prior.evaluation.pixels import descriptors, spectrum_distance, statistics
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.reports.findings import evaluation_tables

SMALL = EnergyConfig(channels=4, hidden=8, joint=8)
CONFIG = EvalConfig(samples=80, gauge=GaugeConfig(energy=replace(SMALL, conditional=False), iterations=10), seed=3)


@pytest.fixture(scope="module")
def classifier() -> FeatureClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FeatureClassifier((1, 8, 8), 4, width=4).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def source(workshop: Workshop) -> ImageSource:
    return open_images(workshop.images)


@pytest.fixture(scope="module")
def reference(source: ImageSource, classifier: FeatureClassifier) -> Reference:
    backbone = ToyConv().eval().requires_grad_(False)
    test, train = source.subset(range(90)), source.subset(range(90, 120))
    return Reference(backbone, test, classifier, CONFIG, training_images=train)


def prior(reference: Reference, *, trained: bool, sampler: SamplerConfig = ANCESTRAL) -> EBMPrior:
    energy = JointEnergy(reference.backbone.groups, SMALL)
    if trained:
        with torch.no_grad():
            for parameter in energy.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return EBMPrior(reference.backbone, energy, sampler=sampler)


@pytest.fixture(scope="module")
def result(reference: Reference) -> dict[str, Any]:
    return evaluate(prior(reference, trained=True, sampler=SamplerConfig(proposals=4, steps=0)), reference)


def test_it_is_ready_for_json_and_complete(result: dict[str, Any]) -> None:
    again = json.loads(json.dumps(result, allow_nan=False))
    for measure in ("fd", "fdrec", "kid"):
        for which in ("backbone", "prior", "reconstruction"):
            assert math.isfinite(again[f"{measure}_{which}"])
    assert {"gain_nats", "ess_fraction", "tau", "auc_before", "auc_after", "acceptance", "norm"} <= set(again)
    assert list(again["auc_before_per_group"]) == ["dense", "point", "conv"]
    assert again["extractor"].startswith("FD(untrained-CNN-")


def test_the_gaps_follow_from_the_distances(result: dict[str, Any]) -> None:
    for gap, d in (("gap_closed", "fd"), ("gap_closed_rec", "fdrec")):
        before, after, best = (result[f"{d}_{which}"] for which in ("backbone", "prior", "reconstruction"))
        assert before > best
        assert result[gap] == pytest.approx((before - after) / (before - best))


def test_the_distances_are_those_of_the_samples(
    result: dict[str, Any], reference: Reference, classifier: FeatureClassifier
) -> None:
    drawn = prior(reference, trained=True, sampler=SamplerConfig(proposals=4, steps=0)).sample(80, seed=CONFIG.seed)
    mine = FeatureStatistics.of(extract(classifier, drawn.images))
    assert result["fd_prior"] == pytest.approx(frechet_distance(mine, reference.real.statistics), rel=1e-6)
    assert result["fdrec_prior"] == pytest.approx(frechet_distance(mine, reference.reconstructed.statistics), rel=1e-6)


def test_all_sets_have_the_same_size(source: ImageSource, classifier: FeatureClassifier) -> None:
    many = EvalConfig(samples=800, auc=False)  # more than there are images
    reference = Reference(ToyConv().eval(), source.subset(range(40)), classifier, many)
    result = evaluate(prior(reference, trained=False), reference)
    assert result["samples"] == result["held_out_images"] == 40
    assert {len(f) for f in (*reference.drawn, *reference.real) if f is not None} == {40}
    assert result["fdrec_reconstruction"] == 0  # without other images the floor is 0
    assert "auc_before" not in result


def test_an_untrained_prior_is_the_backbone(reference: Reference) -> None:
    untrained = prior(reference, trained=False, sampler=SamplerConfig(proposals=1, steps=0))
    result = evaluate(untrained, reference)
    assert result["gain_nats"] == 0
    assert result["ess_fraction"] == pytest.approx(1)
    for measure in ("fd", "fdrec", "kid"):
        assert result[f"{measure}_prior"] == result[f"{measure}_backbone"]
    assert result["gap_closed"] == 0
    assert result["auc_after"] == result["auc_before"]
    drawn = untrained.sample(80, seed=CONFIG.seed)
    assert all(torch.equal(a, b) for a, b in zip(drawn.z, reference.backbone_latents, strict=True))


def test_batching_changes_no_number(
    reference: Reference, source: ImageSource, classifier: FeatureClassifier, result: dict[str, Any]
) -> None:
    backbone, halves = reference.backbone, (source.subset(range(90)), source.subset(range(90, 120)))
    config = EvalConfig(samples=80, gauge=CONFIG.gauge, seed=3, chunk=1)
    again = Reference(backbone, halves[0], classifier, config, training_images=halves[1])
    assert evaluate(prior(reference, trained=True, sampler=SamplerConfig(proposals=4, steps=0)), again) == result


def test_settings_that_make_no_sense() -> None:
    for settings in ({"samples": 1}, {"chunk": 0}, {"seed": -1}):
        with pytest.raises(ConfigurationError, match="found"):
            EvalConfig(**settings)


def test_no_more_than_a_chunk_is_decoded_at_a_time(
    source: ImageSource, classifier: FeatureClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, decoded = [], ToyConv.likelihood

    def likelihood(self: ToyConv, features: tuple[torch.Tensor, torch.Tensor]) -> Any:
        sizes.append(len(features[0]))
        return decoded(self, features)

    monkeypatch.setattr(ToyConv, "likelihood", likelihood)
    for chunk, expected in ((64, {64, 56}), (512, {120})):
        sizes.clear()
        Reference(ToyConv().eval(), source, classifier, EvalConfig(chunk=chunk, auc=False))
        assert set(sizes) == expected


def test_what_would_end_it_is_found_before_the_work(source: ImageSource, classifier: FeatureClassifier) -> None:
    class Untouched(ToyConv):
        def infer(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("began to work")

    backbone, few = Untouched().eval(), source.subset(range(39))
    for config in (EvalConfig(), EvalConfig(samples=39)):
        with pytest.raises(DataError, match=r"at least 40 held-out images, found 39 .*--no-auc"):
            Reference(backbone, few if config.samples > 39 else source, classifier, config)
    with pytest.raises(AssertionError, match="began to work"):
        Reference(backbone, few, classifier, EvalConfig(auc=False))
    other = FeatureClassifier((1, 16, 16), 4, width=4).eval()
    with pytest.raises(DataError, match=r"found \(1, 1, 8, 8\)\. Pass --classifier .*ebm-prior classifier.* or --fid"):
        Reference(backbone, source, other, CONFIG)


@pytest.fixture(scope="module")
def classifier_file(workshop: Workshop, classifier: FeatureClassifier) -> Path:
    path = workshop.folder / "classifier.safetensors"
    save_classifier(classifier, path)
    return path


SMALL_EVAL = ("--samples", 40, "--gauge-iterations", 2)


def test_the_command(workshop: Workshop, fitted: Path, classifier_file: Path) -> None:
    path = fitted / "prior.safetensors"
    arguments = ("eval", path, path, "--data", "mnist", "--data-root", workshop.data_root)
    arguments += ("--classifier", classifier_file, *SMALL_EVAL)
    first, second = json.loads(workshop.run(*arguments, "--json").stdout)
    assert second.pop("paired")["gain_nats"]["difference"] == 0
    assert first == second
    assert first["data"] == "mnist/test"
    assert first["samples"] == 40
    text = workshop.run(*arguments).stdout
    assert f"{first['gain_nats']:+.3f} nats" in text
    assert "mean and standard deviation over 2 priors" in text


def test_the_command_needs_held_out_images(workshop: Workshop, fitted: Path, classifier_file: Path) -> None:
    """The prior was fitted to an .npy file: no test split is known, and the training images must not stand for it."""
    path = fitted / "prior.safetensors"
    error = workshop.error("eval", path, "--classifier", classifier_file, *SMALL_EVAL)
    assert "images.npy" in error
    assert "pass --data" in error


def test_the_command_takes_the_data_set_that_the_prior_records(
    workshop: Workshop, small_options: list[str], classifier_file: Path, tmp_path: Path
) -> None:
    where = ("--data-root", workshop.data_root)
    workshop.run("fit", "--ckpt", workshop.backbone, *where, "--out", tmp_path / "run", *small_options)
    path = tmp_path / "run" / "prior.safetensors"
    shown = workshop.run("eval", path, *where, "--classifier", classifier_file, "--no-auc", *SMALL_EVAL, "--json")
    (result,) = json.loads(shown.stdout)
    assert result["data"] == "mnist/test"


def test_json_knows_no_nan(workshop: Workshop, fitted: Path, classifier_file: Path, tmp_path: Path) -> None:
    """Where there is no gap to close, gap_closed is NaN, which strict readers of JSON refuse."""
    backbone = ToyConv().eval()
    same = (backbone.decode(backbone.sample(60, generator=torch.Generator().manual_seed(9))).mean * 255).round()
    np.save(tmp_path / "own.npy", same.detach().to(torch.uint8).numpy())
    shown = workshop.run(
        *("eval", fitted / "prior.safetensors", "--data", tmp_path / "own.npy", "--classifier", classifier_file),
        *("--no-auc", *SMALL_EVAL, "--json"),
    ).stdout

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (result,) = json.loads(shown, parse_constant=refuse)
    assert result["gap_closed"] is None


# Without a network of features, and with one of the user's own.


def test_without_features_all_else_is_measured(
    reference: Reference, source: ImageSource, result: dict[str, Any]
) -> None:
    backbone, test = reference.backbone, source.subset(range(90))
    tilted = prior(reference, trained=True, sampler=SamplerConfig(proposals=4, steps=0))
    plain = evaluate(tilted, Reference(backbone, test, None, CONFIG))
    left_out = {key for key in result if key.startswith(("fd_", "fdrec_", "kid_", "gap_closed"))}
    assert plain == {k: v for k, v in result.items() if k not in left_out | {"extractor", "statistics"}}
    assert {"gain_nats", "ess_fraction", "auc_after", "reconstruction_error", "spectrum_prior"} <= set(plain)
    text = evaluation_tables([plain])
    assert "neither FD nor KID" in text
    assert f"{plain['reconstruction_error']:.4f}" in text
    assert f"{plain['pixel_std_prior']:.4f}" in text


def test_pixels_are_those_of_the_images(reference: Reference, result: dict[str, Any]) -> None:
    tilted = prior(reference, trained=True, sampler=SamplerConfig(proposals=4, steps=0))
    drawn = tilted.sample(80, seed=CONFIG.seed).images.double()
    assert result["pixel_mean_prior"] == pytest.approx(float(drawn.mean()))
    assert result["pixel_std_prior"] == pytest.approx(float(drawn.std(correction=0)))
    with torch.no_grad():
        flat = statistics(descriptors(torch.full((5, 3, 16, 16), 0.25)))
    assert (flat.mean, flat.std) == (pytest.approx(0.25), pytest.approx(0, abs=1e-9))
    noise = torch.rand(400, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    white = statistics(descriptors(noise))
    torch.testing.assert_close(white.spectrum, torch.full((8,), 1 / 12, dtype=torch.float64), rtol=0.1, atol=0)
    assert spectrum_distance(white, statistics(descriptors(noise.flip(0)))) == pytest.approx(0, abs=1e-9)
    assert spectrum_distance(white, statistics(descriptors(noise / 2))) == pytest.approx(20 * math.log10(2))
    wave = torch.cos(2 * math.pi * 3 * torch.arange(16) / 16).expand(1, 1, 16, 16) / 2 + 0.5
    assert int(statistics(descriptors(wave)).spectrum.argmax()) == 2  # 3 periods per 16 pixels: the third of 8 rings


def test_the_command_without_a_classifier(workshop: Workshop, fitted: Path) -> None:
    words = ("eval", fitted / "prior.safetensors", "--data", "mnist", "--data-root", workshop.data_root, *SMALL_EVAL)
    shown = workshop.run(*words, "--json")
    assert re.search(r"FD and KID are left out.*\(1, 8, 8\).*--classifier .*--features .*--fid", shown.stderr)
    assert shown.stderr.index("left out") < shown.stderr.index("eval:"), "said after the work began"
    (result,) = json.loads(shown.stdout)
    assert "fd_prior" not in result
    assert result["reconstruction_error"] > 0
    assert "neither FD nor KID" in workshop.run(*words).stdout


OWN = """
import torch

class Net(torch.nn.Module):
    def forward(self, images):
        assert not self.training and images.dtype == torch.float32
        return images.flatten(1)[:, :6]

net = Net()

def flat(images):
    return images.flatten(1)[:, :6].double().numpy()

def one(images):
    return images.mean()

def broken(images):
    raise KeyError("mine")

number = 3
"""


def test_features_of_ones_own(
    workshop: Workshop, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_features.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    words = ("eval", fitted / "prior.safetensors", "--data", "mnist", "--data-root", workshop.data_root, "--no-auc")
    found = [
        json.loads(workshop.run(*words, *SMALL_EVAL, "--features", f"my_features:{name}", "--json").stdout)[0]
        for name in ("net", "flat")
    ]
    assert [each["extractor"] for each in found] == ["FD(my_features:net)", "FD(my_features:flat)"]
    assert found[0]["fd_prior"] == pytest.approx(found[1]["fd_prior"], rel=1e-5)
    for name, said in (
        ("my_features:nothing", "cannot be imported (AttributeError"),
        ("no_such_module:f", "cannot be imported (ModuleNotFoundError"),
        ("my_features", "expected MODULE:FUNCTION"),
        ("my_features:number", "expected a function, found int"),
        ("my_features:Net", "expected a function, found type"),
        ("my_features:one", "expected features (B, D) with B = 1"),
        ("my_features:broken", "failed on images (1, 1, 8, 8) (KeyError: 'mine')"),
    ):
        assert said in workshop.error(*words, *SMALL_EVAL, "--features", name)
    assert "give one" in workshop.run(*words, "--features", "a:b", "--fid", code=2).stderr
    assert str(tmp_path) not in sys.path
