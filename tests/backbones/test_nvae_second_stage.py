"""A prior on an official NVAE, by the shortest commands: `fit --backbone nvae --ckpt FILE`, then `sample`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Workshop
from ebm_prior.backbones.nvae import NVAE
from tiny_nvae import FIXTURES, REFERENCES, needs_fixtures, tiny, tiny_args, trained, weights, write

from ebm_prior.checkpoint import backbone_record, prior_record

# The data set that the file names.


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which "cifar10" and "mnist" have few and random images."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, shape in (("cifar10", (32, 32, 3)), ("mnist", (28, 28))):
        splits = {split: random.integers(0, 256, (40, *shape), np.uint8) for split in ("x_train", "x_test")}
        np.savez(root / f"{name}.npz", **splits)
    return root


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official file that says it was trained on CIFAR-10."""
    model = trained(tiny(image_shape=[3, 32, 32], groups_per_scale=[1, 1]))
    args = tiny_args(dataset="cifar10", num_groups_per_scale=1)
    return write(tmp_path_factory.mktemp("official"), args=args, state=weights(model))


def data_of(run: Path) -> str:
    return str(prior_record(run / "prior.safetensors")["record"]["data"]["name"])


def test_the_data_set_is_the_one_that_the_official_file_names(
    workshop: Workshop,
    official: Path,
    data_root: Path,
    small_options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EBM_PRIOR_DATA", str(data_root))
    words = ("fit", *small_options, "--sampler-steps", 1, "--ckpt")
    shown = workshop.run(*words, official, "--backbone", "nvae", "--out", tmp_path / "run").stderr
    assert f"images: cifar10, which {official} was trained on" in shown
    assert data_of(tmp_path / "run") == "cifar10/train"
    own = tmp_path / "own.safetensors"
    workshop.run("convert", "--backbone", "nvae", "--ckpt", official, "--out", own)
    assert backbone_record(own)["record"]["data"] == {"name": "cifar10/train"}
    workshop.run(*words, own, "--out", tmp_path / "again")
    assert data_of(tmp_path / "again") == "cifar10/train"


def test_a_data_set_that_is_not_here_or_not_known_is_named_with_what_to_pass(
    workshop: Workshop, official: Path, tmp_path: Path
) -> None:
    words = ("fit", "--backbone", "nvae", "--out", tmp_path / "run", "--ckpt")
    error = workshop.error(*words, official, "--data-root", tmp_path)
    assert "cifar10: the train split is not in" in error
    for way_out in ("--data-root DIR", "--download", "other images as --data"):
        assert way_out in error
    elsewhere, own = write(tmp_path), tmp_path / "own.safetensors"  # of imagenet_8
    workshop.run("convert", "--backbone", "nvae", "--ckpt", elsewhere, "--out", own)
    for checkpoint in (elsewhere, own):
        error = workshop.error(*words, checkpoint)
        assert f"{checkpoint} was trained on imagenet_8" in error
        assert "pass --data with a folder of images" in error
    assert not (tmp_path / "run").exists()


@needs_fixtures
@pytest.mark.parametrize("name", REFERENCES)
def test_fit_and_sample_on_official_models(
    workshop: Workshop, data_root: Path, small_options: list[str], tmp_path: Path, name: str
) -> None:
    checkpoint = FIXTURES / name / "checkpoint.pt"
    channels, side, _ = NVAE.load_official(checkpoint).image_shape
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, side, side, channels), np.uint8))
    data = ["--data-root", data_root] if name in ("mnist", "cifar10-logistic") else ["--data", tmp_path / "images.npy"]
    quick = ("--iterations", 2, "--sampler-steps", 1)
    run = tmp_path / "run"
    workshop.run("fit", "--backbone", "nvae", "--ckpt", checkpoint, *data, *small_options, *quick, "--out", run)
    workshop.run("sample", run / "prior.safetensors", "-n", 2, "--out", run / "drawn.npz")
    with np.load(run / "drawn.npz") as drawn:
        assert drawn["images"].shape == (2, side, side, channels)
