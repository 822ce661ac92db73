"""Image sources: random access to images in [0, 1], wherever they lie.

A folder of images, .npy and .npz arrays, idx files (MNIST), a torch Dataset, or the name of a known data set become an
`ImageSource`. Nothing is resized, padded or recoloured on the way: a backbone is trained on images of one shape, and a
resize nobody asked for changes every score, so another shape is an error that says what was expected and found.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ebm_prior.errors import ConfigurationError, DataError

Split = Literal["train", "test"]
Shape = tuple[int, int, int]

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

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_MODES = {"1": 1, "L": 1, "P": 3, "RGB": 3}  # Pillow modes that become 8-bit channels without losing anything
_IDX_PREFIX = {"train": "train", "test": "t10k"}
_SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
_BOMB_BYTES, _BOMB_RATIO = 2**32, 250  # pictures do not compress like this; an archive made to fill the memory does


class _Store(Protocol):
    """Where the pixels are. `rows`: int64 (B,), already checked."""

    shape: Shape

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

        Raises DataError, naming the file, if an image of a folder has become unreadable.
        """
        return self._store.read(self._rows[self._checked(indices)])

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSource:
        """The source of just these images, in this order; the pixels are shared, not copied."""
        chosen = self._checked(indices)
        labels = None if self.labels is None else self.labels[chosen]
        return ImageSource(self.name, self._store, labels, self._rows[chosen])

    def fingerprint(self) -> str:
        """SHA-256 over shape and pixels, in order; for a folder, over the files' relative names and sizes."""
        digest = hashlib.sha256(f"{len(self)} {self.shape}".encode())
        for chunk in self._store.content(self._rows):
            digest.update(chunk)
        return digest.hexdigest()

    def _checked(self, indices: Tensor | Sequence[int]) -> Tensor:
        found = torch.as_tensor(indices)
        if not len(found):
            return torch.empty(0, dtype=torch.int64)
        if found.ndim != 1 or found.dtype.is_floating_point or found.dtype == torch.bool:
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
        return (self.pixels[chunk].numpy().tobytes() for chunk in rows.split(1024))


