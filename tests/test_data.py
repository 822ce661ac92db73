"""Image sources: the same pixels by every way in, splits, labels, and what a user reads when something is wrong."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import runpy
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from ebm_prior import image_files
from ebm_prior.data import (
    DATA_SET_NAMES,
    ImageSource,
    default_data_root,
    from_array,
    from_dataset,
    open_images,
)
from ebm_prior.errors import ConfigurationError, DataError

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


# The same pixels by every way in.

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


@pytest.mark.parametrize("indices", [[6], [-1], torch.tensor([True, False]), [0.5], torch.tensor(0), [[0, 1]]])
def test_wrong_indices_are_refused(indices: Any) -> None:
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


# Splits, names and fingerprints.


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_the_split_chooses_among_subfolders(test_name: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", GREY[:4])
    with pytest.raises(DataError, match=r"no folder for the test split \(test or val\)"):
        open_images(tmp_path, split="test")
    write_pictures(tmp_path / test_name, GREY[4:])
    assert len(open_images(tmp_path)) == 4
    assert torch.equal(everything(open_images(tmp_path, split="test")), everything(from_array(GREY[4:])))


@pytest.mark.parametrize("raw", ["raw", "."])
def test_the_split_chooses_among_idx_files(raw: str, tmp_path: Path) -> None:
    write_idx(tmp_path / raw / "train-images-idx3-ubyte", GREY[:4])
    with pytest.raises(DataError, match="none of the test split"):
        open_images(tmp_path, split="test")
    write_idx(tmp_path / raw / "t10k-images-idx3-ubyte.gz", GREY[4:])
    assert len(open_images(tmp_path)) == 4
    assert len(open_images(tmp_path, split="test")) == 2


def test_the_split_chooses_among_arrays(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", x_train=GREY[:4], y_train=LABELS[:4], x_test=GREY[4:], y_test=LABELS[4:])
    test = open_images(path, split="test")
    assert test.name == f"{path}:x_test"
    assert test.labels is not None
    assert test.labels.tolist() == LABELS[4:].tolist()
    assert len(open_images(path)) == 4
    with pytest.raises(DataError, match=r"expected x_train .* found the keys x_test"):
        open_images(write_npz(tmp_path / "b.npz", x_test=GREY))
    with pytest.raises(ConfigurationError, match="'valid'"):
        open_images(path, split="valid")  # type: ignore[arg-type]


@pytest.mark.parametrize("keys", [("a", "b"), ("labels", "pictures"), ("x_train", "images"), ()])
def test_ambiguous_keys_are_listed(keys: tuple[str, ...], tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", **dict.fromkeys(keys, GREY))
    with pytest.raises(DataError, match=f"which array.*{', '.join(keys) or '(none)'}") as caught:
        open_images(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("spec", ["fashion-mnist", "FashionMNIST", "fashion_mnist"])
def test_a_name_is_read_in_torchvisions_layout(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte", GREY)
    assert open_images(spec, split="test", data_root=tmp_path).name == "fashion-mnist/test"
    monkeypatch.setenv("EBM_PRIOR_DATA", str(tmp_path))
    assert torch.equal(everything(open_images(spec, split="test")), everything(from_array(GREY)))


def test_a_name_is_read_from_an_archive_under_the_data_root(tmp_path: Path) -> None:
    write_npz(tmp_path / "cifar10.npz", x_train=COLOUR, y_train=LABELS[:, None], x_test=COLOUR[:2], y_test=LABELS[:2])
    source = open_images("CIFAR-10", split="test", data_root=tmp_path, image_shape=(3, 5, 4))
    assert torch.equal(everything(source), everything(from_array(COLOUR[:2])))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "MNIST/raw"),
        ("kmnist", "KMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("svhn", "test_32x32.mat"),
    ],
)
def test_a_missing_data_set_says_where_it_was_looked_for(name: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data-root DIR .* --download") as caught:
        open_images(name, split="test", data_root=tmp_path)
    assert str(tmp_path / place) in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_torchvision_data_sets_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR and SVHN in torchvision's layout; the MD5 check is switched off, since these are not the real ones."""
    from scipy.io import savemat
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(2).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    for index in range(5):
        rows = slice(2 * index, 2 * index + 2)
        batch = {"data": pixels[rows].reshape(2, -1), "labels": [index, index]}
        (folder / f"data_batch_{index + 1}").write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": []}))
    with pytest.raises(DataError, match="corrupted"):  # torchvision refuses to unpickle what it does not know
        open_images("cifar10", data_root=tmp_path)

    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    cifar = open_images("cifar10", data_root=tmp_path, download=True)
    assert torch.equal(everything(cifar), torch.from_numpy(pixels) / 255)
    assert cifar.labels is not None
    assert cifar.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    savemat(tmp_path / "test_32x32.mat", {"X": pixels.transpose(2, 3, 1, 0), "y": np.arange(1, 11)[:, None]})
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    svhn = open_images("svhn", split="test", data_root=tmp_path)
    assert torch.equal(everything(svhn), torch.from_numpy(pixels) / 255)
    assert svhn.labels is not None
    assert svhn.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_only_download_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision import datasets

    def fetch(self: Any) -> None:
        print("downloading")
        for prefix in "train", "t10k":
            write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", GREY)
            write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", LABELS)

    monkeypatch.setattr(datasets.MNIST, "download", fetch)
    with pytest.raises(DataError, match="--download"):
        open_images("mnist", data_root=tmp_path)
    assert torch.equal(
        everything(open_images("mnist", data_root=tmp_path, download=True)), everything(from_array(GREY))
    )

    assert capsys.readouterr().out == ""  # stdout is for results

    def offline(self: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.MNIST, "download", offline)
    assert len(open_images("mnist", data_root=tmp_path, download=True)) == 6  # already there: nothing is fetched
    with pytest.raises(DataError, match="no route to host"):
        open_images("kmnist", data_root=tmp_path, download=True)


