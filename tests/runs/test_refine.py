"""A prior in two roles: a calibrated f, and a refiner that draws the samples; one file holds both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from listener import Listener
from run_folders import Interrupted, metrics
from small_fits import SATURATING, into, small
from workshop import Workshop

from ebm_prior import api
from ebm_prior.data.images import ImageSource
from ebm_prior.errors import CheckpointError, ConfigurationError, DivergenceError, RegimeError
from ebm_prior.evaluation.roles import HeldOutGauge
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.scores import Form
from ebm_prior.runs import fit as runs
from ebm_prior.runs.describe import head_parameters
from ebm_prior.runs.fit import REFINER
from ebm_prior.storage.checkpoint import PRIOR_KEY, load_prior, save_prior
from ebm_prior.storage.weights import read_tensors, write_tensors
from ebm_prior.training import fit_config

TWO = small(refine=4)


@pytest.fixture
def nearer(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The regimes whose samples are the nearer ones; the refiner's, unless a test changes the list."""
    regimes = ["refiner"]

    def distance(self: HeldOutGauge, prior: EBMPrior, *_: Any, **__: Any) -> float:
        return 0.25 if prior.regime in regimes else 0.5

    monkeypatch.setattr(HeldOutGauge, "distance", distance)
    return regimes


@pytest.fixture
def joint(workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, nearer: list[str]) -> Path:
    into(tmp_path / "joint", workshop, backbone, images, TWO)
    return tmp_path / "joint"


def test_samples_are_the_refiners_and_scores_the_calibrated_priors(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, joint: Path
) -> None:
    into(tmp_path / "alone", workshop, backbone, images, small(refine=0))
    both, alone = load_prior(joint), load_prior(tmp_path / "alone")
    refiner = load_prior(joint / REFINER)
    assert both.refiner is not None
    assert both.refiner.backbone is both.backbone
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
    assert both.record["roles"] == {"images": 12, "calibrated": 0.5, "refiner": 0.25}
    assert both.record["held_out"] == alone.record["held_out"]
    assert "samples by a refiner" in repr(both)
    assert both.to("cpu") is both
    both.refiner = None
    assert torch.equal(both.sample(5, seed=2).images, alone.sample(5, seed=2).images)


