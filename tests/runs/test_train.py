"""`ebm-prior train`: what it leaves in its folder, which every other command takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_folders import content, metrics
from workshop import Workshop

from ebm_prior.errors import DivergenceError
from ebm_prior.runs import train
from ebm_prior.storage.checkpoint import load_backbone, load_prior

WORDS = [
    "--set",
    "width=4",
    "--set",
    "hidden=6",
    "--set",
    "latents=[4,3]",
    "--iterations",
    "4",
    "--batch-size",
    "8",
    "--evaluate-every",
    "2",
    "--energy-from",
    "0",
    "--energy-hidden",
    "6",
    "--prior-chain-steps",
    "2",
    "--warmup",
    "0",
]


@pytest.fixture(scope="module")
def trained(workshop: Workshop) -> Path:
    out = workshop.folder / "trained"
    workshop.run("train", "--data", workshop.images, "--out", out, *WORDS)
    return out


def test_what_a_run_leaves(trained: Path) -> None:
    names = {"backbone.safetensors", "prior.safetensors", "config.json", "data.json", "metrics.jsonl", "state.pt"}
    found = set(content(trained)) - {"progress.jsonl"}  # which a run of some seconds has
    assert found == names | {"samples-000002.png", "samples-000004.png"}
    assert [line["iteration"] for line in metrics(trained)] == [2, 4]
    assert {"elbo", "reconstruction", "kl", "gain", "ess_fraction", "chain_norm", "f_gap"} <= set(metrics(trained)[0])
    prior = load_prior(trained / "prior.safetensors")
    assert [group.name for group in prior.backbone.groups] == ["z2", "z1"]
    assert prior.backbone.image_shape == (1, 8, 8)


def test_other_commands_take_the_files(workshop: Workshop, trained: Path) -> None:
    prior, out = trained / "prior.safetensors", workshop.folder / "drawn.png"
    workshop.run("sample", prior, "-n", 4, "--out", out)
    assert out.exists()
    card = json.loads(workshop.run("info", prior, "--json").stdout)
    assert card["record"]["stage"] == "train"
    words = [
        "--iterations",
        "2",
        "--batch-size",
        "8",
        "--held-out",
        "10",
        "--energy-hidden",
        "6",
        "--energy-joint",
        "6",
        "--sampler-proposals",
        "2",
    ]
    fitted = workshop.folder / "fitted-on-trained"
    ckpt = trained / "backbone.safetensors"
    workshop.run("fit", "--ckpt", ckpt, "--data", workshop.images, "--out", fitted, *words)
    assert (fitted / "prior.safetensors").exists()


def test_equal_runs_and_resumed_runs_give_equal_bytes(workshop: Workshop, trained: Path) -> None:
    again = workshop.folder / "elsewhere"
    workshop.run("train", "--data", workshop.images, "--out", again, *WORDS)
    workshop.run("train", "--data", workshop.images, "--out", again, *WORDS, "--resume")  # nothing is left to do
    for name in ("backbone.safetensors", "prior.safetensors", "metrics.jsonl"):
        assert (again / name).read_bytes() == (trained / name).read_bytes(), name


def test_it_goes_on_from_weights(workshop: Workshop, trained: Path) -> None:
    words = WORDS[6:]
    ckpt, out = trained / "backbone.safetensors", workshop.folder / "further"
    more = ["--learning-rate", 1e-7, "--posterior", "langevin", "--posterior-chain-steps", 2, "--json"]
    result = workshop.run("train", "--ckpt", ckpt, "--data", workshop.images, "--out", out, *words, *more)
    assert json.loads(result.stdout)["rollbacks"] == 0
    before, after = (load_backbone(None, path) for path in (ckpt, out / "backbone.safetensors"))
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_picture_that_fails_costs_no_more_than_the_picture(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall(*given: object) -> None:
        raise DivergenceError("2 of 32 chains left the finite numbers")

    monkeypatch.setattr(train, "write_pictures", fall)
    out = workshop.folder / "unpictured"
    result = workshop.run("train", "--data", workshop.images, "--out", out, *WORDS, "--json")
    assert json.loads(result.stdout)["rollbacks"] == 0
    assert "no picture of iteration 2: 2 of 32 chains" in result.stderr
    assert [line["iteration"] for line in metrics(out)] == [2, 4]


def test_without_an_energy_there_are_no_heads_to_speak_of(workshop: Workshop) -> None:
    out = workshop.folder / "gaussian"
    words = [*WORDS[:12], "--prior", "gaussian"]
    assert "no energy" in workshop.run("train", "--data", workshop.images, "--out", out, *words).stdout


def test_mistakes(workshop: Workshop, trained: Path) -> None:
    common = ("train", "--data", workshop.images, "--out", workshop.folder / "nothing")
    workshop.run(*common, "--set", "width=4", "--ckpt", trained / "backbone.safetensors", code=2)
    chains = ["--posterior", "langevin", "--posterior-chain-proposals", 3]
    assert "proposals" in workshop.error(*common, *WORDS, *chains)
    for unused in (
        ["--prior", "gaussian", "--energy-from", 0.3],
        ["--prior", "gaussian", "--prior-chain-steps", 3],
        ["--prior", "gaussian", "--chains", "persistent"],
        ["--prior", "gaussian", "--space", "z"],
        ["--posterior-chain-steps", 3],
        ["--bfloat16"],
        ["--refresh", 0.2],
        ["--energy-dropout", 0.2],
    ):
        assert (
            f"leave out {unused[-2] if len(unused) > 1 else unused[0]}"
            in workshop.run(*common, *WORDS[:8], *unused, code=2).stderr
        )
    assert "widht" in workshop.error(*common, "--set", "widht=4")
    assert "(1, 8, 8)" in workshop.error(*common, "--ckpt", "hvae_fashion_mnist")
