"""Image sources: the same pixels by every way in, indexing, labels and fingerprints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_writers import COLOUR, GREY, LABELS, Items, everything, write_idx, write_npy, write_npz, write_pictures
from PIL import Image
from torch.utils.data import TensorDataset

from ebm_prior.data.images import ImageSource, from_array, from_dataset, open_images
from ebm_prior.errors import ConfigurationError, DataError

WAYS: dict[str, Callable[[Path], ImageSource]] = {
    "npy grey": lambda d: open_images(write_npy(d / "a.npy", GREY)),
    "npy NHWC": lambda d: open_images(write_npy(d / "a.npy", COLOUR)),
    "npy NCHW": lambda d: open_images(write_npy(d / "a.npy", COLOUR.transpose(0, 3, 1, 2))),
    "npy float64": lambda d: open_images(write_npy(d / "a.npy", COLOUR / 255)),
    "npy big-endian float": lambda d: open_images(write_npy(d / "a.npy", (COLOUR / 255).astype(">f4"))),
    "npz": lambda d: open_images(write_npz(d / "a.npz", images=GREY, labels=LABELS)),
    "npz single": lambda d: open_images(write_npz(d / "a.npz", anything=COLOUR)),
    "idx": lambda d: open_images(write_idx(d / "some.idx3-ubyte", GREY)),
    "idx gz": lambda d: open_images(write_idx(d / "some-images-idx3-ubyte.gz", GREY)),
    "folder grey": lambda d: open_images(write_pictures(d / "p", GREY)),
    "folder colour": lambda d: open_images(write_pictures(d / "p", COLOUR)),
    "dataset of Pillow images": lambda d: from_dataset(Items([(Image.fromarray(x), 3) for x in COLOUR])),
    "dataset of arrays": lambda d: from_dataset(Items(list(GREY))),
    "dataset of tensors": lambda d: from_dataset(TensorDataset(torch.from_numpy(COLOUR).permute(0, 3, 1, 2) / 255)),
    "dataset of doubles": lambda d: from_dataset(TensorDataset(torch.from_numpy(GREY).double()[:, None] / 255)),
}


@pytest.mark.filterwarnings("error")  # torch warns of read-only memory
@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_gives_the_same_pixels(way: str, tmp_path: Path) -> None:
    source = WAYS[way](tmp_path)
    grey = source.shape[0] == 1
    expected = (GREY[:, None] if grey else COLOUR.transpose(0, 3, 1, 2)).astype(np.float32) / 255
    assert source.shape == expected.shape[1:]
    assert len(source) == 6
    found = everything(source)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)


def test_a_palette_loses_nothing(tmp_path: Path) -> None:
    palette = Image.fromarray(COLOUR[0] // 64 * 64).quantize(256)
    (tmp_path / "p").mkdir()
    palette.save(tmp_path / "p" / "a.png")
    assert Image.open(tmp_path / "p" / "a.png").mode == "P"
    expected = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1).float() / 255
    assert torch.equal(open_images(tmp_path / "p").batch([0])[0], expected)
    palette.save(tmp_path / "p" / "a.png", transparency=0)
    with pytest.raises(DataError, match="without transparency"):
        open_images(tmp_path / "p")


@settings(deadline=None)
@given(st.data())
def test_batches_and_subsets_are_indexing(data: st.DataObject) -> None:
    source = from_array(GREY, LABELS)
    rows = data.draw(st.lists(st.integers(0, 5), max_size=9))
    part = source.subset(torch.tensor(rows, dtype=torch.int32))
    assert len(part) == len(rows)
    assert part.labels is not None
    assert part.labels.tolist() == LABELS[rows].tolist()
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=4)) if rows else []
    expected = torch.from_numpy(GREY[rows][picks][:, None].astype(np.float32)) / 255
    assert torch.equal(part.batch(picks), expected)
    assert torch.equal(everything(part.subset(picks)), expected)


def test_a_batch_is_a_copy() -> None:
    source = from_array(GREY / 255)
    source.batch([0]).zero_()
    source.subset([0]).batch([0]).zero_()
    assert everything(source)[0].any()


def test_uint8_stays_uint8_in_memory() -> None:
    """50,000 CIFAR images are 150 MB, not 600."""
    assert from_array(COLOUR)._store.pixels.dtype == torch.uint8  # type: ignore[attr-defined]


def test_wrong_indices_are_refused() -> None:
    wrong: list[Any] = [[6], [-1], torch.tensor([True, False]), [0.5], torch.tensor(0), [[0, 1]]]
    for indices in wrong:
        for act in from_array(GREY).batch, from_array(GREY).subset:
            with pytest.raises(ConfigurationError, match="indices"):
                act(indices)


def test_an_array_with_two_readings_needs_the_image_shape() -> None:
    both = np.zeros((2, 3, 8, 1), np.uint8)
    with pytest.raises(DataError, match="two ways"):
        from_array(both)
    assert from_array(both, image_shape=(3, 8, 1)).shape == (3, 8, 1)
    assert from_array(both, image_shape=(1, 3, 8)).shape == (1, 3, 8)
    with pytest.raises(DataError, match="two ways"):
        from_array(both, image_shape=(1, 8, 3))


# Labels.


def test_subfolders_are_labels_as_in_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    folder = write_pictures(tmp_path / "p", COLOUR, LABELS)
    reference, source = ImageFolder(str(folder)), open_images(folder)
    assert source.labels is not None
    assert source.labels.tolist() == reference.targets
    for index, (image, _) in enumerate(reference):
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        assert torch.equal(source.batch([index])[0], expected)


def test_pictures_beside_subfolders_have_no_labels_and_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", GREY, LABELS)
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "a.png").write_bytes(b"")
    (folder / "class 0" / "._001.png").write_bytes(b"")
    (folder / "class 0" / "notes.txt").write_text("not a picture")
    assert open_images(folder).labels is not None
    assert len(open_images(folder)) == 6
    Image.fromarray(GREY[0]).save(folder / "loose.JPG")
    assert open_images(folder).labels is None
    assert len(open_images(folder)) == 7


def test_idx_labels_are_found_beside_the_images(tmp_path: Path) -> None:
    images = write_idx(tmp_path / "train-images-idx3-ubyte", GREY)
    assert open_images(images).labels is None
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", LABELS)
    labels = open_images(images).labels
    assert labels is not None
    assert labels.dtype == torch.int64
    assert labels.tolist() == LABELS.tolist()


def test_labels_in_a_column_and_of_a_dataset() -> None:
    for source in (
        from_array(GREY, LABELS[:, None]),
        from_dataset(TensorDataset(torch.from_numpy(GREY), torch.from_numpy(LABELS))),
        from_dataset(Items([(image, int(label), "more") for image, label in zip(GREY, LABELS, strict=True)])),
    ):
        assert source.labels is not None
        assert source.labels.tolist() == LABELS.tolist()
    assert from_dataset(Items([(image, np.zeros(3)) for image in GREY])).labels is None


# Fingerprints, and what an import costs.


def test_fingerprints_follow_content(tmp_path: Path) -> None:
    base = from_array(GREY)
    same = open_images(write_npz(tmp_path / "a.npz", images=GREY, labels=LABELS))
    assert base.fingerprint() == same.fingerprint() == base.subset(range(6)).fingerprint()
    changed = GREY.copy()
    changed[5, 4, 3] ^= 1
    reshaped = GREY.reshape(6, 4, 5)
    others = [from_array(changed), from_array(reshaped), base.subset(range(5)), base.subset([1, 0, 2, 3, 4, 5])]
    assert len({source.fingerprint() for source in [base, *others]}) == 5

    many = np.tile(GREY, (500, 1, 1))
    before = from_array(many.copy()).fingerprint()
    many[1900] ^= 1
    assert from_array(many).fingerprint() != before

    folder = write_pictures(tmp_path / "p", GREY)
    before = open_images(folder).fingerprint()
    folder = folder.rename(tmp_path / "moved")
    assert open_images(folder).fingerprint() == before
    (folder / "000.png").rename(folder / "0.png")
    assert open_images(folder).fingerprint() == before  # the same images in the same order
    (folder / "0.png").rename(folder / "last.png")
    assert open_images(folder).fingerprint() != before
    for index, pixels in enumerate((GREY, GREY ^ 1)):
        (tmp_path / f"bmp{index}").mkdir()
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / f"bmp{index}" / f"{number}.bmp")
    one, other = (open_images(tmp_path / f"bmp{index}").fingerprint() for index in range(2))
    assert one != other  # files of equal names and sizes


def test_torchvision_and_downloads_stay_out_of_an_import() -> None:
    code = (
        "import sys, ebm_prior.data.images, ebm_prior.pictures.grids; "
        "print({'torchvision', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
