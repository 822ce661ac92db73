"""`ebm-prior sample`: its kinds of output, what the samples depend on, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toys import ToyConv
from workshop import Workshop

from ebm_prior.data.images import open_images
from ebm_prior.storage.checkpoint import prior_record, save_backbone


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


def test_nothing_given_draws_from_the_newest_run_beside_its_prior(
    workshop: Workshop, prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = workshop.error("sample")
    assert f"no prior in {tmp_path / 'runs'}" in error
    assert "ebm-prior fit" in error
    for name, age in (("a", 5), ("b", 1), ("c", 3)):
        path = tmp_path / "runs" / name / "prior.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(prior.read_bytes())
        os.utime(path, ns=(0, 10**18 - age))
    (tmp_path / "runs" / "unfinished").mkdir()
    newest = Path("runs/b")
    (newest / "drawn-002.png").write_text("precious")
    for number in ("001", "003"):
        result = workshop.run("sample", "-n", 2, "--steps", 1)
        assert f"prior: {newest / 'prior.safetensors'}" in result.stderr
        assert f"wrote {newest / f'drawn-{number}.png'}" in result.stdout
        with Image.open(newest / f"drawn-{number}.png") as picture:
            assert picture.height > 8
    assert (newest / "drawn-002.png").read_text() == "precious"
    shown = json.loads(workshop.run("sample", "runs/c/prior.safetensors", "-n", 2, "--steps", 1, "--json").stdout)
    assert shown["files"] == ["runs/c/drawn-001.png"]


def test_no_folder_is_made_for_a_prior_that_is_not_there(workshop: Workshop, tmp_path: Path) -> None:
    assert "found nothing there" in workshop.error("sample", tmp_path / "typo" / "prior.safetensors")
    assert not (tmp_path / "typo").exists()


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
    other = tmp_path / "other.safetensors"
    save_backbone(ToyConv(seed=1), other)
    words = ("sample", prior, "-n", 2, "--ckpt", other, "--out", tmp_path / "a.png")
    assert "--force" in workshop.error(*words)
    workshop.run(*words, "--force")
    assert (tmp_path / "a.png").is_file()


def test_a_diagnosis_of_the_chains(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    words = ("sample", prior, "-n", 2, "--proposals", 1, "--out", tmp_path / "a.npz", "--overwrite")
    crawling = workshop.run(*words, "--steps", 12, "--step-size", 1e-4, "--diagnose")
    assert "split R̂" in crawling.stdout
    assert "16 chains of 12 steps" in crawling.stdout
    assert "remark: chains of 12 steps do not show that they mix" in crawling.stderr
    first = (tmp_path / "a.npz").read_bytes()
    found = json.loads(workshop.run(*words, "--steps", 12, "--step-size", 1e-4, "--diagnose", "--json").stdout)[
        "mixing"
    ]
    assert set(found["quantities"]) == {"f", "‖ε‖ dense", "‖ε‖ point", "‖ε‖ conv"}
    assert found["steps"] == 12
    undiagnosed = workshop.run(*words, "--steps", 12, "--step-size", 1e-4)
    assert (tmp_path / "a.npz").read_bytes() == first  # which a diagnosis does not change
    assert "do not show" not in undiagnosed.stderr
    assert "needs chains" in workshop.error(*words, "--steps", 0, "--diagnose")


def test_steps_that_choose_themselves(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    words = ("sample", prior, "-n", 2, "--out", tmp_path / "a.npz", "--step-size", 1, "--steps", "auto", "--json")
    result = workshop.run(*words)
    chosen = json.loads(result.stdout)["sampler"]["steps"]
    assert f"steps: {chosen}, chosen by 16 chains of" in result.stderr
    assert chosen >= 10
    assert "'automatic' is not a valid integer" in workshop.run(*words[:-2], "automatic", code=2).stderr