def test_a_file_of_both_is_read_and_written_alike(joint: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    save_prior(load_prior(joint), again)
    assert again.read_bytes() == (joint / "prior.safetensors").read_bytes()


def test_a_ratio_that_does_not_saturate_has_no_refiner(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path
) -> None:
    """Files and folders are then as they were before there were roles."""
    into(tmp_path / "alone", workshop, backbone, images, small())
    record = read_tensors(tmp_path / "alone" / "prior.safetensors", PRIOR_KEY, "a prior")[1]
    assert set(record) == {
        *("backbone", "ceiling", "energy", "format", "library", "record", "regime", "sampler", "target", "tau"),
    }
    assert "norm_limit" not in record["sampler"]
    assert not {"refuse", "gradient_clip", "choose_steps", "refine"} & set(record["record"]["config"])
    assert not {"roles", "steps"} & set(record["record"])
    assert "norm_limit" not in record["record"]["config"]["chain"]
    assert not (tmp_path / "alone" / REFINER).exists()
    assert "refine" not in json.loads((tmp_path / "alone" / "config.json").read_text())["config"]


@pytest.mark.parametrize("refine", [None, 0])
def test_a_ratio_that_saturates_has_one_unless_it_is_refused(
    workshop: Workshop,
    backbone: Backbone,
    images: ImageSource,
    tmp_path: Path,
    nearer: list[str],
    monkeypatch: pytest.MonkeyPatch,
    refine: int | None,
) -> None:
    monkeypatch.setattr("ebm_prior.training.courses.SATURATED_SHARE", 1.0)
    short = replace(fit_config.refiner_preset(), batch_size=2)
    monkeypatch.setattr(fit_config, "refiner_preset", lambda: short)
    said, out = Listener(), tmp_path / "run"
    into(out, workshop, backbone, images, replace(SATURATING, refine=refine), progress=said)
    prior = load_prior(out)
    since = prior.record["saturated"]["iteration"]
    moved = (prior.record["iterations"] - since) * 4 * 5  # half the batch of 8 draws, five leapfrogs each
    assert prior.sampling.regime == ("calibrated" if refine == 0 else "refiner")
    assert [text for text in said.remarks if "now a refiner" in text] == (
        [] if refine == 0 else [f"now a refiner, for nearer samples: {moved // 40} iterations (--refine 0: no refiner)"]
    )


def test_the_role_whose_samples_are_farther_does_not_sample(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, nearer: list[str]
) -> None:
    nearer[:] = ["calibrated"]
    into(tmp_path / "joint", workshop, backbone, images, TWO)
    prior = load_prior(tmp_path / "joint")
    assert prior.sampling is prior
    assert prior.record["roles"] == {"images": 12, "calibrated": 0.25, "refiner": 0.5}
    assert load_prior(tmp_path / "joint" / REFINER).regime == "refiner"
    card = workshop.run("info", tmp_path / "joint").stdout
    assert "a refiner's samples were no nearer (distance to 12 held-out reconstructions: refiner 0.5, " in card


@pytest.mark.parametrize(("where", "after"), [("fit", 3), ("refiner", 1), ("refiner", 3)])
def test_an_interrupted_run_of_two_fits_goes_on_as_if_nothing_had_been(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, joint: Path, where: str, after: int
) -> None:
    cut = tmp_path / "cut"

    def stop(shown: Any) -> None:
        if shown["iteration"] == after and (cut / REFINER).exists() == (where == "refiner"):
            raise Interrupted

    with pytest.raises(Interrupted):
        into(cut, workshop, backbone, images, TWO, progress=Listener(stop))
    assert (cut / "prior.safetensors").exists() == (where == "refiner")  # the calibrated one alone
    whole = (joint / "prior.safetensors").read_bytes()
    with pytest.raises(ConfigurationError, match="refine: 4 before, None now"):
        into(cut, workshop, backbone, images, small(), resume=True)
    assert into(cut, workshop, backbone, images, TWO, resume=True) == whole
    for part in ("", REFINER):
        assert metrics(cut / part) == metrics(joint / part)
    assert into(cut, workshop, backbone, images, TWO, resume=True) == whole
    assert into(cut, workshop, backbone, images, TWO, overwrite=True) == whole


def test_a_finished_fit_is_given_a_refiner_later(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, joint: Path
) -> None:
    into(tmp_path / "later", workshop, backbone, images, small())
    whole = (joint / "prior.safetensors").read_bytes()
    assert into(tmp_path / "later", workshop, backbone, images, TWO, resume=True) == whole
    with pytest.raises(ConfigurationError, match="refine: 4 before, None now"):  # it would lose the refiner
        into(tmp_path / "later", workshop, backbone, images, small(), resume=True)
    assert (tmp_path / "later" / "prior.safetensors").read_bytes() == whole


def test_a_refiner_that_diverges_costs_nothing_but_itself(
    workshop: Workshop, backbone: Backbone, images: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into(tmp_path / "alone", workshop, backbone, images, small())
    fitted = runs._fitted

    def broken(directory: Path, *rest: Any, **how: Any) -> tuple[EBMPrior, dict[str, Any]]:
        if directory.name == REFINER:
            raise DivergenceError("its chains left")
        return fitted(directory, *rest, **how)

    monkeypatch.setattr(runs, "_fitted", broken)
    said = Listener()
    into(tmp_path / "both", workshop, backbone, images, TWO, progress=said)
    assert "the prior has no refiner: its chains left" in said.remarks
    kept, alone = (load_prior(tmp_path / name) for name in ("both", "alone"))
    assert kept.refiner is None
    assert torch.equal(kept.sample(3).images, alone.sample(3).images)


def test_python_has_both_roles_too(
    workshop: Workshop, backbone: Backbone, images: ImageSource, joint: Path, tmp_path: Path
) -> None:
    prior = api.fit(backbone, images, TWO)
    prior.save(tmp_path / "prior.safetensors", checkpoint=workshop.backbone.resolve())
    assert (tmp_path / "prior.safetensors").read_bytes() == (joint / "prior.safetensors").read_bytes()


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
    roles = (
        "the refiner draws the samples (distance to 12 held-out reconstructions: refiner 0.25, calibrated 0.5); the "
        "calibrated f gives scores, gain and log Z\n"
    )
    assert roles in said
    card = workshop.run("info", run).stdout
    assert roles in card
    assert "sampler of the refiner: 20 steps of langevin at step size 0.01, anew where" in card
    assert "number of steps chosen by the distance to 12 held-out reconstructions: 20 steps 0.25, 40 steps" in card
    assert json.loads(workshop.run("info", run, "--json").stdout)["refiner"]["regime"] == "refiner"
    exported = workshop.run("export", run, "--out", tmp_path / "shared")
    assert "prior.safetensors" in exported.stdout
    assert "with a refiner that draws the samples" in (tmp_path / "shared" / "README.md").read_text()
    assert str(workshop.folder).encode() not in (tmp_path / "shared" / "prior.safetensors").read_bytes()
    assert load_prior(tmp_path / "shared", checkpoint=workshop.backbone).refiner is not None
    workshop.run("report", run)
    page = (run / "report.html").read_text()
    assert "--refine 2" in page
    assert "the refiner draws the samples" in page


def test_each_command_takes_the_role_that_it_needs(workshop: Workshop, joint: Path, tmp_path: Path) -> None:
    def kernel(*words: object) -> str:
        found = json.loads(workshop.run(*words, "--json").stdout)
        found = found[0] if isinstance(found, list) else found
        return str(found["sampler"]["kernel"])

    drawn = ("sample", joint, "-n", 3, "--overwrite", "--out", tmp_path / "a.npz")
    assert (kernel(*drawn), kernel(*drawn, "--calibrated")) == ("langevin", "pcn-langevin")
    measured = ("eval", joint, "--data", "mnist", "--data-root", workshop.data_root, "--no-auc")
    assert (kernel(*measured), kernel(*measured, "--calibrated")) == ("langevin", "pcn-langevin")
    told = [json.loads(workshop.run(*measured, *more, "--json").stdout)[0] for more in ((), ("--calibrated",))]
    assert [each["sampled_by"] for each in told] == ["refiner", "calibrated"]
    assert told[0]["gain_nats"] == told[1]["gain_nats"]
    scored = ("ood", joint, "--in", "mnist", "--outliers", "noise", "--data-root", workshop.data_root, "--samples", 20)
    assert kernel(*scored, "--draws", 1, "--out", tmp_path / "ood") == "pcn-langevin"
    workshop.run("show", joint, "transitions", "-n", 2, "--out", tmp_path / "t.png")
    workshop.run("show", joint, "energy", "-n", 2, "--steps", 4, "--out", tmp_path / "e.png")
    said = workshop.error("sample", joint / REFINER, "--calibrated", "--out", tmp_path / "b.npz")
    assert "--calibrated needs a calibrated prior, found a refiner" in said


def test_a_refiner_is_not_refined(workshop: Workshop, tmp_path: Path) -> None:
    words = ("fit", "--ckpt", workshop.backbone, "--data", workshop.images, "--out", tmp_path / "run")
    said = workshop.error(*words, "--preset", "refiner", "--refine", 2)
    assert "refine must be 0 with regime refiner: it adds a refiner to a calibrated prior, found 2" in said


def test_a_dry_run_tells_of_the_second_fit(workshop: Workshop, small_options: list[str]) -> None:
    words = ("fit", "--ckpt", workshop.backbone, "--data", workshop.images, *small_options, "--dry-run")
    assert "a refiner follows: 7 steps of " in workshop.run(*words, "--refine", 7).stdout
    assert "then also a refiner, which takes about as long again" in workshop.run(*words).stdout
    assert "refiner" not in workshop.run(*words, "--refine", 0).stdout


def test_heads_are_counted_by_role_whatever_groups_are_called(tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    names = {"heads.block/1.last.weight": 3, "joint.last.weight": 5, "refiner/heads.block/1.last.weight": 7}
    write_tensors(path, {name: torch.zeros(count) for name, count in names.items()}, PRIOR_KEY, {})
    assert head_parameters(path) == {"block/1": 3, "joint": 5, "refiner": 7}
