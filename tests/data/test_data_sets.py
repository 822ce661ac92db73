"""Which images a path or a name stands for: splits, data sets by name, downloads, the bundled subset."""

from __future__ import annotations

import os
import pickle
import re
import runpy
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_writers import COLOUR, GREY, LABELS, everything, write_idx, write_npz, write_pictures

from ebm_prior.data.images import DATA_SET_NAMES, default_data_root, from_array, open_images
from ebm_prior.errors import ConfigurationError, DataError

# Splits.


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_the_split_chooses_among_subfolders(test_name: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", GREY[:4])
    with pytest.raises(DataError, match=r"no folder for the test split \(test or val\)"):
        open_images(tmp_path, split="test")
    write_pictures(tmp_path / test_name, GREY[4:])
    assert len(open_images(tmp_path)) == 4
    assert torch.equal(everything(open_images(tmp_path, split="test")), everything(from_array(GREY[4:])))


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_a_class_has_the_same_number_in_every_split(test_name: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", GREY, LABELS)
    write_pictures(tmp_path / test_name, GREY[:1], LABELS[:1])  # of class 2 alone
    for split, expected in (("train", [0, 0, 1, 1, 2, 2]), ("test", [2])):
        labels = open_images(tmp_path, split=split).labels  # type: ignore[arg-type]
        assert labels is not None
        assert labels.tolist() == expected
    labels = open_images(tmp_path / test_name).labels
    assert labels is not None
    assert labels.tolist() == [0]  # a folder of its own
    write_pictures(tmp_path / test_name, GREY[:1], np.array([7]))
    with pytest.raises(DataError, match=r"classes that .*train lacks: class 7"):
        open_images(tmp_path, split="test")


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


# Names.


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
    checkpoints = Path(__file__).resolve().parents[2] / "checkpoints"
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
