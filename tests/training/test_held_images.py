"""Images that stay on the device: read once, equal to the bit, and only where that is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from own_images import Own
from PIL import Image
from torch import Tensor

from ebm_prior.data.images import ImageSource, from_array, open_images
from ebm_prior.model.checked_images import checked
from ebm_prior.training import held_images
from ebm_prior.training.held_images import HeldImages, held_bytes, on_device

CPU, SHAPE = torch.device("cpu"), (3, 4, 4)


@pytest.fixture
def folder(tmp_path: Path) -> ImageSource:
    random = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (4, 4, 3)).astype(np.uint8)).save(tmp_path / f"{number:02}.png")
    return open_images(str(tmp_path))


def test_pictures_of_a_folder_are_read_once(folder: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read = ImageSource.batch

    def spy(self: ImageSource, indices: Tensor) -> Tensor:
        asked.extend(indices.tolist())
        return read(self, indices)

    expected = folder.batch(range(12))
    monkeypatch.setattr(ImageSource, "batch", spy)
    held = on_device(folder, SHAPE, CPU)
    assert isinstance(held, HeldImages)
    assert (len(held), held.name, held_bytes(folder, SHAPE, CPU)) == (12, folder.name, 12 * 48)
    for rows in ([3, 1, 3], [1, 2], list(range(12)), [11, 0]):
        assert torch.equal(held.batch(rows), expected[rows])
    assert sorted(set(asked)) == list(range(12))
    assert len(asked) == 13, "but for the one that a batch had twice"


def test_all_values_of_8_bits_are_kept() -> None:
    source = from_array(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16))
    held = HeldImages(source, (1, 16, 16), CPU)
    for _ in range(2):
        assert torch.equal(held.batch([0]), source.batch([0]))


def test_images_of_more_bits_or_another_shape_are_passed_on() -> None:
    pixels = np.random.default_rng(0).random((6, *SHAPE), dtype=np.float32)
    pixels[0] = 1
    source = from_array(pixels)
    held = HeldImages(source, SHAPE, CPU)
    for rows in ([0], [1, 2], [0, 1]):
        assert torch.equal(held.batch(rows), source.batch(rows))
    wider = HeldImages(source, (3, 4, 5), CPU)
    assert torch.equal(wider.batch([0]), source.batch([0]))


def test_what_is_not_held(folder: ImageSource, images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    own = checked(Own(images.batch(range(100))))
    assert on_device(own, SHAPE, CPU) is own, "a user's own may differ from read to read"
    assert on_device(images, SHAPE, CPU) is images, "an array in memory, for the CPU"
    assert held_bytes(images, images.shape, torch.device("meta")) == 0, "a device of unknown memory"
    monkeypatch.setattr(held_images, "free_bytes", lambda device: 4 * 12 * 48)
    assert held_bytes(folder, SHAPE, CPU) == 12 * 48
    assert held_bytes(images, images.shape, torch.device("cuda")) == 0, "too large"
    monkeypatch.setattr(held_images, "free_bytes", lambda device: 4 * 12 * 48 - 1)
    assert on_device(folder, SHAPE, CPU) is folder
