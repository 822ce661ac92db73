"""`ebm-prior anomaly-table`, `ablation` and `latents-2d`, typed: small models on small data of MNIST's shape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from image_writers import write_idx
from PIL import Image
from workshop import Workshop

from ebm_prior.experiments.anomaly_table import FORMS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for folder in ("MNIST", "FashionMNIST"):
        for split, n in (("train", 120), ("t10k", 80)):
            pixels = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            write_idx(root / folder / "raw" / f"{split}-images-idx3-ubyte", pixels)
            write_idx(root / folder / "raw" / f"{split}-labels-idx1-ubyte", (np.arange(n) % 4).astype(np.uint8))
    return ["--data-root", root]


def test_anomaly_table(workshop: Workshop, data: list[object], tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = ["--width", 2, "--latents", 3, 2, "--draws", 1, "--epochs", 1, "--model", "EBM, L=2", "--out", out]
    shown = workshop.run("anomaly-table", *data, *words, "--digit", 1, "--digit", 3, "--seed", 0, "--seed", 1)
    rows = json.loads(out.read_text())
    assert [(r["seed"], r["digit"], r["model"]) for r in rows] == [
        (seed, digit, model) for seed in (0, 1) for digit in (1, 3) for model in (f"EBM, L=2{name}" for name in FORMS)
    ]
    assert "(2 seeds)" in shown.stdout
    assert "0.470" in shown.stdout  # the paper's, of digit 1
    assert "--overwrite" in workshop.error("anomaly-table", *data, *words)
    again = ["anomaly-table", *data, *words, "--overwrite"]
    before = out.read_text()
    assert "digit 7" in workshop.error(*again, "--digit", 1, "--digit", 7)
    assert out.read_text() == before, "found out before anything was trained"
    shown = workshop.run(*again, "--digit", 1, "--digit", 1, "--seed", 2, "--seed", 2)
    assert [r["digit"] for r in json.loads(out.read_text())] == [1, 1, 1, 1]  # one training
    assert "seeds)" not in shown.stdout
    assert ".json" in workshop.run(*again, "--out", tmp_path / "rows.png", code=2).stderr


def test_ablation(workshop: Workshop, data: list[object], tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = ["--data", "fashion-mnist", "--iterations", 1, "--width", 2, "--latents", 3, 2, "--samples", 60]
    shown = workshop.run("ablation", "posterior", *data, *words, "--jobs", 2, "--out", out)
    assert [row["variant"] for row in json.loads(out.read_text())] == ["Langevin", "inference network"]
    assert "28.60, 0.232 s" in shown.stdout
    assert Image.open(tmp_path / "rows.png").width > 600
    assert "--overwrite" in workshop.error("ablation", "posterior", *data, *words, "--out", tmp_path / "rows.json")
    assert ".json" in workshop.run("ablation", "nef", *data, *words, "--out", tmp_path / "rows.png", code=2).stderr
    assert "cannot be used" in workshop.error(
        "ablation", "nef", *data, *words, "--out", tmp_path / "other.json", "--device", "cuda:99"
    )


def test_latents_2d(workshop: Workshop, data: list[object], tmp_path: Path) -> None:
    workshop.run("latents-2d", *data, "--iterations", 2, "--out", tmp_path / "codes.png")
    assert Image.open(tmp_path / "codes.png").width > 5 * 190  # steps 0, 10, …, 40
    assert ".png" in workshop.run("latents-2d", *data, "--out", tmp_path / "codes.jpg", code=2).stderr
    assert "label among [9]" in workshop.error("latents-2d", *data, "--digit", 9, "--out", tmp_path / "none.png")
