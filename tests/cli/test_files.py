"""Commands and the files they write: nothing is overwritten unasked, nothing is lost, and what convert makes."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import content
from workshop import Workshop

from ebm_prior.storage.checkpoint import backbone_record, load_backbone, prior_record
from ebm_prior.storage.weights import fingerprint


def test_fit_does_not_overwrite(workshop: Workshop, fit_words: list[object], tmp_path: Path) -> None:
    out = tmp_path / "run"
    workshop.run(*fit_words, "--out", out)
    before = content(out)
    message = workshop.error(*fit_words, "--out", out, "--seed", 1)
    assert "--resume" in message
    assert "--overwrite" in message
    assert content(out) == before
    workshop.run(*fit_words, "--out", out, "--seed", 1, "--overwrite")
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


def test_a_file_does_not_take_the_place_of_a_folder_nor_a_folder_that_of_a_file(
    workshop: Workshop, prior: Path, tmp_path: Path
) -> None:
    folder, named = tmp_path / "folder", tmp_path / "b.safetensors"
    folder.mkdir()
    named.mkdir()
    convert = ("convert", "--ckpt", workshop.backbone, "--overwrite", "--out")
    assert "--out must end in .safetensors" in workshop.error(*convert, folder)
    assert "is a folder; expected the name of a file" in workshop.error(*convert, named)
    (tmp_path / "file").write_text("precious")
    error = workshop.error("sample", prior, "-n", 2, "--out", tmp_path / "file", "--overwrite")
    assert "is a file; expected a folder for samples" in error
    assert (tmp_path / "file").read_text() == "precious"


def test_resume_and_overwrite_contradict_each_other(
    workshop: Workshop, fit_words: list[object], tmp_path: Path
) -> None:
    for command in (fit_words, ["pretrain", "--backbone", "toy", "--data", workshop.images]):
        result = workshop.run(*command, "--out", tmp_path / "run", "--resume", "--overwrite", code=2)
        assert "give one of them" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_without_the_right_to_write_is_found_before_the_work(
    workshop: Workshop, prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permission bits do not bind root, and tell nothing of a disk that is read-only: it has to be tried."""
    forbidden, opened = tmp_path / "forbidden", os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT and Path(path).parent == forbidden:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr("ebm_prior.model.prior.EBMPrior.map_chunks", lambda *_, **__: pytest.fail("began to work"))
    for name in ("a.png", "a.npz", "folder"):
        error = workshop.error("sample", prior, "--out", forbidden / name)
        assert f"cannot write {forbidden / name}: Permission denied" in error
    assert "Permission denied" in workshop.error("demo", "--out", forbidden / "demo")


@pytest.mark.parametrize("name", ["a.png", "a.npz", "folder", "run"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    workshop: Workshop, fit_words: list[object], prior: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    command = fit_words if name == "run" else ["sample", prior]

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("began to work")

    monkeypatch.setattr("ebm_prior.model.prior.EBMPrior.map_chunks", work)
    monkeypatch.setattr("ebm_prior.runs.fit.fit", work)
    assert "cannot write" in workshop.error(*command, "--out", tmp_path / "file" / "below" / name)
    assert (tmp_path / "file").read_text() == "x"


def test_a_disk_that_is_full_leaves_the_earlier_files(
    workshop: Workshop, fit_words: list[object], prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, grid, arrays, folder = tmp_path / "run", tmp_path / "a.png", tmp_path / "a.npz", tmp_path / "folder"
    workshop.run(*fit_words, "--out", run)
    for out in (grid, arrays, folder):
        workshop.run("sample", prior, "-n", 4, "--out", out)
    results, before = (run / "prior.safetensors").read_bytes(), (grid.read_bytes(), arrays.read_bytes())
    samples, room = content(folder), iter([True, True])

    def full(*_: object) -> None:
        if not next(room, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    words = ("sample", prior, "-n", 3, "--seed", 1, "--overwrite", "--out")
    assert "No space left on device" in workshop.error(*words, folder)  # in the third of three files
    assert content(folder) == samples
    for out in (grid, arrays):
        assert f"cannot write {out}: No space left on device" in workshop.error(*words, out)
    assert "No space left" in workshop.error(*fit_words, "--out", run, "--overwrite")
    assert (grid.read_bytes(), arrays.read_bytes()) == before
    assert (run / "prior.safetensors").read_bytes() == results


# Converting.


def test_convert_then_fit(workshop: Workshop, fit_words: list[object], fitted: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    assert "wrote" in workshop.run("convert", "--ckpt", workshop.backbone, "--out", own).stdout
    assert fingerprint(load_backbone(None, own)) == fingerprint(load_backbone(None, workshop.backbone))
    record = backbone_record(own)["record"]
    assert record["stage"] == "convert"
    assert record["source"] == "toy.safetensors"
    content = b"toy.safetensors\0" + workshop.backbone.read_bytes()
    assert record["source_sha256"] == hashlib.sha256(content).hexdigest()
    assert record["data"]["name"] == "mnist/train"  # what the source said of itself stays known
    workshop.run(*fit_words, "--ckpt", own, "--out", tmp_path / "run")
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