def test_the_data_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBM_PRIOR_DATA", os.path.join("some", "where"))
    assert default_data_root() == Path("some", "where")
    monkeypatch.delenv("EBM_PRIOR_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join("the", "cache"))
    assert default_data_root() == Path("the", "cache", "ebm-prior", "data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_data_root() == Path.home() / ".cache" / "ebm-prior" / "data"


def test_a_path_object_is_never_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "mnist", GREY)
    assert len(open_images(Path("mnist"))) == 6
    assert len(open_images("./mnist")) == 6


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
    assert open_images(folder).fingerprint() != before


# What a user reads when something is wrong. Every message names the file.


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def filled(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def with_value(value: float, image: int = 2) -> np.ndarray:
    images = (GREY / 255).astype(np.float32)
    images[image:, 1, 1] = value
    return images


def picture(path: Path, mode: str, size: tuple[int, int] = (4, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def lying_header(path: Path) -> Path:
    header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 28, 28)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(100))
    return path


MISTAKES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda d: d / "nowhere", "no such file or folder.*fashion-mnist"),
    "empty folder": (lambda d: filled(d / "notes.txt", b"").parent, r"no images.*\.png"),
    "other file": (lambda d: filled(d / "a.txt", b"hello"), "expected a folder of images"),
    "empty npy": (lambda d: filled(d / "a.npy", b""), "cannot be read as a numpy"),
    "truncated npy": (lambda d: truncated(write_npy(d / "a.npy", GREY)), "cannot be read as a numpy"),
    "npy with a lying header": (lambda d: lying_header(d / "a.npy"), "cannot be read as a numpy"),
    "pickle": (lambda d: filled(d / "a.npy", pickle.dumps(GREY)), "cannot be read.*allow_pickle"),
    "objects": (lambda d: write_npy(d / "a.npy", np.array([None])), "cannot be read.*allow_pickle"),
    "truncated npz": (lambda d: truncated(write_npz(d / "a.npz", images=GREY)), "cannot be read as a numpy"),
    "no images": (lambda d: write_npy(d / "a.npy", GREY[:0]), r"no images.*\(0, 5, 4\)"),
    "integers": (lambda d: write_npy(d / "a.npy", GREY.astype(np.int64)), "uint8.*found int64"),
    "booleans": (lambda d: write_npy(d / "a.npy", GREY > 9), "uint8.*found bool"),
    "two axes": (lambda d: write_npy(d / "a.npy", GREY[0]), r"\(N, H, W\).*found \(5, 4\)"),
    "two channels": (lambda d: write_npy(d / "a.npy", COLOUR[..., :2]), r"C = 1 or 3, found \(6, 5, 4, 2\)"),
    "NaN": (lambda d: write_npy(d / "a.npy", with_value(np.nan)), r"NaN or infinite values in image 2 .*of 4 such"),
    "infinite": (lambda d: write_npy(d / "a.npy", with_value(np.inf, 5)), r"NaN or infinite values in image 5"),
    "huge": (lambda d: write_npy(d / "a.npy", with_value(0).astype(np.float64) + 1e300), r"infinite values in image 0"),
    "above one": (lambda d: write_npy(d / "a.npy", with_value(255)), r"to 255 in image 2 .*rescale"),
    "just above one": (lambda d: write_npy(d / "a.npy", with_value(1.001)), r"to 1.001 in image 2 "),
    "below zero": (lambda d: write_npy(d / "a.npy", with_value(-1)), r"from -1 to .* image 2"),
    "too few labels": (lambda d: write_npz(d / "a.npz", images=GREY, labels=LABELS[1:]), r"label per image \(6\)"),
    "fractional labels": (lambda d: write_npz(d / "a.npz", images=GREY, labels=LABELS / 2), "float64"),
    "idx of the wrong kind": (lambda d: write_idx(d / "a-idx3-ubyte", LABELS), "3 axes.*found 00 00 08 01"),
    "empty idx": (lambda d: filled(d / "a-idx3-ubyte", b""), "found an empty file"),
    "idx header only": (lambda d: filled(d / "a-idx3-ubyte", bytes((0, 0, 8, 3, 0))), "cannot be read as an idx"),
    "truncated idx": (lambda d: truncated(write_idx(d / "a-idx3-ubyte", GREY)), r"\(6, 5, 4\) = 120 bytes, found only"),
    "idx with more": (lambda d: filled(d / "a-idx3-ubyte", bytes((0, 0, 8, 3, *(0, 0, 0, 1) * 3, 7, 7))), "found more"),
    "truncated idx gz": (lambda d: truncated(write_idx(d / "a-idx3.gz", GREY)), "cannot be read as an idx"),
    "idx bomb": (lambda d: filled(d / "a-idx3-ubyte", bytes((0, 0, 8, 3, *[99] * 12))), "claim to hold"),
    "no picture": (lambda d: filled(d / "p" / "a.png", b"not a picture"), "cannot be read as an image"),
    "grey among colour": (
        lambda d: picture(picture(d / "p/a.png", "RGB").with_name("b.png"), "L"),
        "mixed sizes.*a.png",
    ),
    "mixed sizes": (
        lambda d: picture(picture(d / "p/a.png", "L").with_name("b.png"), "L", (5, 5)),
        r"\(1, 5, 5\).*a.png",
    ),
    "transparent": (lambda d: picture(d / "p" / "a.png", "RGBA"), r"mode RGBA.*convert\('RGB'\)"),
    "sixteen bits": (lambda d: picture(d / "p" / "a.png", "I;16"), "mode I;16"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_names_its_file(mistake: str, tmp_path: Path) -> None:
    make, message = MISTAKES[mistake]
    path = make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_images(path.parent if path.parent.name == "p" else path)
    assert str(path) in str(caught.value)
    assert "DataError" not in str(caught.value)  # one message, not one wrapped in another


def test_a_damaged_picture_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", np.tile(COLOUR, (1, 9, 9, 1)))
    damaged = truncated(folder / "003.png")
    source = open_images(folder)
    assert len(source.batch([0, 1, 2])) == 3
    with pytest.raises(DataError, match="cannot be read as an image") as caught:
        source.batch([2, 3])
    assert str(damaged) in str(caught.value)
    picture(folder / "002.png", "RGB")
    with pytest.raises(DataError, match=r"002.png: expected .*\(3, 45, 36\).*found \(3, 5, 4\)"):
        source.batch([2])


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


@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 4, 5), (3, 32, 32)])
def test_images_of_another_shape_than_the_backbones_are_refused(shape: tuple[int, int, int], tmp_path: Path) -> None:
    folder, array = write_pictures(tmp_path / "p", COLOUR), write_npy(tmp_path / "a.npy", COLOUR)
    dataset = Items([Image.fromarray(x) for x in COLOUR])
    message = f"expected .*{re.escape(str(shape))}.*found {re.escape('(3, 5, 4)')}"
    for open_them in (
        lambda shape: open_images(folder, image_shape=shape),
        lambda shape: open_images(array, image_shape=shape),
        lambda shape: from_dataset(dataset, image_shape=shape),
    ):
        assert open_them((3, 5, 4)).shape == (3, 5, 4)
        with pytest.raises(DataError, match=message):
            open_them(shape)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "length of 1 or more"),
        ([GREY[0], GREY[1, :4]], r"mine\[1\]: expected uint8 of shape \(5, 4\)"),
        ([GREY[0], GREY[1] / 255], r"mine\[1\]: .*found float64"),
        ([Image.new("L", (4, 5)), Image.new("RGBA", (4, 5))], r"mine\[1\]: .*RGBA"),
        ([{"image": GREY[0]}], "mine: expected uint8.*object"),
    ],
)
def test_mistakes_in_a_dataset_name_the_item(items: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_dataset(Items(items), name="mine")


def test_a_dataset_without_length_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(GREY)

    with pytest.raises(DataError, match="found a Stream"):
        from_dataset(Stream())


def test_an_archive_that_unpacks_to_nonsense_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_BOMB_BYTES", 2**16)
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((100, 64, 64), np.uint8))
    with pytest.raises(DataError, match=r"bomb\.npz.*claim to hold"):
        open_images(tmp_path / "bomb.npz")
    np.savez(tmp_path / "stored.npz", images=np.zeros((100, 64, 64), np.uint8))
    assert len(open_images(tmp_path / "stored.npz")) == 100


