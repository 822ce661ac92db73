"""Six small images and every form in which they can be stored: what the tests of data are given."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ebm_prior.data.images import ImageSource

GREY = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)  # (N, H, W)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)  # (N, H, W, C)
LABELS = np.array([2, 0, 1, 1, 0, 2], np.uint8)


class Items(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def write_idx(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_pictures(folder: Path, array: np.ndarray, labels: np.ndarray | None = None) -> Path:
    for index, pixels in enumerate(array):
        place = folder if labels is None else folder / f"class {labels[index]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{index:03}.png")
    return folder


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def write_npy(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def everything(source: ImageSource) -> torch.Tensor:
    return source.batch(range(len(source)))
