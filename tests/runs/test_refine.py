"""A prior in two roles: a calibrated f, and a refiner that draws the samples; one file holds both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from listener import Listener
from run_folders import Interrupted, metrics
from small_fits import into, small
from workshop import Workshop

from ebm_prior.data.images import ImageSource
from ebm_prior.errors import CheckpointError, RegimeError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.scores import Form
from ebm_prior.runs.fit import REFINER
from ebm_prior.storage.checkpoint import PRIOR_KEY, load_prior, save_prior
from ebm_prior.storage.weights import read_tensors
from ebm_prior.training.sampling import HeldOutViews


@pytest.fixture
def nearer(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The regimes whose samples are the nearer ones; the refiner's, unless a test changes the list."""
    regimes = ["refiner"]

    def distance(self: HeldOutViews, prior: EBMPrior, *_: Any, **__: Any) -> float:
        return 0.25 if prior.regime in regimes else 0.5

    monkeypatch.setattr(HeldOutViews, "distance", distance)
    return regimes


@pytest.fixture
def joint(workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, nearer: list[str]) -> Path:
    into(tmp_path / "joint", workshop, backbone, images, small(refine=4))
    return tmp_path / "joint"


def test_samples_are_the_refiners_and_scores_the_calibrated_priors(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, joint: Path
) -> None:
    into(tmp_path / "alone", workshop, backbone, images, small())
    both, alone = load_prior(joint), load_prior(tmp_path / "alone")
    refiner = load_prior(joint / REFINER)
    assert both.refiner is not None
    assert (both.regime, both.sampling.regime, both.sampling.sampler) == ("calibrated", "refiner", refiner.sampler)
    assert torch.equal(both.sample(5, seed=2).images, refiner.sample(5, seed=2).images)
    assert not torch.equal(both.sample(5, seed=2).images, alone.sample(5, seed=2).images)
    upper = both.sample(3).z[:1]
    assert torch.equal(both.complete(upper).images, refiner.complete(upper).images)
    z = alone.sample(5).z
    assert torch.equal(both.f(z), alone.f(z))
    assert both.log_normalizer(n=64) == alone.log_normalizer(n=64)
    seen, form = images.batch(torch.arange(4)), Form(k=1)
    assert torch.equal(both.scores(seen, form)[form], alone.scores(seen, form)[form])
    assert both.record == alone.record | {"roles": {"images": 12, "calibrated": 0.5, "refiner": 0.25}}
    assert "samples by a refiner" in repr(both)
    assert both.to("cpu") is both


def test_a_file_of_both_is_read_and_written_alike(joint: Path, tmp_path: Path, workshop: Workshop) -> None:
    again = tmp_path / "again.safetensors"
    save_prior(load_prior(joint), again)
    assert again.read_bytes() == (joint / "prior.safetensors").read_bytes()


def test_a_file_without_a_refiner_knows_no_roles(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path
) -> None:
    into(tmp_path / "alone", workshop, backbone, images, small())
    record = read_tensors(tmp_path / "alone" / "prior.safetensors", PRIOR_KEY, "a prior")[1]
    assert set(record) == {
        *("backbone", "ceiling", "energy", "format", "library", "record", "regime", "sampler", "target", "tau"),
    }
    assert "norm_limit" not in record["sampler"]
    assert not {"refuse", "gradient_clip", "choose_steps"} & set(record["record"]["config"])
    assert "norm_limit" not in record["record"]["config"]["chain"]


def test_the_role_whose_samples_are_farther_does_not_sample(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, nearer: list[str]
) -> None:
    nearer[:] = ["calibrated"]
    into(tmp_path / "joint", workshop, backbone, images, small(refine=4))
    prior = load_prior(tmp_path / "joint")
    assert prior.sampling is prior
    assert prior.record["roles"] == {"images": 12, "calibrated": 0.25, "refiner": 0.5}
    assert load_prior(tmp_path / "joint" / REFINER).regime == "refiner"


