"""Runs and their images: remembered, found again after a move, and known by their pixels where a run goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from listener import Listener
from run_folders import Interrupted
from small_fits import OBJECTIVES, into
from workshop import Workshop

from ebm_prior.data.images import from_array, open_images
from ebm_prior.errors import CheckpointError, ConfigurationError, DataError
from ebm_prior.model.backbone import Backbone
from ebm_prior.runs.data import of_prior, remember, remembered
from ebm_prior.storage.checkpoint import prior_record

QUICK = ("--samples", 40, "--gauge-iterations", 1)


@pytest.fixture
def root(workshop: Workshop, tmp_path: Path) -> Path:
    """Named data sets in a place that nothing points to."""
    root = tmp_path / "disk" / "data"
    shutil.copytree(workshop.data_root, root)
    shutil.copy(root / "mnist.npz", root / "kmnist.npz")
    return root


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where somebody works, without a data root of theirs."""
    home = tmp_path / "disk" / "home"
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    monkeypatch.setenv("EBM_PRIOR_DATA", str(tmp_path / "nowhere"))
    return home


def test_the_data_root_is_typed_once(
    workshop: Workshop, small_options: list[str], root: Path, home: Path, tmp_path: Path
) -> None:
    """The block of README.md on `report`, as it stands there, after a fit that named its data root."""
    fit = ("fit", "--ckpt", workshop.backbone, "--data", "mnist", *small_options)
    workshop.run(*fit, "--data-root", root, "--out", "runs/mine")
    prior = "runs/mine/prior.safetensors"

    def measured() -> list[str]:
        shown = workshop.run("eval", prior, "--no-auc", *QUICK, "--json")
        assert "as runs/mine remembers them" in shown.stderr
        doctor = workshop.run("doctor", "--ckpt", workshop.backbone, *QUICK, "--json")
        scores = ("--outliers", "kmnist", "--samples", 20, "--draws", 1, "--resamples", 5, "--k", 0, "--json")
        ood = json.loads(workshop.run("ood", prior, *scores).stdout)
        workshop.run("show", prior, "reconstruction", "-n", 2)
        return [
            json.loads(shown.stdout)[0]["data"],
            json.loads(doctor.stdout)["data"],
            ood["in"],
            ood["sets"][0]["out"],
        ]

    assert measured() == ["mnist/test", "mnist/test", "mnist/test", "kmnist/test"]
    again = workshop.run("fit", "--ckpt", workshop.backbone, *small_options, "--out", "runs/again")
    assert "as runs/mine remembers them" in again.stderr
    assert Path("runs/again/prior.safetensors").read_bytes() == Path(prior).read_bytes()
    assert "report.html" in workshop.run("report", "runs/mine").stdout
    # With the root elsewhere, the folder that moved along with the run tells where; alone, it is told once more.
    shutil.move(home.parent, tmp_path / "other")
    (tmp_path / "other" / "home").rename(home.parent.parent / "other" / "house")
    os.chdir(tmp_path / "other" / "house")
    assert measured() == ["mnist/test", "mnist/test", "mnist/test", "kmnist/test"]
    shutil.move(tmp_path / "other" / "data", tmp_path / "away")
    assert "pass --data with the images, or --data-root" in workshop.error("eval", prior, "--no-auc", *QUICK)
    shown = workshop.run("eval", prior, "--no-auc", *QUICK, "--data-root", tmp_path / "away", "--json")
    assert json.loads(shown.stdout)[0]["held_out"] is True


def test_where_the_data_are_is_not_in_the_prior(
    workshop: Workshop, small_options: list[str], root: Path, tmp_path: Path
) -> None:
    priors = []
    for place in (workshop.data_root, root):
        out = tmp_path / place.parent.name / "run"
        workshop.run("fit", "--ckpt", workshop.backbone, "--data-root", place, "--out", out, *small_options)
        priors.append((out / "prior.safetensors").read_bytes())
        found = remembered(out)
        assert found is not None
        assert (found.origin.spec, found.origin.root) == ("mnist", str(place))
    assert priors[0] == priors[1]