@dataclass(frozen=True, eq=False)
class _Folder:
    """Image files, decoded when they are read."""

    root: Path
    paths: list[Path]
    shape: Shape

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: Tensor) -> Tensor:
        decoded = [torch.from_numpy(self._decode(self.paths[row])) for row in rows.tolist()]
        return torch.stack(decoded).float().div_(255) if decoded else torch.empty(0, *self.shape)

    def content(self, rows: Tensor) -> Iterator[bytes]:
        for path in (self.paths[row] for row in rows.tolist()):
            yield f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n".encode()

    def _decode(self, path: Path) -> NDArray[np.uint8]:
        with _reading(path, "an image"), Image.open(path) as image:
            _require_shape(str(path), _picture_shape(image, str(path)), self.shape)
            return _picture_pixels(image)


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
      test/ (or val/) where it has these. Images that all lie in subfolders are labelled by them (as torchvision does).
    - .npy or .npz: (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 in 0..255 or float in [0, 1]. Keys of an .npz:
      x_train, y_train, x_test, y_test; or images, labels; or one array.
    - idx files as MNIST's, plain or .gz: the images file (labels are found beside it), or their folder.
    - one of `DATA_SET_NAMES` (case, hyphens and underscores do not matter), read under `data_root` (default: see
      `default_data_root`) in torchvision's layout or from NAME.npz. Downloaded only if `download` says so.

    split: also of a data set; a plain folder, an .npy file or an idx file has no splits and ignores it.
    image_shape: (C, H, W) that the images must have, usually the backbone's.
    Raises DataError, naming the file, where images are missing, unreadable, of mixed or wrong size, or not in [0, 1].
    """
    if split not in _IDX_PREFIX:
        raise ConfigurationError(f"split: expected 'train' or 'test', found {split!r}")
    name = {_plain(known): known for known in DATA_SET_NAMES}.get(_plain(spec)) if isinstance(spec, str) else None
    if name is not None:
        root = default_data_root() if data_root is None else Path(data_root).expanduser()
        source = _open_named(name, split, root, image_shape, download)
        source.name = f"{name}/{split}"  # a record must not depend on where this machine keeps its data
        return source
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder, and no data set name; known are {', '.join(DATA_SET_NAMES)}")
    return _open_path(path, split, image_shape)


def default_data_root() -> Path:
    """Where data sets are looked for: $EBM_PRIOR_DATA, else ebm-prior/data in the user's cache directory."""
    if chosen := os.environ.get("EBM_PRIOR_DATA"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ebm-prior" / "data"


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
        raise DataError(f"{name}: expected uint8 in 0..255 or floats in [0, 1], found {array.dtype}")
    array = _channels_first(array, name, image_shape)
    shape = (array.shape[1], array.shape[2], array.shape[3])
    if image_shape is not None:
        _require_shape(name, shape, image_shape)
    dtype = np.uint8 if array.dtype == np.uint8 else np.float32
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes inf, which is reported below
        pixels = torch.from_numpy(np.require(array, dtype, ["C", "W"]))
    if dtype == np.float32:
        _require_unit_interval(name, pixels)
    return ImageSource(name, _Arrays(pixels, shape), _labels(labels, len(pixels), name))


def from_dataset(dataset: Dataset[Any], *, name: str = "dataset", image_shape: Shape | None = None) -> ImageSource:
    """Any torch Dataset with a length, whose items are images or (image, label, …).

    An image is a Pillow image, or a tensor or array as in `from_array` without the batch axis. The items are read once,
    now, into memory: a random augmentation is therefore frozen. A second entry that is an integer is the label;
    anything else there is left out. Raises DataError, naming the item, as `from_array` and `open_images` do.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise DataError(f"{name}: expected a map-style Dataset with a length of 1 or more, found {type(dataset)}")
    first, _ = _item(dataset, 0, name)
    images = np.empty((len(dataset), *first.shape), first.dtype)
    labels: list[int | None] = []
    for index in range(len(dataset)):
        image, label = _item(dataset, index, name)
        if (image.shape, image.dtype) != (first.shape, first.dtype):
            raise DataError(
                f"{name}[{index}]: expected {first.dtype} {first.shape} as item 0, found {image.dtype} {image.shape}"
            )
        images[index] = image
        labels.append(label)
    return from_array(images, None if None in labels else labels, name=name, image_shape=image_shape)  # type: ignore[arg-type]


# Paths.


def _open_path(path: Path, split: Split, image_shape: Shape | None) -> ImageSource:
    if path.is_dir():
        if idx := _find_idx(path, split):
            return _open_idx(idx, image_shape)
        other: Split = "test" if split == "train" else "train"
        if idx := _find_idx(path, other):
            raise DataError(f"{path}: has idx files of the {other} split ({idx.name}), but none of the {split} split")
        return _open_folder(_split_folder(path, split), image_shape)
    if path.suffix.lower() in (".npy", ".npz"):
        return _open_numpy(path, split, image_shape)
    if "idx3" in path.name.lower():
        return _open_idx(path, image_shape)
    raise DataError(f"{path}: expected a folder of images, .npy, .npz, or an idx file (…-images-idx3-ubyte, also .gz)")


def _split_folder(folder: Path, split: Split) -> Path:
    present = [name for names in _SPLIT_FOLDERS.values() for name in names if (folder / name).is_dir()]
    if not present:
        return folder
    for name in _SPLIT_FOLDERS[split]:
        if name in present:
            return folder / name
    raise DataError(
        f"{folder}: has {', '.join(present)} but no folder for the {split} split"
        f" ({' or '.join(_SPLIT_FOLDERS[split])}); add it, or pass the folder of images itself"
    )


def _open_folder(folder: Path, image_shape: Shape | None) -> ImageSource:
    paths = []
    for place, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths += [
            Path(place, name)
            for name in names
            if Path(name).suffix.lower() in _IMAGE_SUFFIXES and not name.startswith(".")
        ]
    if not paths:
        raise DataError(f"{folder}: no images in this folder (looked for {', '.join(sorted(_IMAGE_SUFFIXES))})")
    paths.sort(key=lambda path: path.relative_to(folder).parts)
    shape = image_shape
    for path in paths:  # headers only: a wrong size must show now, not after an hour of training
        with _reading(path, "an image"), Image.open(path) as image:
            found = _picture_shape(image, str(path))
        if shape is None:
            shape = found
        elif image_shape is None and found != shape:
            raise DataError(
                f"{path}: the images are of mixed sizes, this one is {found}, {paths[0].name} is {shape}"
                " (channels, height, width); make them equal first"
            )
        _require_shape(str(path), found, shape)
    assert shape is not None  # there is at least one path
    return ImageSource(str(folder), _Folder(folder, paths, shape), _folder_labels(folder, paths))


def _folder_labels(folder: Path, paths: list[Path]) -> Tensor | None:
    parts = [path.relative_to(folder).parts for path in paths]
    if any(len(part) == 1 for part in parts):
        return None
    number = {name: index for index, name in enumerate(sorted({part[0] for part in parts}))}
    return torch.tensor([number[part[0]] for part in parts])


def _open_numpy(path: Path, split: Split, image_shape: Shape | None) -> ImageSource:
    name, labels = str(path), None
    with _reading(path, "a numpy array file"):
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            images = loaded
        else:
            with loaded:
                for member in loaded.zip.infolist():
                    _refuse_bomb(path, member.compress_size, member.file_size)
                image_key, label_key = _npz_keys(path, loaded.files, split)
                images = loaded[image_key]
                labels = loaded[label_key] if label_key in loaded.files else None
                name = f"{path}:{image_key}"
    return from_array(images, labels, name=name, image_shape=image_shape)


def _npz_keys(path: Path, keys: list[str], split: Split) -> tuple[str, str]:
    pairs = [pair for pair in ((f"x_{split}", f"y_{split}"), ("images", "labels")) if pair[0] in keys]
    if len(pairs) == 1:
        return pairs[0]
    if not pairs and {"x_train", "x_test"} & set(keys):
        raise DataError(f"{path}: expected x_{split} for the {split} split, found the keys {', '.join(keys)}")
    if len(keys) == 1:
        return keys[0], ""
    raise DataError(
        f"{path}: which array holds the images? Expected x_{split} (and y_{split}), or images (and labels), or a single"
        f" array; found the keys {', '.join(keys) or '(none)'}"
    )


def _find_idx(folder: Path, split: Split) -> Path | None:
    candidates = [
        place / f"{_IDX_PREFIX[split]}-images-idx3-ubyte{ending}"
        for place in (folder / "raw", folder)
        for ending in ("", ".gz")
    ]
    return next((path for path in candidates if path.is_file()), None)


def _open_idx(path: Path, image_shape: Shape | None) -> ImageSource:
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    beside = [path.with_name(name), path.with_name(f"{name}.gz")]
    labels = next((_read_idx(file, 1) for file in beside if file.is_file()), None)
    return from_array(_read_idx(path, 3), labels, name=str(path), image_shape=image_shape)


def _read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The idx format: bytes 0, 0, type (8: uint8), number of axes; the axes as big-endian uint32; the data."""
    with _reading(path, "an idx file"), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        magic = file.read(4)
        if magic != bytes((0, 0, 8, ndim)):
            raise DataError(f"{path}: expected an idx file of uint8 with {ndim} axes, found the magic {magic.hex(' ')}")
        sizes = struct.unpack(f">{ndim}I", file.read(4 * ndim))
        _refuse_bomb(path, path.stat().st_size, math.prod(sizes))
        data = file.read(math.prod(sizes) + 1)
    if len(data) != math.prod(sizes):
        found = f"only {len(data)}" if len(data) < math.prod(sizes) else "more"
        raise DataError(
            f"{path}: the header promises {sizes} = {math.prod(sizes)} bytes, found {found}; is the file damaged?"
        )
    return np.frombuffer(data, np.uint8).reshape(sizes)


# Data sets known by name.


def _open_named(name: str, split: Split, root: Path, image_shape: Shape | None, download: bool) -> ImageSource:
    if name == SUBSET:
        with as_file(files("ebm_prior.checkpoints") / "fashion_mnist_subset.npz") as bundled:
            return _open_numpy(bundled, split, image_shape)
    archive = root / f"{name}.npz"
    if archive.exists():
        return _open_numpy(archive, split, image_shape)
    class_name, place = _DATA_SETS[name]
    place = place.format(split=split)
    has_idx = class_name.endswith("MNIST")
    found = _find_idx(root / place, split) is not None if has_idx else (root / place).exists()
    if not found and not download:
        raise DataError(
            f"{name}: the {split} split is not in {root / place}{'/raw' * has_idx}, and there is no {archive};"
            " pass --data-root DIR (data_root=) for the folder that has it, or --download (download=True) to fetch it"
        )
    if not has_idx or not found:
        dataset = _torchvision(class_name, root, split, download)
    if idx := _find_idx(root / place, split) if has_idx else None:
        return _open_idx(idx, image_shape)
    labels = dataset.labels if class_name == "SVHN" else dataset.targets
    return from_array(dataset.data, labels, name=str(root / place), image_shape=image_shape)


def _torchvision(class_name: str, root: Path, split: Split, download: bool) -> Any:
    """torchvision's reader; it verifies the MD5 sums of CIFAR and SVHN before it opens them (CIFAR's are pickles)."""
    which = {"split": split} if class_name == "SVHN" else {"train": split == "train"}
    # Its progress messages go to stdout, which is for results.
    with _reading(root, f"torchvision's {class_name}"), contextlib.redirect_stdout(sys.stderr):
        from torchvision import datasets

        return getattr(datasets, class_name)(root, download=download, **which)


# Checks and conversions.


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a decoder raises on a damaged or hostile file (nearly anything) into a DataError with its name."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path}: cannot be read as {what} ({type(error).__name__}: {error}); is it complete and of that format?"
        ) from error


def _refuse_bomb(path: Path, packed: int, unpacked: int) -> None:
    if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * packed:
        raise DataError(
            f"{path}: {packed} bytes claim to hold {unpacked / 2**30:.1f} GiB, which no file of images does;"
            " if it is what you want, store it uncompressed"
        )


def _require_shape(name: str, found: Shape, expected: Shape) -> None:
    if found != tuple(expected):
        raise DataError(
            f"{name}: expected images of shape {tuple(expected)} (channels, height, width), found {found}. Images are"
            " never resized or recoloured silently: convert them beforehand, or choose a backbone of their shape"
        )


def _require_unit_interval(name: str, pixels: Tensor) -> None:
    low, high = pixels.flatten(1).amin(1), pixels.flatten(1).amax(1)  # NaN spreads to both
    bad = ~((low >= 0) & (high <= 1))
    if bad.any():
        first = int(bad.nonzero()[0])
        finite = bool(pixels[first].isfinite().all())
        problem = f"values from {low[first]:g} to {high[first]:g}" if finite else "NaN or infinite values"
        raise DataError(
            f"{name}: expected float images in [0, 1], found {problem} in image {first} (the first of {int(bad.sum())}"
            f" such); {'rescale them, or store uint8 in 0..255' if finite else 'repair or remove them'}"
        )


def _channels_first(array: NDArray[Any], name: str, image_shape: Shape | None) -> NDArray[Any]:
    """(N, H, W), (N, C, H, W) or (N, H, W, C) as (N, C, H, W); `image_shape` decides between the last two."""
    readings = []
    if array.ndim == 3:
        readings = [array[:, None]]
    elif array.ndim == 4:
        readings += [array] if array.shape[1] in (1, 3) else []
        readings += [array.transpose(0, 3, 1, 2)] if array.shape[3] in (1, 3) else []
    if len(readings) == 2 and image_shape is not None:
        readings = [reading for reading in readings if reading.shape[1:] == tuple(image_shape)] or readings
    if len(readings) != 1:
        raise DataError(
            f"{name}: expected an array (N, H, W), (N, C, H, W) or (N, H, W, C) with C = 1 or 3, found {array.shape}"
            f"{', which can be read in two ways' if readings else ''}"
        )
    return readings[0]


def _labels(labels: ArrayLike | None, count: int, name: str) -> Tensor | None:
    if labels is None:
        return None
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:  # as Keras stores CIFAR's
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) != count:
        raise DataError(f"{name}: expected {count} integer labels, found {array.dtype} of shape {array.shape}")
    return torch.from_numpy(array.astype(np.int64))


def _picture_shape(image: Image.Image, name: str) -> Shape:
    if image.mode not in _MODES or "transparency" in image.info:
        raise DataError(
            f"{name}: expected an 8-bit grey or RGB image without transparency, found mode {image.mode}; convert it,"
            " for instance with Pillow's image.convert('RGB')"
        )
    return _MODES[image.mode], image.height, image.width


def _picture_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """(C, H, W) uint8."""
    if _MODES[image.mode] == 1:
        return np.array(image.convert("L"))[None]
    return np.array(image.convert("RGB")).transpose(2, 0, 1)


def _item(dataset: Dataset[Any], index: int, name: str) -> tuple[NDArray[Any], int | None]:
    item = dataset[index]
    image, label = (item[0], item[1] if len(item) > 1 else None) if isinstance(item, (tuple, list)) else (item, None)
    if isinstance(image, Image.Image):
        _picture_shape(image, f"{name}[{index}]")
        image = _picture_pixels(image)
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    scalar = np.asarray(label)
    return array, int(scalar) if scalar.ndim == 0 and scalar.dtype.kind in "iu" else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
