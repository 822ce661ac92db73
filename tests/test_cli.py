"""The command line's promises: exit codes, one line per error, JSON, nothing overwritten, and files that say enough."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop
from PIL import Image

from ebm_prior import cli, demo
from ebm_prior.checkpoint import backbone_record, load_backbone, load_prior, prior_record, save_prior
from ebm_prior.classifier import FeatureClassifier, save_classifier
from ebm_prior.commands import new_backbone
from ebm_prior.data import open_images
from ebm_prior.energy import JointEnergy
from ebm_prior.weights import fingerprint


def content(path: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def prior(fitted: Path) -> Path:
    return fitted / "prior.safetensors"


@pytest.fixture
def fit(workshop: Workshop, small_options: list[str]) -> list[object]:
    return ["fit", "--ckpt", workshop.backbone, "--data", workshop.images, *small_options]


# Exit codes and streams.


@pytest.mark.filterwarnings("error")
def test_done_is_0_and_usage_is_2(workshop: Workshop) -> None:
    assert "Usage" in workshop.run("--help").stdout
    for name in cli.main.commands:
        assert "--help" in workshop.run(name, "--help").stdout
    for wrong in (["fly"], ["fit"], ["sample", "x"], ["info"], ["info", "x", "--ckpt", "y"], ["pretrain"]):
        result = workshop.run(*wrong, code=2)
        assert result.stdout == ""
        assert "Usage" in result.stderr
    assert "--out" in workshop.run("sample", "x", code=2).stderr
    workshop.run("sample", "x", "--out", "y.png", "-n", 0, code=2)
    workshop.run("sample", "x", "--out", "y.png", "--kernel", "magic", code=2)


def test_the_module_is_the_command(workshop: Workshop) -> None:
    process = workshop.popen("-m", "ebm_prior", "info", "nowhere")
    stderr = process.communicate()[1].decode()
    assert process.returncode == 1
    assert stderr == "ebm-prior: error: expected an ebm-prior file at nowhere, found nothing there\n"


def test_errors_are_one_line_on_stderr(workshop: Workshop, fit: list[object], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    for words, message in (
        ([*fit, *out, "--ckpt", "nonesuch"], "no backbone at nonesuch"),
        ([*fit, *out, "--backbone", "linear"], "use --backbone toy"),
        ([*fit, *out, "--data", "nonesuch"], "nonesuch: no such file or folder, nor the name of a data set"),
        ([*fit, *out, "--iterations", -3], "iterations must be positive, found -3"),
        ([*fit, *out, "--device", "quantum"], "--device quantum cannot be used here"),
        ([*fit, "--resume"], "--resume needs --out"),
        (["info", "--ckpt", workshop.images], "--backbone NAME"),
        (["info", workshop.images], "damaged or not a safetensors file"),
    ):
        assert message in workshop.error(*words)
    assert not (tmp_path / "run").exists()


def test_results_and_progress_do_not_mix(workshop: Workshop, fit: list[object], tmp_path: Path) -> None:
    result = workshop.run(*fit, "--out", tmp_path / "run", "--json")
    assert "fit:" in result.stderr
    assert len(result.stdout.splitlines()) == 1
    json.loads(result.stdout)


# JSON.


def test_fit_reports(workshop: Workshop, fit: list[object], tmp_path: Path) -> None:
    shown = json.loads(workshop.run(*fit, "--out", tmp_path / "run", "--json").stdout)
    assert shown["prior"] == str(tmp_path / "run" / "prior.safetensors")
    assert Path(shown["picture"]).is_file()
    heads = JointEnergy(load_backbone(None, workshop.backbone).groups, load_prior(shown["prior"]).energy.config)
    assert shown["parameters"]["heads"] == sum(p.numel() for p in heads.parameters())
    assert shown["sampler"]["proposals"] == 2
    assert {"gain", "nats", "tau"} & set(shown["held_out"]["tempered"])
    text = workshop.run(*fit, "--out", tmp_path / "other").stdout
    assert f"{shown['held_out']['tempered']['nats']:+.3f}" in text
    assert f"ebm-prior sample {tmp_path / 'other' / 'prior.safetensors'}" in text
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"config.json", "metrics.jsonl", "state.pt"}


def test_sample_reports(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    shown = json.loads(
        workshop.run("sample", prior, "-n", 5, "--seed", 3, "--out", tmp_path / "a.png", "--json").stdout
    )
    assert (shown["samples"], shown["seed"], shown["files"]) == (5, 3, [str(tmp_path / "a.png")])
    assert shown["sampler"]["proposals"] == 2  # as recorded
    assert 0.5 < shown["norm"] < 1.5
    assert 0.5 <= shown["ess_fraction"] <= 1


def test_info_tells_both_parameter_counts(workshop: Workshop, prior: Path) -> None:
    record = json.loads(workshop.run("info", prior, "--json").stdout)
    loaded = load_prior(prior)
    backbone, heads = (sum(p.numel() for p in m.parameters()) for m in (loaded.backbone, loaded.energy))
    assert record["backbone"]["parameters"] == backbone
    assert sum(record["heads"].values()) == heads
    assert set(record["heads"]) == {"dense", "point", "conv", "joint"}
    text = workshop.run("info", prior).stdout
    assert f"backbone {backbone:,}, heads {heads:,}" in text
    described = json.loads(workshop.run("info", "--ckpt", workshop.backbone, "--json").stdout)
    assert described["parameters"]["backbone"] == backbone
    assert described["groups"] == [["dense", [4]], ["point", [2, 1, 1]], ["conv", [3, 4, 4]]]
    assert described["fingerprint"] == record["backbone"]["fingerprint"]
    text = workshop.run("info", "--ckpt", workshop.backbone).stdout
    assert f"backbone {backbone:,}, default heads {described['parameters']['heads']:,}" in text


def test_backbones_lists_adapters_and_says_which_are_broken(workshop: Workshop) -> None:
    listed = json.loads(workshop.run("backbones", "--json").stdout)
    rows = {row["adapter"]: row for row in listed["adapters"]}
    assert rows["toy"]["class"] == "toys:ToyConv"
    assert "toys_nowhere" in rows["broken"]["error"]
    text = workshop.run("backbones").stdout
    assert "hvae" in text
    assert "cannot be imported" in text


# Nothing is overwritten unasked, nothing is lost.


def test_fit_does_not_overwrite(workshop: Workshop, fit: list[object], tmp_path: Path) -> None:
    out = tmp_path / "run"
    workshop.run(*fit, "--out", out)
    before = content(out)
    message = workshop.error(*fit, "--out", out, "--seed", 1)
    assert "--resume" in message
    assert "--overwrite" in message
    assert content(out) == before
    workshop.run(*fit, "--out", out, "--seed", 1, "--overwrite")
    assert prior_record(out / "prior.safetensors")["record"]["config"]["seed"] == 1


def test_sample_and_convert_do_not_overwrite(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    for command, name in (
        (["sample", prior, "-n", 2], "a.png"),
        (["sample", prior, "-n", 2], "a.npz"),
        (["sample", prior, "-n", 2], "folder"),
        (["convert", "--ckpt", workshop.backbone], "b.safetensors"),
    ):
        out = tmp_path / name
        out.write_bytes(b"precious")
        assert "pass --overwrite" in workshop.error(*command, "--out", out)
        assert out.read_bytes() == b"precious"
        if name != "folder":
            workshop.run(*command, "--out", out, "--overwrite")
            assert out.read_bytes() != b"precious"


def test_an_overwritten_folder_of_samples_holds_the_new_ones_alone(
    workshop: Workshop, prior: Path, tmp_path: Path
) -> None:
    out = tmp_path / "samples"
    workshop.run("sample", prior, "-n", 12, "--out", out)
    workshop.run("sample", prior, "-n", 3, "--out", out, "--overwrite")
    assert {p.name for p in out.iterdir()} == {"0.png", "1.png", "2.png"}
    (out / "notes.txt").write_text("mine")
    before = content(out)
    assert "holds other files than samples" in workshop.error("sample", prior, "-n", 2, "--out", out, "--overwrite")
    assert content(out) == before


def test_resume_and_overwrite_contradict_each_other(workshop: Workshop, fit: list[object], tmp_path: Path) -> None:
    for command in (fit, ["pretrain", "--backbone", "toy", "--data", workshop.images]):
        result = workshop.run(*command, "--out", tmp_path / "run", "--resume", "--overwrite", code=2)
        assert "give one of them" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_without_the_right_to_write_is_found_before_the_work(
    workshop: Workshop, prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, and tests run as root: so the question is answered for it."""
    forbidden, asked = tmp_path / "forbidden", os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != forbidden and asked(path, mode))
    monkeypatch.setattr("ebm_prior.prior.EBMPrior.chunks", lambda *_, **__: pytest.fail("began to work"))
    for name in ("a.png", "a.npz", "folder"):
        error = workshop.error("sample", prior, "--out", forbidden / name)
        assert f"cannot write {forbidden / name}: Permission denied" in error
    assert "Permission denied" in workshop.error("demo", "--out", forbidden / "demo")