@pytest.mark.parametrize(("where", "after"), [("fit", 3), ("refiner", 1), ("refiner", 3)])
def test_an_interrupted_run_of_two_fits_goes_on_as_if_nothing_had_been(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, joint: Path, where: str, after: int
) -> None:
    cut = tmp_path / "cut"

    def stop(shown: Any) -> None:
        if shown["iteration"] == after and (cut / REFINER).exists() == (where == "refiner"):
            raise Interrupted

    config = small(refine=4)
    with pytest.raises(Interrupted):
        into(cut, workshop, backbone, images, config, progress=Listener(stop))
    assert (cut / "prior.safetensors").exists() == (where == "refiner")  # the calibrated one alone
    whole = (joint / "prior.safetensors").read_bytes()
    assert into(cut, workshop, backbone, images, config, resume=True) == whole
    for part in ("", REFINER):
        assert metrics(cut / part) == metrics(joint / part)
    assert into(cut, workshop, backbone, images, config, resume=True) == whole
    assert into(cut, workshop, backbone, images, config, overwrite=True) == whole


def test_a_finished_fit_is_given_a_refiner_later(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, joint: Path
) -> None:
    into(tmp_path / "later", workshop, backbone, images, small())
    whole = (joint / "prior.safetensors").read_bytes()
    assert into(tmp_path / "later", workshop, backbone, images, small(refine=4), resume=True) == whole


def test_a_refiner_is_refused_where_it_is_none(joint: Path, tmp_path: Path) -> None:
    prior = load_prior(joint)
    assert prior.refiner is not None
    with pytest.raises(RegimeError, match="found a calibrated prior for a calibrated one"):
        EBMPrior(prior.backbone, prior.energy, refiner=EBMPrior(prior.backbone, prior.energy))
    prior.refiner.regime = "calibrated"
    save_prior(prior, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match="describes no prior that this version can build"):
        load_prior(tmp_path / "wrong.safetensors")


def test_the_commands_say_which_role_does_what(
    workshop: Workshop, small_options: list[str], tmp_path: Path, nearer: list[str]
) -> None:
    run = tmp_path / "run"
    words = ("fit", "--ckpt", workshop.backbone, "--data", workshop.images, "--out", run, *small_options)
    said = workshop.run(*words, "--refine", 2).stdout
    assert "samples are drawn by the refiner; scores and log Z are the calibrated prior's" in said
    assert "distance to 12 held-out reconstructions (smaller is better): refiner 0.25, calibrated 0.5" in said
    card = workshop.run("info", run).stdout
    assert "samples (sample, eval, show) are drawn by the refiner: " in card
    assert "scores, gain and log Z (ood, anomaly) are those of the calibrated f" in card
    drawn = json.loads(workshop.run("sample", run, "-n", 3, "--out", tmp_path / "a.npz", "--json").stdout)
    assert drawn["sampler"]["kernel"] == "langevin"
    told = json.loads(
        workshop.run("eval", run, "--data", "mnist", "--data-root", workshop.data_root, "--no-auc", "--json").stdout
    )[0]
    assert (told["sampled_by"], told["sampler"]["kernel"]) == ("refiner", "langevin")
    assert {"restarted", "beyond_limit"} <= set(told)
    scored = ("ood", run, "--in", "mnist", "--outliers", "noise", "--data-root", workshop.data_root, "--samples", 20)
    told = json.loads(workshop.run(*scored, "--draws", 1, "--out", tmp_path / "ood", "--json").stdout)
    assert told["sampler"]["kernel"] == "pcn-langevin"
    pictured = workshop.run("show", run, "transitions", "-n", 2, "--out", tmp_path / "t.png")
    assert "t.png" in pictured.stdout
    exported = workshop.run("export", run, "--out", tmp_path / "shared")
    assert "prior.safetensors" in exported.stdout
    assert "with a refiner that draws the samples" in (tmp_path / "shared" / "README.md").read_text()
    assert load_prior(tmp_path / "shared", checkpoint=workshop.backbone).refiner is not None


def test_a_refiner_is_not_refined(workshop: Workshop, tmp_path: Path) -> None:
    words = ("fit", "--ckpt", workshop.backbone, "--data", workshop.images, "--out", tmp_path / "run")
    said = workshop.run(*words, "--preset", "refiner", "--refine", 2, code=2).stderr
    assert "--refine adds a refiner to a calibrated prior" in said
