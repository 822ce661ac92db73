"""How images are read, from the command line: --array, --data-mode, empty strings, and remarks on stderr."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from image_writers import write_npz, write_pictures
from PIL import Image
from workshop import Workshop

from ebm_prior.storage.checkpoint import prior_record


def test_the_array_and_the_colours_are_chosen(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    pixels = np.load(workshop.images)
    path = write_npz(tmp_path / "a.npz", day=np.repeat(pixels[..., None], 3, axis=3), night=pixels[:50])
    error = workshop.error(*fit_words, "--out", tmp_path / "a", "--data", path)
    assert "found the keys day, night; choose one with --array KEY" in error
    workshop.run(*fit_words, "--out", tmp_path / "b", "--data", path, "--array", "night")
    assert prior_record(tmp_path / "b" / "prior.safetensors")["record"]["data"]["training"] == 45
    workshop.run(*fit_words, "--out", tmp_path / "c", "--data", f"{path}:night")
    error = workshop.error(*fit_words, "--out", tmp_path / "d", "--data", f"{path}:day")
    assert "--data-mode grey" in error
    workshop.run(*fit_words, "--out", tmp_path / "e", "--data", f"{path}:day", "--data-mode", "grey")
    assert "'hsv' is not one of 'rgb', 'grey'" in workshop.run(*fit_words, "--data-mode", "hsv", code=2).stderr
    assert "--array" in workshop.error(*fit_words, "--out", tmp_path / "f", "--array", "night")


def test_remarks_stand_on_stderr_once(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", np.load(workshop.images)[:40])
    (folder / "self").symlink_to(folder)
    os.mkfifo(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "zz.png", exif=exif)
    result = workshop.run(*fit_words, "--out", tmp_path / "run", "--data", folder)
    lines = [line for line in result.stderr.splitlines() if line.startswith(f"{folder}: ")]
    assert lines == [
        f"{folder}: left out: 1 links to folders that are read already; 1 that are no regular files (named pipe)",
        f"{folder}: 1 of 41 images are turned as their EXIF orientation says",
    ]
    words = ("pretrain", "--backbone", "toy", "--data", folder, "--iterations", 2, "--batch-size", 8)
    result = workshop.run(*words, "--out", tmp_path / "pretrained")  # opens two splits
    assert result.stderr.count("left out: ") == 1


@pytest.mark.parametrize("option", ["--data", "--data-root", "--out"])
def test_an_empty_string_is_no_path(
    option: str, workshop: Workshop, fit_words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_pictures(tmp_path / "p", np.load(workshop.images)[:40]))
    words = [*fit_words, "--out", tmp_path / "run", option, ""]
    result = workshop.run(*words, code=1 if option == "--data" else 2)
    assert "found an empty string" in result.stderr
    assert not (tmp_path / "run").exists()


def test_outliers_are_read_likewise(workshop: Workshop, prior: Path, tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    folder = write_pictures(tmp_path / "p", colours)
    (folder / "notes.txt").write_text("")
    words = ("ood", prior, "--in", "mnist", "--data-root", workshop.data_root, "--out", tmp_path / "o", "--samples", 20)
    assert "--data-mode" in workshop.run("ood", "--help-all").stdout
    result = workshop.run(*words, "--outliers", folder, "--data-mode", "grey", "--k", 0, "--json")
    assert "left out: 1 files of other endings (.txt)" in result.stderr