@pytest.mark.parametrize("name", ["a.png", "a.npz", "folder", "run"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    workshop: Workshop, fit: list[object], prior: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    command = fit if name == "run" else ["sample", prior]

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("began to work")

    monkeypatch.setattr("ebm_prior.prior.EBMPrior.chunks", work)
    monkeypatch.setattr("ebm_prior.commands.fit", work)
    assert "cannot write" in workshop.error(*command, "--out", tmp_path / "file" / "below" / name)
    assert (tmp_path / "file").read_text() == "x"


def test_a_disk_that_is_full_leaves_the_earlier_files(
    workshop: Workshop, fit: list[object], prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, grid, arrays = tmp_path / "run", tmp_path / "a.png", tmp_path / "a.npz"
    workshop.run(*fit, "--out", run)
    for out in (grid, arrays):
        workshop.run("sample", prior, "-n", 2, "--out", out)
    results, before = (run / "prior.safetensors").read_bytes(), (grid.read_bytes(), arrays.read_bytes())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for out in (grid, arrays):
        error = workshop.error("sample", prior, "-n", 3, "--out", out, "--overwrite")
        assert f"cannot write {out}: No space left on device" in error
    assert "No space left" in workshop.error(*fit, "--out", run, "--overwrite")
    assert (grid.read_bytes(), arrays.read_bytes()) == before
    assert (run / "prior.safetensors").read_bytes() == results


# Images.


def test_images_with_nan_are_refused_by_name(workshop: Workshop, fit: list[object], tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((30, 8, 8)).astype(np.float32)
    images[7, 3, 3] = np.nan
    np.save(tmp_path / "spoiled.npy", images)
    error = workshop.error(*fit, "--out", tmp_path / "run", "--data", tmp_path / "spoiled.npy")
    assert "spoiled.npy" in error
    assert "NaN or infinite values in image 7" in error
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images(workshop: Workshop, fit: list[object], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.load(workshop.images)
    for index in range(40):
        Image.fromarray(pixels[index]).save(folder / f"{index:02d}.png")
    workshop.run(*fit, "--out", tmp_path / "run", "--data", folder)
    assert prior_record(tmp_path / "run" / "prior.safetensors")["record"]["data"]["training"] == 36
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(folder / "zz.png")
    error = workshop.error(*fit, "--out", tmp_path / "other", "--data", folder)
    assert "zz.png: expected images of shape (1, 8, 8)" in error
    assert "found (1, 9, 8)" in error


def test_images_of_another_size(workshop: Workshop, fit: list[object], tmp_path: Path) -> None:
    for name, shape in (("large", (20, 16, 16)), ("colour", (20, 8, 8, 3))):
        np.save(tmp_path / f"{name}.npy", np.zeros(shape, np.uint8))
        error = workshop.error(*fit, "--out", tmp_path / "run", "--data", tmp_path / f"{name}.npy")
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
    from ebm_prior.checkpoint import save_backbone

    path = tmp_path / "b.safetensors"
    for name in (str(workshop.images), "images.npz:x_train", "folder/train", "mnist", None):
        save_backbone(load_backbone(None, workshop.backbone), path, record={"data": {"name": name}} if name else {})
        error = workshop.error("fit", "--ckpt", path, "--out", tmp_path / "run", *small_options)
        assert "pass --data" in error


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


# Architectures.


def test_an_architecture_is_a_file_or_that_of_a_bundled_backbone(workshop: Workshop, tmp_path: Path) -> None:
    own = backbone_record("hvae_fashion_mnist")["architecture"]
    (tmp_path / "a.json").write_text(json.dumps(own))
    for architecture in ("hvae_fashion_mnist", str(tmp_path / "a.json")):
        assert json.loads(json.dumps(new_backbone("hvae", architecture, 0).architecture)) == own
    words = ("pretrain", "--data", workshop.images, "--out", tmp_path / "run", "--backbone")
    error = workshop.error(*words, "hvae")
    assert "Pass --architecture with a JSON file" in error
    assert "hvae_fashion_mnist" in error
    assert "use --backbone hvae" in workshop.error(*words, "toy", "--architecture", "hvae_fashion_mnist")
    assert "nor is it bundled" in workshop.error(*words, "hvae", "--architecture", "nonesuch")


# The demo.


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo in seconds: everything is done, too little of it to gain anything."""
    config, measured = replace(demo.demo_config(), iterations=1, held_out=50), demo.demo_eval_config(20)
    monkeypatch.setattr(demo, "demo_config", lambda: config)
    monkeypatch.setattr(demo, "demo_eval_config", lambda samples: replace(measured, auc=False))


@pytest.mark.usefixtures("short_demo")
def test_the_demo_writes_what_it_says_and_may_be_repeated(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    text = workshop.run("demo", "--out", out).stdout
    names = {"prior.safetensors", "before-after.png", "result.json"}
    assert {p.name for p in out.iterdir()} == names
    assert all(str(out / name) in text for name in names)
    assert "mean f (nats" in text
    assert "NOT held out" not in text
    shown = json.loads((out / "result.json").read_text())
    assert (shown["command"], shown["samples"], shown["held_out"]) == ("demo", 20, True)
    monkeypatch.setattr(demo, "fit", lambda *_, **__: pytest.fail("began to work"))
    with pytest.raises(pytest.fail.Exception, match="began to work"):
        workshop.run("demo", "--out", out)


def test_the_demo_overwrites_nothing_else(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "fit", lambda *_, **__: pytest.fail("began to work"))
    out, file = tmp_path / "mine", tmp_path / "file"
    out.mkdir()
    file.write_text("x")
    for name, text in (("prior.safetensors", "precious"), ("result.json", '{"command": "eval"}'), ("result.json", "[")):
        (out / name).write_text(text)
        before = content(out)
        assert "--overwrite" in workshop.error("demo", "--out", out)
        assert content(out) == before
        (out / name).unlink()
    assert "is a file" in workshop.error("demo", "--out", file, "--overwrite")
    assert "cannot write" in workshop.error("demo", "--out", file / "below")
    (out / "prior.safetensors").write_text("precious")
    with pytest.raises(pytest.fail.Exception, match="began to work"):
        workshop.run("demo", "--out", out, "--overwrite")
    (out / "prior.safetensors").unlink()
    with pytest.raises(pytest.fail.Exception, match="began to work"):
        workshop.run("demo", "--out", out)  # empty


@pytest.mark.long
def test_the_demo_shows_a_gain(workshop: Workshop, tmp_path: Path) -> None:
    """What the README promises of its first command, on real images: by every measure the prior is better."""
    result = json.loads(workshop.run("demo", "--out", tmp_path / "demo", "--json").stdout)
    assert result["gain_nats"] > 0
    assert result["gap_closed"] > 0
    assert result["gap_closed_rec"] > 0
    assert result["kid_prior"] < result["kid_backbone"]
    assert result["f_posterior"] > result["f_backbone"]
    assert result["f_prior"] > result["f_backbone"]
    assert result["auc_after"] < result["auc_before"]


# Settings.


def test_a_file_of_settings(workshop: Workshop, fit: list[object], tmp_path: Path) -> None:
    plain = ["fit", "--ckpt", workshop.backbone, "--data", workshop.images]
    workshop.run(*fit, "--out", tmp_path / "a", "--seed", 7)
    again = ("--config", tmp_path / "a" / "config.json")
    workshop.run(*plain, *again, "--out", tmp_path / "b")  # all of it from there, the seed too
    assert (tmp_path / "b" / "prior.safetensors").read_bytes() == (tmp_path / "a" / "prior.safetensors").read_bytes()
    workshop.run(*plain, *again, "--out", tmp_path / "c", "--seed", 8, "--iterations", 2)
    config = prior_record(tmp_path / "c" / "prior.safetensors")["record"]["config"]
    assert (config["seed"], config["iterations"], config["batch_size"]) == (8, 2, 8)
    (tmp_path / "bad.json").write_text('{"iterations": 3, "batchsize": 4}')
    error = workshop.error(*plain, "--config", tmp_path / "bad.json", "--out", tmp_path / "d")
    assert "unknown settings batchsize" in error
    assert not (tmp_path / "d").exists()


def test_the_published_preset(workshop: Workshop, tmp_path: Path) -> None:
    options = ("--preset", "paper", "--iterations", 1, "--batch-size", 4, "--sampler-steps", 2)
    data = ("--ckpt", workshop.backbone, "--data", workshop.images)
    workshop.run("fit", *data, *options, "--chain-steps", 1, "--out", tmp_path / "run")
    record = prior_record(tmp_path / "run" / "prior.safetensors")
    assert (record["regime"], record["target"]) == ("refiner", "published")
    assert record["energy"]["channels"] == 64
    assert (record["sampler"]["kernel"], record["sampler"]["steps"]) == ("langevin", 2)


def test_float64_is_an_option_everywhere(workshop: Workshop, fit: list[object], tmp_path: Path) -> None:
    workshop.run(*fit, "--out", tmp_path / "run", "--dtype", "float64")
    path = tmp_path / "run" / "prior.safetensors"
    for dtype in ("float32", "float64"):
        workshop.run("sample", path, "-n", 2, "--dtype", dtype, "--out", tmp_path / f"{dtype}.npz")
    with np.load(tmp_path / "float64.npz") as arrays:
        assert arrays["z_dense"].dtype == np.float64


def test_the_next_free_run_directory(
    workshop: Workshop, fit: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fit-001", "fit-002"):
        shown = json.loads(workshop.run(*fit, "--iterations", 1, "--json").stdout)
        assert shown["prior"] == f"runs/{name}/prior.safetensors"


# Sampling.


def test_the_three_kinds_of_output(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    grid, arrays, folder = tmp_path / "new" / "a.png", tmp_path / "a.npz", tmp_path / "folder"
    for out in (grid, arrays, folder):
        workshop.run("sample", prior, "-n", 12, "--seed", 2, "--out", out)
    with np.load(arrays) as loaded:
        assert set(loaded) == {"images", "z_dense", "z_point", "z_conv"}
        images = loaded["images"]
        assert images.shape == (12, 8, 8, 1)
        assert images.dtype == np.uint8
        assert loaded["z_conv"].shape == (12, 3, 4, 4)
    assert {p.name for p in folder.iterdir()} == {f"{i:02d}.png" for i in range(12)}
    for index in (0, 11):
        with Image.open(folder / f"{index:02d}.png") as picture:
            assert picture.mode == "L"
            assert np.array_equal(np.asarray(picture), images[index, :, :, 0])
    assert open_images(folder).shape == (1, 8, 8)  # so the other commands take it as --data
    with Image.open(grid) as picture, Image.open(folder / "00.png") as single:
        assert picture.width > 3 * single.width
    workshop.run("sample", prior, "-n", 4, "--compare", "--out", tmp_path / "compared.png")
    with Image.open(tmp_path / "compared.png") as picture:
        assert picture.height > 8


def test_chunks_change_nothing(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for chunk in (1, 64, 100, 128, 512):
        out = tmp_path / f"{chunk}.npz"
        workshop.run("sample", prior, "-n", 150, "--chunk", chunk, "--steps", 2, "--seed", 4, "--out", out)
        with np.load(out) as arrays:
            found.append(dict(arrays))
    for other in found[1:]:
        for key, value in found[0].items():
            assert np.array_equal(value, other[key]) or np.allclose(value, other[key], atol=1e-5), key
    workshop.run("sample", prior, "-n", 150, "--steps", 2, "--seed", 5, "--out", tmp_path / "other.npz")
    with np.load(tmp_path / "other.npz") as arrays:
        assert not np.array_equal(arrays["images"], found[0]["images"])


def test_fewer_samples_are_the_first_of_more(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    for n in (3, 70):
        workshop.run("sample", prior, "-n", n, "--out", tmp_path / f"{n}.npz")
    with np.load(tmp_path / "3.npz") as few, np.load(tmp_path / "70.npz") as many:
        assert np.allclose(few["z_conv"], many["z_conv"][:3], atol=1e-5)


def test_options_win_over_the_recorded_sampler(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    words = ("sample", prior, "-n", 2, "--kernel", "langevin", "--steps", 3, "--step-size", 0.01, "--json")
    sampler = json.loads(workshop.run(*words, "--out", tmp_path / "a.png").stdout)["sampler"]
    assert sampler == {**prior_record(prior)["sampler"], "kernel": "langevin", "steps": 3, "step_size": 0.01}


def test_a_chain_that_explodes_ends_with_exit_code_3(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    words = ("sample", prior, "-n", 2, "--kernel", "langevin", "--step-size", 2.0, "--out", tmp_path / "a.png")
    assert "smaller step size" in workshop.error(*words, "--steps", 20, "--temperature", 1e38, code=3)
    assert not (tmp_path / "a.png").exists()


def test_another_backbone_needs_force(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    from toys import ToyConv

    from ebm_prior.checkpoint import save_backbone

    other = tmp_path / "other.safetensors"
    save_backbone(ToyConv(seed=1), other)
    words = ("sample", prior, "-n", 2, "--ckpt", other, "--out", tmp_path / "a.png")
    assert "--force" in workshop.error(*words)
    workshop.run(*words, "--force")
    assert (tmp_path / "a.png").is_file()


# Converting.


def test_convert_then_fit(workshop: Workshop, fit: list[object], fitted: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    assert "wrote" in workshop.run("convert", "--ckpt", workshop.backbone, "--out", own).stdout
    assert fingerprint(load_backbone(None, own)) == fingerprint(load_backbone(None, workshop.backbone))
    record = backbone_record(own)["record"]
    assert record["stage"] == "convert"
    assert record["source"] == "toy.safetensors"
    assert len(record["source_sha256"]) == 64
    assert record["data"]["name"] == "mnist/train"  # what the source said of itself stays known
    workshop.run(*fit, "--ckpt", own, "--out", tmp_path / "run")
    runs = (tmp_path / "run", fitted)
    first, second = (prior_record(run / "prior.safetensors")["backbone"]["fingerprint"] for run in runs)
    assert first == second


def test_convert_to_half_precision(workshop: Workshop, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    workshop.run("convert", "--ckpt", workshop.backbone, "--out", whole)
    workshop.run("convert", "--ckpt", workshop.backbone, "--out", half, "--precision", "float16")
    assert half.stat().st_size < whole.stat().st_size
    mine = dict(load_backbone(None, workshop.backbone).named_parameters())
    assert all(torch.equal(p, mine[n].half().float()) for n, p in load_backbone(None, half).named_parameters())


def test_convert_needs_the_suffix_by_which_its_form_is_known(workshop: Workshop, tmp_path: Path) -> None:
    assert "must end in .safetensors" in workshop.error("convert", "--ckpt", workshop.backbone, "--out", tmp_path / "b")
