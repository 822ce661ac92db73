"""Commands and the images they are given: which are refused, which are the default, which are held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from workshop import Workshop

from ebm_prior.evaluation.classifier import FeatureClassifier, save_classifier
from ebm_prior.storage.checkpoint import (
    backbone_record,
    load_backbone,
    load_prior,
    prior_record,
    save_backbone,
    save_prior,
)


def test_images_with_nan_are_refused_by_name(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((30, 8, 8)).astype(np.float32)
    images[7, 3, 3] = np.nan
    np.save(tmp_path / "spoiled.npy", images)
    error = workshop.error(*fit_words, "--out", tmp_path / "run", "--data", tmp_path / "spoiled.npy")
    assert "spoiled.npy" in error
    assert "NaN or infinite values in image 7" in error
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.load(workshop.images)
    for index in range(40):
        Image.fromarray(pixels[index]).save(folder / f"{index:02d}.png")
    workshop.run(*fit_words, "--out", tmp_path / "run", "--data", folder)
    assert prior_record(tmp_path / "run" / "prior.safetensors")["record"]["data"]["training"] == 36
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(folder / "zz.png")
    error = workshop.error(*fit_words, "--out", tmp_path / "other", "--data", folder)
    assert "zz.png: expected images of shape (1, 8, 8)" in error
    assert "found (1, 9, 8)" in error


def test_images_of_another_size(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    for name, shape in (("large", (20, 16, 16)), ("colour", (20, 8, 8, 3))):
        np.save(tmp_path / f"{name}.npy", np.zeros(shape, np.uint8))
        error = workshop.error(*fit_words, "--out", tmp_path / "run", "--data", tmp_path / f"{name}.npy")
        assert "expected images of shape (1, 8, 8)" in error


def test_the_data_set_is_by_default_the_backbones(
    workshop: Workshop, small_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ("fit", "--ckpt", workshop.backbone, *small_options)
    workshop.run(*plain, "--out", tmp_path / "run", "--data-root", workshop.data_root)
    assert prior_record(tmp_path / "run" / "prior.safetensors")["record"]["data"]["name"] == "mnist/train"
    monkeypatch.setenv("EBM_PRIOR_DATA", str(workshop.data_root))
    workshop.run(*plain, "--out", tmp_path / "again")
    silent = ("fit", "--ckpt", workshop.folder / "linear.safetensors", "--out", tmp_path / "other")
    assert "pass --data" in workshop.error(*silent)


def test_a_path_in_a_record_is_no_default(workshop: Workshop, small_options: list[str], tmp_path: Path) -> None:
    """It may hold no other split, be elsewhere by now, or (as a relative path) be something else here."""
    path = tmp_path / "b.safetensors"
    for name in (str(workshop.images), "images.npz:x_train", "folder/train", "mnist", None):
        save_backbone(load_backbone(None, workshop.backbone), path, record={"data": {"name": name}} if name else {})
        error = workshop.error("fit", "--ckpt", path, "--out", tmp_path / "run", *small_options)
        assert "pass --data with" in error
        assert "a folder of images" in error
        assert name is None or f"was trained on {name}, a path or" in error


# Held out or not.


@pytest.fixture(scope="module")
def judge(workshop: Workshop) -> Path:
    """A feature classifier for the toy's images."""
    path = workshop.folder / "judge.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_classifier(FeatureClassifier((1, 8, 8), 4, width=4), path)
    return path


def test_training_images_are_not_called_held_out(workshop: Workshop, prior: Path, judge: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.npy"
    copy.write_bytes(workshop.images.read_bytes())
    root = ("--data-root", workshop.data_root)
    for data, held_out in (
        ([workshop.images], False),
        ([copy], False),  # the same images under another name
        ([workshop.data_root / "mnist.npz", *root], True),  # fitted to an .npy of the same training images
        (["mnist", *root], True),
    ):
        words = ("eval", prior, "--data", *data, "--classifier", judge, "--no-auc", "--samples", 30)
        (result,) = json.loads(workshop.run(*words, "--json").stdout)
        assert result["held_out"] is held_out, data
        text = workshop.run(*words).stdout
        assert ("NOT held out: these are the images the prior was trained on" in text) is not held_out
        assert ("held-out gain" in text) is held_out
        f = {name: result[f"f_{name}"] for name in ("posterior", "backbone", "prior")}
        assert "mean f (nats, larger is more probable): posterior {posterior:.2f}, backbone".format(**f) in text
        assert "backbone prior {backbone:.2f}, energy-based prior {prior:.2f}".format(**f) in text
    other = tmp_path / "other.npy"
    np.save(other, np.load(workshop.images)[::-1] // 2)
    words = ("eval", prior, "--data", other, "--classifier", judge, "--no-auc", "--samples", 30, "--json")
    (result,) = json.loads(workshop.run(*words).stdout)
    assert result["held_out"] is True  # no splits, but other images


def test_a_prior_of_the_test_split_is_not_held_out_there(
    workshop: Workshop, fitted: Path, judge: Path, tmp_path: Path
) -> None:
    """A prior written by other means knows its data by name alone."""
    prior = load_prior(fitted / "prior.safetensors")
    root = ("--data-root", workshop.data_root)
    for name, held_out in (("mnist/test", False), ("mnist/train", True)):
        prior.record["data"] = {"name": name}
        save_prior(prior, tmp_path / "p.safetensors", checkpoint=str(workshop.backbone))
        words = ("eval", tmp_path / "p.safetensors", "--data", "mnist", *root, "--classifier", judge)
        (result,) = json.loads(workshop.run(*words, "--no-auc", "--samples", 30, "--json").stdout)
        assert result["held_out"] is held_out


def test_pretrain_measures_no_test_elbo_on_training_images(workshop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("pretrain", "--backbone", "toy", "--data", workshop.images, "--iterations", 2, "--batch-size", 8)
    assert json.loads(workshop.run(*words, "--out", out, "--json").stdout)["test_elbo"] is None
    assert backbone_record(out / "backbone.safetensors")["record"]["test_elbo"] is None
    assert "elbo" not in json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert "no test ELBO: the data have no test split" in workshop.run(*words, "--out", tmp_path / "b").stdout
