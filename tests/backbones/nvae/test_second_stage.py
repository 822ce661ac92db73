"""A prior on an official NVAE, by the shortest commands: `fit --backbone nvae --ckpt FILE`, then `sample`."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from run_folders import Interrupted
from tiny_nvae import tiny, tiny_args, trained, weights, write
from workshop import Workshop

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.model.batch_norm import readjust_batch_norm
from ebm_prior.runs import fit
from ebm_prior.storage.checkpoint import backbone_record, load_backbone, load_prior, prior_record, save_backbone
from ebm_prior.storage.weights import fingerprint

# The data set that the file names.


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which "cifar10" has few and random images."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    splits = {split: random.integers(0, 256, (40, 32, 32, 3), np.uint8) for split in ("x_train", "x_test")}
    np.savez(root / "cifar10.npz", **splits)
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
    assert "images: cifar10, which its record names" in shown
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


# Batch norms re-adjusted to the backbone's own samples.


@pytest.fixture
def readjusting(
    official: Path, data_root: Path, small_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """The words of a small second stage with --bn-readjust, which takes 3 batches here."""
    monkeypatch.setattr(fit, "ITERATIONS", 3)
    plain = ["fit", "--backbone", "nvae", "--ckpt", official, "--data-root", data_root, *small_options]
    return [*plain, "--sampler-steps", 1, "--bn-readjust", "--seed", 1, "--out"]


def test_the_prior_is_that_of_the_readjusted_backbone(
    workshop: Workshop, official: Path, readjusting: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = tmp_path / "run", {"iterations": 3, "batch_size": 16, "temperature": 1.0, "seed": 1}
    assert "re-adjusting batch norms to 3 batches of 16 samples" in workshop.run(*readjusting, run).stderr
    expected = load_backbone("nvae", official)
    before = fingerprint(expected)
    readjust_batch_norm(expected, **settings)
    own = run / "backbone.safetensors"
    assert fingerprint(load_backbone(None, own)) == fingerprint(expected) != before
    record = backbone_record(own)["record"]
    assert record["bn_readjust"] == settings
    assert (record["source"], record["data"]) == ("checkpoint.pt", {"name": "cifar10/train"})

    prior = prior_record(run / "prior.safetensors")
    assert prior["backbone"]["fingerprint"] == fingerprint(expected)
    assert prior["record"]["bn_readjust"] == settings
    shown = workshop.run("info", run / "prior.safetensors").stdout
    assert "re-adjusted: 3 batches of 16 samples at temperature 1, seed 1" in shown

    moved = run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    save_backbone(tiny(), tmp_path / own.name)  # another one of this name, where the command is given
    workshop.run("sample", moved / "prior.safetensors", "-n", 2)


def test_equal_seeds_give_equal_bytes_of_backbone_and_prior(
    workshop: Workshop, readjusting: list[object], tmp_path: Path
) -> None:
    """Also with a refiner, which is fitted on the re-adjusted backbone."""
    a, b, c = (tmp_path / name for name in "abc")
    workshop.run(*readjusting, a, "--refine", 2)
    workshop.run(*readjusting, b, "--refine", 2)
    workshop.run(*readjusting, c, "--seed", 2)
    assert load_prior(a / "refiner").record["iterations"] == 2
    for name in ("backbone.safetensors", "prior.safetensors"):
        whole = (a / name).read_bytes()
        assert (b / name).read_bytes() == whole
        assert (c / name).read_bytes() != whole


def test_a_resumed_run_keeps_its_readjusted_backbone(
    workshop: Workshop, readjusting: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    workshop.run(*readjusting, whole)
    workshop.run(*readjusting, cut, "--seed", 2)  # an earlier run, of whose backbone nothing may be left

    def interrupt(*_: object, **__: object) -> None:
        raise Interrupted

    # Before there is a backbone, and after.
    for place, how in (("runs.backbones.readjust_batch_norm", "--overwrite"), ("runs.fit.fit", "--resume")):
        with monkeypatch.context() as patch:
            patch.setattr(f"ebm_prior.{place}", interrupt)
            with pytest.raises(Interrupted):
                workshop.run(*readjusting, cut, how)
    with monkeypatch.context() as patch:
        patch.setattr("ebm_prior.runs.backbones.readjust_batch_norm", interrupt)  # not again
        workshop.run(*readjusting, cut, "--resume")
    for name in ("backbone.safetensors", "prior.safetensors", "metrics.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    plain = [word for word in readjusting if word != "--bn-readjust"]
    assert "bn_readjust.iterations: 3 before, None now" in workshop.error(*plain, cut, "--resume")


def test_what_cannot_be_readjusted_is_refused_before_the_run(
    workshop: Workshop, fit_words: list[object], readjusting: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert "ToyConv has no batch norm" in workshop.error(*fit_words, "--bn-readjust", "--out", run)
    assert not run.exists()
    workshop.run(*readjusting, run)
    own = run / "backbone.safetensors"
    before = own.read_bytes()
    plain = [word for word in readjusting if word != "--backbone" and word != "nvae"]
    assert "choose another --out" in workshop.error(*plain, run, "--ckpt", own, "--overwrite")
    assert own.read_bytes() == before


# The bundled prior.


def test_chains_of_the_bundled_prior_climb_from_the_backbones() -> None:
    """Its f rises by tens of nats from draws of p_β to short chains, at the step size that it records."""
    path = Path(str(resources.files("ebm_prior.checkpoints"))) / "nvae_cifar10_prior.safetensors"
    assert prior_record(path)["backbone"]["checkpoint"] == "nvae_cifar10"
    prior = load_prior(path)
    assert prior.record["stages"]
    assert prior.sampler.leapfrogs == 5
    assert prior.energy.config.bound == 3
    assert 50 < prior.ceiling < 150  # nats: the 99th percentile of posterior latents
    drawn = prior.sample(8, seed=0, sampler=replace(prior.sampler, steps=4))
    assert drawn.acceptance.mean() > 0.5
    f_drawn, f_backbone = (
        prior.f(z).mean() for z in (drawn.z, prior.backbone.sample(8, generator=derived_generator(0)))
    )
    assert f_drawn > f_backbone + 20  # nats
