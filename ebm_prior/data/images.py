"""Image sources: random access to images in [0, 1], wherever they lie.

A folder of images, .npy and .npz arrays, idx files (MNIST), a torch Dataset, or the name of a known data set become an
`ImageSource`. Nothing is resized, padded or recoloured on the way: a backbone is trained on images of one shape, and a
resize nobody asked for changes every score, so another shape is an error that says what was expected and found.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ebm_prior.data.arrays import channels_first, checked_labels, require_unit_interval
from ebm_prior.data.image_files import (
    Shape,
    Split,
    find_idx,
    find_pictures,
    list_pictures,
    picture_classes,
    picture_pixels,
    picture_shape,
    read_idx,
    read_numpy,
    read_picture,
    reading,
    require_shape,
    split_folder,
)
from ebm_prior.errors import ConfigurationError, DataError
from ebm_prior.storage.atomic import user_cache

SUBSET = "fashion-mnist-subset"
_DATA_SETS = {  # name: (class in torchvision.datasets, where it keeps its files under the data root)
    "mnist": ("MNIST", "MNIST"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST"),
    "kmnist": ("KMNIST", "KMNIST"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "svhn": ("SVHN", "{split}_32x32.mat"),
}
DATA_SET_NAMES = (*_DATA_SETS, SUBSET)


class _Store(Protocol):
    """A store of pixels. `rows`: int64 (B,), already checked."""

    @property
    def shape(self) -> Shape: ...

    def __len__(self) -> int: ...

    def read(self, rows: Tensor) -> Tensor: ...

    def content(self, rows: Tensor) -> Iterator[bytes]: ...


class ImageSource:
    """Random access to N images of one shape. Made by `open_images`, `from_array` or `from_dataset`.

    name: what was read, for messages and records.  shape: (C, H, W).  labels: int64 (N,), or None.
    """

    def __init__(self, name: str, store: _Store, labels: Tensor | None = None, rows: Tensor | None = None) -> None:
        self.name = name
        self.shape = store.shape
        self.labels = labels
        self._store = store
        self._rows = torch.arange(len(store)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<ImageSource {self.name}: {len(self)} images {self.shape}, {'no ' * (self.labels is None)}labels>"

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images at `indices` (B,) as float32 (B, C, H, W) in [0, 1]; 8-bit pixels are divided by 255.

        Raises DataError, naming the file, if an image of a folder cannot be decoded.
        """
        return self._store.read(self._rows[self._checked(indices)])

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSource:
        """The source of just these images, in this order; the pixels are shared, not copied."""
        chosen = self._checked(indices)
        labels = None if self.labels is None else self.labels[chosen]
        return ImageSource(self.name, self._store, labels, self._rows[chosen])

    def fingerprint(self) -> str:
        """SHA-256 over shape and pixels, in order; for a folder, over the files as they are, whatever their names."""
        digest = hashlib.sha256(f"{len(self)} {self.shape}".encode())
        for chunk in self._store.content(self._rows):
            digest.update(chunk)
        return digest.hexdigest()

    def _checked(self, indices: Tensor | Sequence[int]) -> Tensor:
        found = torch.as_tensor(indices)
        if found.shape == (0,):  # an empty list has no integer type of its own
            return torch.empty(0, dtype=torch.int64)
        if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool:
            raise ConfigurationError(
                f"{self.name}: expected a list of integer indices, found {found.dtype} of shape {tuple(found.shape)}"
                " (for a mask, pass mask.nonzero()[:, 0])"
            )
        if found.min() < 0 or found.max() >= len(self):
            raise ConfigurationError(
                f"{self.name}: indices go from 0 to {len(self) - 1}, found {int(found.min())} to {int(found.max())}"
            )
        return found.to("cpu", torch.int64)


@dataclass(frozen=True, eq=False)
class _Arrays:
    """Pixels in memory, (N, C, H, W): uint8 is kept as such and scaled batch by batch; float32 is in [0, 1]."""

    pixels: Tensor
    shape: Shape

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, rows: Tensor) -> Tensor:
        pixels = self.pixels[rows]
        return pixels if pixels.dtype == torch.float32 else pixels.float().div_(255)

    def content(self, rows: Tensor) -> Iterator[bytes]:
        for start in range(0, len(rows), 1024):
            yield self.pixels[rows[start : start + 1024]].numpy().tobytes()


@dataclass(frozen=True, eq=False)
class _Folder:
    """Image files, decoded when they are read."""

    paths: list[Path]
    shape: Shape

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: Tensor) -> Tensor:
        pixels = np.empty((len(rows), *self.shape), np.uint8)
        for index, row in enumerate(rows.tolist()):
            pixels[index] = read_picture(self.paths[row], self.shape)
        return torch.from_numpy(pixels).float().div_(255)

    def content(self, rows: Tensor) -> Iterator[bytes]:
        for path in (self.paths[row] for row in rows.tolist()):
            with reading(path, "an image"):
                yield hashlib.sha256(path.read_bytes()).digest()


