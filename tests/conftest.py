"""What the tests share: one thread, and a place where the toy backbones are installed, with files and images."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from played_graphs import Played
from toys import LinearGaussian, ToyConv
from workshop import SMALL_FIT, THIRD_PARTY, Workshop

from ebm_prior.compute import cuda_graphs
from ebm_prior.data.images import ImageSource, open_images
from ebm_prior.model.backbone import Backbone
from ebm_prior.storage.checkpoint import load_backbone, save_backbone

torch.set_num_threads(1)  # equal bytes are promised for equal numbers of threads, and children run with one
pytest.register_assert_rewrite("run_folders", "web_pages")  # so that their assertions show what differs


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("workshop")
    info = folder / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    points = "[ebm_prior.backbones]\ntoy = toys:ToyConv\nlinear = toys:LinearGaussian\nbroken = toys_nowhere:Nothing\n"
    points += "".join(f"{name} = third_party:{kind}\n" for name, kind in THIRD_PARTY.items())
    (info / "entry_points.txt").write_text(points)
    sys.path.insert(0, str(folder))
    random = np.random.default_rng(0)

    def images(n: int) -> np.ndarray:
        ramp = np.linspace(0, 255, 8)[:, None] * random.random((n, 1, 1)) + np.zeros(8)
        return np.clip(ramp + random.normal(0, 20, (n, 8, 8)), 0, 255).astype(np.uint8)

    pixels = images(120)
    np.save(folder / "images.npy", pixels)
    data_root = folder / "data"
    data_root.mkdir()
    np.savez(data_root / "mnist.npz", x_train=pixels, x_test=images(60))
    backbone = folder / "toy.safetensors"
    save_backbone(ToyConv(), backbone, record={"data": {"name": "mnist/train", "images": 120}})
    save_backbone(LinearGaussian(), folder / "linear.safetensors")
    yield Workshop(folder, backbone, folder / "images.npy", data_root)
    sys.path.remove(str(folder))


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
