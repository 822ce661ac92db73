"""Bundled priors and backbones have names, which commands, Python and completion know."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from workshop import Workshop

from ebm_prior import load_prior
from ebm_prior.cli.main import main
from ebm_prior.storage.checkpoint import bundled_priors


def completed(words: list[str], incomplete: str) -> list[str]:
    found = ShellComplete(main, {}, "ebm-prior", "_EBM_PRIOR_COMPLETE").get_completions(words, incomplete)
    return [item.value for item in found]


def test_a_bundled_prior_is_drawn_from_by_name_into_the_current_folder(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workshop.run("sample", "biva_fashion_mnist_prior", "-n", 2, "--proposals", 2, "--steps", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["drawn-001.png"]


def test_python_knows_the_names() -> None:
    for name in bundled_priors():
        assert load_prior(name).regime == "calibrated"


def test_backbones_lists_the_priors(workshop: Workshop) -> None:
    shown = workshop.run("backbones").stdout
    assert all(name in shown for name in bundled_priors())


def test_completion_offers_the_names() -> None:
    assert "biva_fashion_mnist_prior" in completed(["sample"], "biva")
    assert "hvae_fashion_mnist" in completed(["fit", "--ckpt"], "hvae")
    assert "sample" in completed([], "sam")