@settings(deadline=None)
@given(
    st.binary(max_size=300), st.sampled_from(["a.npy", "a.npz", "a-idx3-ubyte", "a-idx3.gz", "a.png"]), st.booleans()
)
def test_no_bytes_raise_anything_but_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str, signed: bool
) -> None:
    signature = {"a.npy": b"\x93NUMPY\x01\x00", "a.npz": b"PK\x03\x04", "a.png": b"\x89PNG\r\n\x1a\n"}
    signature |= {"a-idx3-ubyte": bytes((0, 0, 8, 3)), "a-idx3.gz": b"\x1f\x8b\x08"}
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(signature[name] * signed + content)
    with pytest.raises(DataError):
        open_images(path.parent if name == "a.png" else path)


def test_torchvision_and_downloads_stay_out_of_an_import() -> None:
    code = "import sys, ebm_prior.data, ebm_prior.figures; print({'torchvision', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# The bundled images.


def test_the_bundled_subset_is_balanced_and_needs_no_data_root(tmp_path: Path) -> None:
    assert "fashion-mnist-subset" in DATA_SET_NAMES
    for split, per_class in ("train", 600), ("test", 200):
        source = open_images("Fashion-MNIST-subset", split=split, data_root=tmp_path, image_shape=(1, 28, 28))  # type: ignore[arg-type]
        assert source.name == f"fashion-mnist-subset/{split}"
        assert source.labels is not None
        assert source.labels.bincount().tolist() == [per_class] * 10
        assert 0.2 < float(everything(source).mean()) < 0.35