def test_images_by_path_are_found_with_their_splits(workshop: Workshop, small_options: list[str], home: Path) -> None:
    shutil.copy(workshop.data_root / "mnist.npz", home / "mine.npz")
    workshop.run("fit", "--ckpt", workshop.backbone, "--data", "mine.npz", "--out", "runs/a", *small_options)
    shown = workshop.run("eval", "runs/a/prior.safetensors", "--no-auc", *QUICK, "--json")
    (result,) = json.loads(shown.stdout)
    assert "mine.npz" in result["data"]
    assert result["held_out"] is True


def test_training_images_do_not_stand_for_held_out_ones(workshop: Workshop, fitted: Path) -> None:
    prior = fitted / "prior.safetensors"
    assert "pass --data with other images" in workshop.error("eval", prior, *QUICK)
    assert "pass --in with other images" in workshop.error("ood", prior, "--outliers", "noise")
    shown = workshop.run("doctor", "--ckpt", workshop.backbone, "--data", workshop.images, *QUICK, "--json")
    assert json.loads(shown.stdout)["images"] == 40


@pytest.mark.parametrize("objective", ["nce"])
def test_a_run_goes_on_with_a_copy_of_its_images(
    objective: str, workshop: Workshop, backbone: Backbone, tmp_path: Path
) -> None:
    """What images are called, and where they lie, is no matter: their pixels are."""
    config, copied = OBJECTIVES[objective], tmp_path / "copy.npy"
    shutil.copy(workshop.images, copied)

    def stop(shown: object) -> None:
        if shown["iteration"] == 4:  # type: ignore[index]
            raise Interrupted

    whole = into(tmp_path / "whole", workshop, backbone, open_images(workshop.images), config)
    with pytest.raises(Interrupted):
        into(tmp_path / "cut", workshop, backbone, open_images(workshop.images), config, progress=Listener(stop))
    images = open_images(copied)
    assert into(tmp_path / "cut", workshop, backbone, images, config, resume=True) == whole
    assert images.name == str(copied)  # the caller's own is as it was
    found = remembered(tmp_path / "cut")
    assert found is not None
    assert found.origin.spec == str(copied)
    np.save(copied, np.load(copied) ^ 1)
    with pytest.raises(ConfigurationError, match="images: '") as caught:
        into(tmp_path / "cut", workshop, backbone, open_images(copied), config, resume=True)
    assert "copy.npy" in str(caught.value)  # then the name tells which ones


def test_a_memory_of_other_images_is_not_the_priors(workshop: Workshop, fitted: Path, tmp_path: Path) -> None:
    for name in ("prior.safetensors", "data.json"):
        shutil.copy(fitted / name, tmp_path)
    prior = tmp_path / "prior.safetensors"
    found = of_prior(prior)
    assert found is not None
    assert found.fingerprint == prior_record(prior)["record"]["data"]["fingerprint"]
    assert len(found.open("train")) == 120
    other = open_images(workshop.data_root / "mnist.npz", split="test")
    remember(tmp_path, other, other.fingerprint())
    assert of_prior(prior) is None
    memory = from_array(np.zeros((3, 8, 8), np.uint8))
    remember(tmp_path, memory, memory.fingerprint())
    assert remembered(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"images": 3, "origin": {}}', '{"images": "a", "origin": {}}'])
def test_a_damaged_memory_is_an_error_with_advice(content: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"data\.json does not say .*pass --data"):
        remembered(tmp_path)


def test_images_that_are_gone_are_named(workshop: Workshop, tmp_path: Path) -> None:
    path = tmp_path / "gone.npy"
    shutil.copy(workshop.images, path)
    source = open_images(path)
    remember(tmp_path, source, source.fingerprint())
    path.unlink()
    found = remembered(tmp_path)
    assert found is not None
    with pytest.raises(DataError, match=r"gone\.npy: expected the recorded images"):
        found.open("train")
