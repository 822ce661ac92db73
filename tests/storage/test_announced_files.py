"""Nothing is announced that is not there, and nothing is written that no command would load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import ToyConv
from workshop import Workshop

from ebm_prior.cli import fit
from ebm_prior.errors import CheckpointError, DivergenceError
from ebm_prior.evaluation.classifier import FeatureClassifier, save_classifier
from ebm_prior.runs.kept import diverged
from ebm_prior.storage.checkpoint import save_backbone


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A backbone of finite weights whose latents are not finite."""
    backbone, path = ToyConv(), tmp_path / "broken.safetensors"
    for layer in (
        backbone.see,
        backbone.dense_posterior,
        backbone.conv_posterior,
        backbone.point,
        backbone.point_prior,
    ):
        torch.nn.init.constant_(layer.weight, 3e38)
    save_backbone(backbone, path)
    return path


@pytest.mark.parametrize("earlier", [False, True])
def test_a_backbone_that_yields_nan_leaves_no_prior(
    workshop: Workshop,
    small_options: list[str],
    broken: Path,
    tmp_path: Path,
    earlier: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "check_foreign", lambda *_: None)  # which would refuse it before
    out = tmp_path / "run"
    if earlier:
        words = ("fit", "--ckpt", workshop.backbone, "--data", workshop.images, "--out", out, *small_options)
        workshop.run(*words)
    before = (out / "prior.safetensors").read_bytes() if earlier else None
    words = ("fit", "--ckpt", broken, "--data", workshop.images, "--out", out, "--overwrite", *small_options)
    message = workshop.error(*words, code=3)
    assert "It was not written: " in message
    assert "was written to" not in message
    assert ("is from an earlier run" in message) == earlier
    assert (out / "prior.safetensors").exists() == earlier
    assert before is None or (out / "prior.safetensors").read_bytes() == before


def test_what_can_be_written_is_announced(tmp_path: Path) -> None:
    path, kept = tmp_path / "file", object()
    error = diverged(DivergenceError("Gone.", kept=kept), lambda: path.write_text("x"), path)
    assert str(error) == f"Gone. It was written to {path}"
    assert error.kept is kept


def test_a_classifier_that_would_not_load_is_not_written(tmp_path: Path) -> None:
    classifier = FeatureClassifier((1, 8, 8), 4, width=4)
    torch.nn.init.constant_(classifier.head.weight, float("nan"))
    with pytest.raises(CheckpointError, match=r"head\.weight; nothing was written"):
        save_classifier(classifier, tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())