def test_the_bundled_subset_is_what_its_recipe_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the recipe in checkpoints/DATA.md on the real data, and looks every image up in the official split."""
    if not os.environ.get("EBM_PRIOR_DATA"):
        pytest.skip("EBM_PRIOR_DATA names no folder with the real Fashion-MNIST")
    checkpoints = Path(__file__).resolve().parents[1] / "checkpoints"
    recipe = re.search(r"```python\n(.*?)```", (checkpoints / "DATA.md").read_text(encoding="utf-8"), re.DOTALL)
    assert recipe is not None
    (tmp_path / "recipe.py").write_text(recipe[1])
    monkeypatch.chdir(tmp_path)
    runpy.run_path("recipe.py")
    bundled, made = checkpoints / "fashion_mnist_subset.npz", tmp_path / "fashion_mnist_subset.npz"
    with zipfile.ZipFile(bundled) as one, zipfile.ZipFile(made) as other:
        assert one.namelist() == other.namelist()
        assert all(one.read(name) == other.read(name) for name in one.namelist())
    for split in "train", "test":
        part, official = open_images(bundled, split=split), open_images("fashion-mnist", split=split)  # type: ignore[arg-type]
        known = {bytes(x): y for x, y in zip(official._store.pixels.numpy(), official.labels, strict=True)}  # type: ignore
        assert all(known[bytes(x)] == y for x, y in zip(part._store.pixels.numpy(), part.labels, strict=True))  # type: ignore
