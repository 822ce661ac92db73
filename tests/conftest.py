"""What the tests share: one thread, and a place where the toy backbones are installed, with files and images."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from played_graphs import Played
from workshop import SMALL_FIT, Workshop, build

from ebm_prior.compute import cuda_graphs
from ebm_prior.data.images import ImageSource, open_images
from ebm_prior.model.backbone import Backbone
from ebm_prior.storage.checkpoint import load_backbone

torch.set_num_threads(1)  # equal bytes are promised for equal numbers of threads, and children run with one
pytest.register_assert_rewrite("run_folders", "web_pages")  # so that their assertions show what differs


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    built = build(tmp_path_factory.mktemp("workshop"))
    yield built
    sys.path.remove(str(built.folder))


@pytest.fixture(scope="module")
def backbone(workshop: Workshop) -> Backbone:
    return load_backbone(None, workshop.backbone)


@pytest.fixture(scope="module")
def images(workshop: Workshop) -> ImageSource:
    return open_images(workshop.images)


@pytest.fixture(scope="session")
def small_options() -> list[str]:
    """`SMALL_FIT` as options of `ebm-prior fit`."""
    flat = {f"{k}-{n}": v for k, part in SMALL_FIT.items() if isinstance(part, dict) for n, v in part.items()}
    flat |= {k: v for k, v in SMALL_FIT.items() if not isinstance(v, dict)}
    return [word for key, value in flat.items() for word in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture(scope="session")
def fitted(workshop: Workshop, small_options: list[str]) -> Path:
    """A run directory of `ebm-prior fit` on the toy backbone."""
    out = workshop.folder / "fitted"
    workshop.run("fit", "--ckpt", workshop.backbone, "--data", workshop.images, "--out", out, *small_options)
    return out


@pytest.fixture
def prior(fitted: Path) -> Path:
    return fitted / "prior.safetensors"


@pytest.fixture
def fit_words(workshop: Workshop, small_options: list[str]) -> list[object]:
    """A small second stage as words of `ebm-prior`, to which a test adds its own."""
    return ["fit", "--ckpt", workshop.backbone, "--data", workshop.images, *small_options]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs without a GPU."""
    Played.recorded = 0
    monkeypatch.setattr(cuda_graphs, "Graph", Played)
    monkeypatch.setattr(cuda_graphs, "Place", lambda device: None)
