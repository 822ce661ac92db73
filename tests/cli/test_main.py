"""The command line's promises: exit codes, one line per error, JSON, and settings that are taken over."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from workshop import Workshop

from ebm_prior.cli import main
from ebm_prior.model.energy import JointEnergy
from ebm_prior.runs.backbones import new_backbone
from ebm_prior.storage.checkpoint import backbone_record, load_backbone, load_prior, prior_record
from ebm_prior.training.fit_config import FitConfig, paper_preset

# Exit codes and streams.


@pytest.mark.filterwarnings("error")
def test_done_is_0_and_usage_is_2(workshop: Workshop) -> None:
    assert "Usage" in workshop.run("--help").stdout
    for name in main.main.entries:  # type: ignore[attr-defined]
        assert "--help" in workshop.run(name, "--help").stdout
    for wrong in (["fly"], ["fit"], ["sample", "x", "y"], ["info"], ["info", "x", "--ckpt", "y"]):
        result = workshop.run(*wrong, code=2)
        assert result.stdout == ""
        assert "Usage" in result.stderr
    workshop.run("sample", "x", "--out", "y.png", "-n", 0, code=2)
    workshop.run("sample", "x", "--out", "y.png", "--kernel", "magic", code=2)


def test_training_needs_data(workshop: Workshop) -> None:
    for words in (["pretrain", "--backbone", "toy"], ["classifier", "--out", "c.safetensors"]):
        assert "Missing option '--data'" in workshop.run(*words, code=2).stderr
        assert (
            "[required]" in workshop.run(words[0], "--help").stdout.partition("--data ")[2].partition("--data-root")[0]
        )


def test_options_that_would_be_ignored_are_refused(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    sample = ("sample", "p.safetensors", "--out")
    for words, message in (
        ([*sample, "a.npz", "--compare"], "--compare shows samples in a grid"),
        ([*sample, "folder", "--compare"], "--compare shows samples in a grid"),
        ([*sample, "a.jpg"], "must end in .png or .npz (without a suffix it is a folder)"),
        (["eval", "p", "--fid-mode", "clean"], "pass --fid or --inception"),
        (["eval", "p", "--fid", "--classifier", "c"], "give one"),
        (["eval", "p", "--inception", "i", "--classifier", "c"], "give one"),
        ([*fit_words, "--ratios", "one", "--chain-steps", 3, "--penalty", 0], "leave out --chain-steps, --penalty"),
        ([*fit_words, "--chains", "fresh", "--refresh", 0.1], "leave out --chains, --refresh"),
        ([*fit_words, "--preset", "paper", "--patience", 3], "leave out --patience"),
        ([*fit_words, "--ratios", "staged", "--penalty", 0], "leave out --penalty"),
        ([*fit_words, "--ratios", "one", "--stage-moves", 3], "leave out --stage-moves"),
        ([*fit_words, "--objective", "mle", "--ratios", "one"], "leave out --ratios"),
        ([*fit_words, "--objective", "mle", "--noise-weight", 2], "leave out --noise-weight"),
        (["train", "--data", "x", "--noise-weight", 2], "--noise-weight: train learns by maximum likelihood alone"),
        (["train", "--data", "x", "--objective", "nce"], "then fit --noise-weight M on the backbone"),
        ([*fit_words, "--bn-readjust", "--precision", "bf16"], "leave out --precision bf16"),
    ):
        result = workshop.run(*words, code=2)
        assert message in " ".join(result.stderr.split())
    mle = ("--objective", "mle", "--regime", "refiner", "--chain-steps", 1, "--penalty", 0)
    workshop.run(*fit_words, *mle, "--out", tmp_path / "run")


def test_no_error_of_the_operating_system_is_a_traceback(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "disk")

    monkeypatch.setattr("ebm_prior.runs.describe.list_backbones", fail)
    assert "Input/output error: 'disk'" in workshop.error("backbones")


def test_the_module_is_the_command(workshop: Workshop) -> None:
    process = workshop.popen("-m", "ebm_prior", "info", "nowhere")
    stderr = process.communicate()[1].decode()
    assert process.returncode == 1
    assert stderr == "ebm-prior: error: expected an ebm-prior file at nowhere, found nothing there\n"


def test_errors_are_one_line_on_stderr(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    for words, message in (
        ([*fit_words, *out, "--ckpt", "nonesuch"], "no backbone at nonesuch"),
        ([*fit_words, *out, "--backbone", "linear"], "use --backbone toy"),
        ([*fit_words, *out, "--data", "nonesuch"], "nonesuch: no such file or folder, nor the name of a data set"),
        ([*fit_words, *out, "--data", 300 * "x"], "xxx: no such file or folder"),
        ([*fit_words, *out, "--iterations", -3], "iterations must be positive, found -3"),
        ([*fit_words, *out, "--device", "quantum"], "--device quantum cannot be used here"),
        ([*fit_words, "--resume"], "--resume needs --out"),
        (["info", "--ckpt", workshop.images], "--backbone NAME"),
        (["info", workshop.images], "damaged or not a safetensors file"),
    ):
        assert message in workshop.error(*words)
    assert not (tmp_path / "run").exists()


def test_results_and_progress_do_not_mix(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    result = workshop.run(*fit_words, "--out", tmp_path / "run", "--json")
    assert "fit:" in result.stderr
    assert len(result.stdout.splitlines()) == 1
    json.loads(result.stdout)


# JSON.


@pytest.mark.parametrize("ratios", ["one", "groupwise"])
def test_fit_counts_the_parameters_of_the_heads(
    ratios: str, workshop: Workshop, fit_words: list[object], tmp_path: Path
) -> None:
    shown = json.loads(workshop.run(*fit_words, "--ratios", ratios, "--out", tmp_path / "run", "--json").stdout)
    assert shown["parameters"]["heads"] == sum(p.numel() for p in load_prior(shown["prior"]).energy.parameters())


def test_fit_reports(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    shown = json.loads(workshop.run(*fit_words, "--out", tmp_path / "run", "--json").stdout)
    assert shown["prior"] == str(tmp_path / "run" / "prior.safetensors")
    assert Path(shown["picture"]).is_file()
    assert shown["sampler"]["proposals"] == 2
    text = workshop.run(*fit_words, "--out", tmp_path / "other").stdout
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
    loaded = load_prior(prior)
    assert shown["ess_fraction"] == pytest.approx(float(loaded.sample(5, seed=3).ess_fraction.mean()))


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
    assert described["architecture"] == dict(loaded.backbone.architecture)
    bundled = workshop.run("info", "--ckpt", "hvae_fashion_mnist").stdout
    assert "trained on fashion-mnist/train, 4,000 steps of batch 128, test ELBO -240.4" in bundled
    text = workshop.run("info", "--ckpt", workshop.backbone).stdout
    for key, preset, said in (
        ("parameters", FitConfig(), "default heads"),
        ("parameters_paper", paper_preset(), "paper"),
    ):
        heads = sum(p.numel() for p in JointEnergy(loaded.backbone.groups, preset.energy).parameters())
        assert described[key] == {"backbone": backbone, "heads": heads, "ratio": heads / backbone}
        assert f"{said} {heads:,} ({heads / backbone:.1%})" in text
    assert f"backbone {backbone:,}, " in text


def test_backbones_lists_adapters_and_says_which_are_broken(workshop: Workshop) -> None:
    listed = json.loads(workshop.run("backbones", "--json").stdout)
    rows = {row["adapter"]: row for row in listed["adapters"]}
    assert rows["toy"]["class"] == "toys:ToyConv"
    assert "toys_nowhere" in rows["broken"]["error"]
    text = workshop.run("backbones").stdout
    assert "hvae" in text
    assert "cannot be imported" in text


# Settings.


def test_a_file_of_settings(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    plain = ["fit", "--ckpt", workshop.backbone, "--data", workshop.images]
    workshop.run(*fit_words, "--out", tmp_path / "a", "--seed", 7)
    again = ("--config", tmp_path / "a" / "config.json")
    workshop.run(*plain, *again, "--out", tmp_path / "b")  # all of it from there, the seed too
    assert (tmp_path / "b" / "prior.safetensors").read_bytes() == (tmp_path / "a" / "prior.safetensors").read_bytes()
    workshop.run(*plain, *again, "--out", tmp_path / "c", "--seed", 8, "--iterations", 2)
    config = prior_record(tmp_path / "c" / "prior.safetensors")["record"]["config"]
    assert (config["seed"], config["iterations"], config["batch_size"]) == (8, 2, 8)
    (tmp_path / "bad.json").write_text('{"seed": -1}')
    assert "seed must not be negative" in workshop.error(*plain, "--config", tmp_path / "bad.json")
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


def test_float64_is_an_option_everywhere(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    workshop.run(*fit_words, "--out", tmp_path / "run", "--precision", "float64")
    path = tmp_path / "run" / "prior.safetensors"
    for dtype in ("float32", "float64"):
        workshop.run("sample", path, "-n", 2, "--precision", dtype, "--out", tmp_path / f"{dtype}.npz")
    with np.load(tmp_path / "float64.npz") as arrays:
        assert arrays["z_dense"].dtype == np.float64


def test_the_next_free_run_directory(
    workshop: Workshop, fit_words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fit-001", "fit-002"):
        shown = json.loads(workshop.run(*fit_words, "--iterations", 1, "--json").stdout)
        assert shown["prior"] == f"runs/{name}/prior.safetensors"


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
    assert "as the name of a bundled backbone" in workshop.error(*words, "hvae", "--architecture", "nonesuch")


def test_pretraining_goes_on_from_trained_weights(workshop: Workshop, tmp_path: Path) -> None:
    words = ("pretrain", "--data", workshop.images, "--iterations", 1, "--batch-size", 8, "--out", tmp_path / "run")
    both = workshop.run(*words, "--ckpt", workshop.backbone, "--architecture", "hvae_fashion_mnist", code=2).stderr
    assert "leave out --architecture" in both
    assert "pass --backbone to train a new one, or --ckpt" in workshop.run(*words, code=2).stderr
    workshop.run(*words, "--ckpt", workshop.backbone, "--learning-rate", 1e-12)
    trained = tmp_path / "run" / "backbone.safetensors"
    before, after = (load_backbone(None, str(path)).state_dict() for path in (workshop.backbone, trained))
    for key, weights in before.items():
        torch.testing.assert_close(after[key], weights)
    assert backbone_record(trained)["record"]["start"]["source"] == workshop.backbone.name