def open_images(
    spec: str | os.PathLike[str],
    *,
    split: Split = "train",
    data_root: str | os.PathLike[str] | None = None,
    image_shape: Shape | None = None,
    download: bool = False,
) -> ImageSource:
    """Open images by path or by the name of a data set. A string that is a known name means the data set.

    - a folder of png, jpg, jpeg, bmp or webp files, searched recursively and sorted. `split` chooses among train/ and
      test/ (or val/) where it has these. Images that all lie in subfolders are labelled by them (as torchvision does),
      with the numbers that train/ gives to their names.
    - .npy or .npz: (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 in 0..255 or float in [0, 1]. Keys of an .npz:
      x_train, y_train, x_test, y_test; or images, labels; or one array.
    - idx files as MNIST's, plain or .gz: the images file (labels are found beside it), or their folder.
    - one of `DATA_SET_NAMES` (case, hyphens and underscores do not matter), read under `data_root` (default: see
      `default_data_root`) in torchvision's layout or from NAME.npz. Downloaded only if `download` says so.

    split: also of a data set; a plain folder, an .npy file or an idx file has no splits and ignores it.
    image_shape: (C, H, W) that the images must have, usually the backbone's.
    Raises DataError, naming the file, where images are missing, unreadable, of mixed or wrong size, or not in [0, 1].
    """
    if split not in get_args(Split):
        raise ConfigurationError(f"split: expected 'train' or 'test', found {split!r}")
    name = known_data_set(spec) if isinstance(spec, str) else None
    if name is not None:
        root = default_data_root() if data_root is None else Path(data_root).expanduser()
        source = _open_named(name, split, root, image_shape, download)
        source.name = f"{name}/{split}"  # a record must not depend on where this machine keeps its data
        return source
    path = Path(os.path.expanduser(spec))
    if not os.path.exists(path):  # unlike Path's own, these two raise for no name, however long
        raise DataError(
            f"{path}: no such file or folder, nor the name of a data set ({', '.join(DATA_SET_NAMES)}); check the path"
        )
    return _open_path(path, split, image_shape)


def known_data_set(name: str) -> str | None:
    """The name in `DATA_SET_NAMES` of a data set; case, hyphens and underscores do not matter. None if it has none."""
    return {plain_name(known): known for known in DATA_SET_NAMES}.get(plain_name(name))


def default_data_root() -> Path:
    """The folder of data sets: $EBM_PRIOR_DATA, else ebm-prior/data in the user's cache directory."""
    if chosen := os.environ.get("EBM_PRIOR_DATA"):
        return Path(chosen).expanduser()
    return user_cache() / "data"


def from_array(
    images: ArrayLike, labels: ArrayLike | None = None, *, name: str = "array", image_shape: Shape | None = None
) -> ImageSource:
    """Images in memory: (N, H, W), (N, C, H, W) or (N, H, W, C) with 1 or 3 channels, uint8 or float in [0, 1].

    labels: integers (N,). `name` stands in messages and records. Memory is shared with `images` where that can be.
    Raises DataError for another shape or type, for NaN or values outside [0, 1], and for labels that do not fit.
    """
    array = np.asarray(images)
    if 0 in array.shape:
        raise DataError(f"{name}: no images, the array has shape {array.shape}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise DataError(f"{name}: expected uint8 in 0..255 or floats in [0, 1], found {array.dtype}; convert the array")
    array = channels_first(array, name, image_shape)
    shape = (array.shape[1], array.shape[2], array.shape[3])
    if image_shape is not None:
        require_shape(name, shape, image_shape)
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes inf, which is reported below
        dtype = np.uint8 if array.dtype == np.uint8 else np.float32
        pixels = torch.from_numpy(np.require(array, dtype, ["C", "W"]))
    if pixels.is_floating_point():
        require_unit_interval(name, pixels)
    return ImageSource(name, _Arrays(pixels, shape), checked_labels(labels, len(pixels), name))


def from_dataset(dataset: Dataset[Any], *, name: str = "dataset", image_shape: Shape | None = None) -> ImageSource:
    """Any torch Dataset with a length, whose items are images or (image, label, …).

    An image is a Pillow image, or a tensor or array as in `from_array` without the batch axis. The items are read once,
    now, into memory: a random augmentation is therefore frozen. A second entry that is an integer is the label;
    anything else there is left out. Raises DataError, naming the item, as `from_array` and `open_images` do.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise DataError(f"{name}: expected a Dataset with a length of 1 or more, found a {type(dataset).__name__}")
    first, _ = _item(dataset, 0, name)
    images = np.empty((len(dataset), *first.shape), first.dtype)
    labels: list[int] = []
    for index in range(len(dataset)):
        image, label = _item(dataset, index, name)
        if (image.shape, image.dtype) != (first.shape, first.dtype):
            raise DataError(
                f"{name}[{index}]: expected {first.dtype} of shape {first.shape} as in item 0, found {image.dtype} of"
                f" shape {image.shape}; make the images equal first"
            )
        images[index] = image
        labels += [] if label is None else [label]
    return from_array(images, labels if len(labels) == len(images) else None, name=name, image_shape=image_shape)


# Opening by path and by name.


def _open_path(path: Path, split: Split, image_shape: Shape | None) -> ImageSource:
    if path.is_dir():
        if idx := find_idx(path, split):
            return _open_idx(idx, image_shape)
        other: Split = "test" if split == "train" else "train"
        if idx := find_idx(path, other):
            raise DataError(f"{path}: has idx files of the {other} split ({idx.name}), but none of the {split} split")
        return _open_folder(path, split, image_shape)
    if path.suffix.lower() in (".npy", ".npz"):
        return _open_numpy(path, split, image_shape)
    if "idx3" in path.name.lower():
        return _open_idx(path, image_shape)
    raise DataError(f"{path}: expected a folder of images, .npy, .npz, or an idx file (…-images-idx3-ubyte, also .gz)")


def _open_folder(root: Path, split: Split, image_shape: Shape | None) -> ImageSource:
    folder = split_folder(root, split)
    paths, shape = find_pictures(folder, image_shape)
    labels = None
    if found := picture_classes(folder, paths):
        # A class must have the same number in every split, also where a split lacks one.
        train = root / "train"
        known = found if folder in (root, train) else picture_classes(train, list_pictures(train)) or found
        if strange := sorted(set(found) - set(known)):
            raise DataError(
                f"{folder}: holds classes that {train} lacks: {', '.join(strange)}. Add images of them there, or take "
                "these away"
            )
        number = {name: index for index, name in enumerate(sorted(set(known)))}
        labels = torch.tensor([number[name] for name in found])
    return ImageSource(str(folder), _Folder(paths, shape), labels)


def _open_numpy(path: Path, split: Split, image_shape: Shape | None) -> ImageSource:
    name, images, labels = read_numpy(path, split)
    return from_array(images, labels, name=name, image_shape=image_shape)


def _open_idx(path: Path, image_shape: Shape | None) -> ImageSource:
    images, labels = read_idx(path)
    return from_array(images, labels, name=str(path), image_shape=image_shape)


def _open_named(name: str, split: Split, root: Path, image_shape: Shape | None, download: bool) -> ImageSource:
    if name == SUBSET:
        with as_file(files("ebm_prior.checkpoints") / "fashion_mnist_subset.npz") as bundled:
            return _open_numpy(bundled, split, image_shape)
    archive = root / f"{name}.npz"
    if archive.exists():
        return _open_numpy(archive, split, image_shape)
    class_name, place = _DATA_SETS[name]
    where = root / place.format(split=split)
    has_idx = class_name.endswith("MNIST")
    idx = find_idx(where, split) if has_idx else None
    if not download and not (idx if has_idx else where.exists()):
        raise DataError(
            f"{name}: the {split} split is not in {where}{'/raw' * has_idx}, and there is no {archive};"
            " pass --data-root DIR (data_root=) for the folder that has it, --download (download=True) to fetch it, or"
            " other images as --data"
        )
    if idx:
        return _open_idx(idx, image_shape)
    dataset = _torchvision(class_name, root, split, download)
    labels = dataset.labels if class_name == "SVHN" else dataset.targets
    return from_array(dataset.data, labels, name=str(where), image_shape=image_shape)


def _torchvision(class_name: str, root: Path, split: Split, download: bool) -> Any:
    """torchvision's reader; it verifies the MD5 sums of CIFAR and SVHN before it opens them (CIFAR's are pickles)."""
    which = {"split": split} if class_name == "SVHN" else {"train": split == "train"}
    # Its progress messages go to stdout, which is for results.
    with reading(root, f"torchvision's {class_name}"), contextlib.redirect_stdout(sys.stderr):
        from torchvision import datasets

        return getattr(datasets, class_name)(root, download=download, **which)


def _item(dataset: Dataset[Any], index: int, name: str) -> tuple[NDArray[Any], int | None]:
    item = dataset[index]
    image, *rest = item if isinstance(item, (tuple, list)) else (item,)
    if isinstance(image, Image.Image):
        picture_shape(image, f"{name}[{index}]")
        image = picture_pixels(image)
    elif isinstance(image, Tensor):
        image = (image.float() if image.is_floating_point() else image).detach().cpu()
    label = np.asarray(rest[0] if rest else None)
    return np.asarray(image), int(label) if label.ndim == 0 and label.dtype.kind in "iu" else None


def plain_name(name: str) -> str:
    """A data set's name without case, hyphens and underscores, by which names are compared."""
    return name.lower().replace("-", "").replace("_", "")
