"""Reading images from files as numpy arrays: pictures, idx, .npy and .npz. `data.images` makes sources of them.

No file is trusted: nothing is unpickled, sizes in headers are checked before memory is taken for them, and whatever a
decoder raises becomes a DataError with the file's name.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ebm_prior.errors import DataError

Split = Literal["train", "test"]
Shape = tuple[int, int, int]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_MODES = {"1": 1, "L": 1, "P": 3, "RGB": 3}  # Pillow modes that become 8-bit channels without losing anything
_IDX_PREFIX = {"train": "train", "test": "t10k"}
_SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
_BOMB_BYTES, _BOMB_RATIO = 2**32, 250  # pictures do not compress like this; an archive made to fill the memory does


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a decoder raises on a damaged or hostile file (nearly anything) into a DataError with its name."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path}: cannot be read as {what} ({type(error).__name__}: {error}); is it complete and of that format?"
        ) from error


def require_shape(name: str, found: Shape, expected: Shape) -> None:
    """Raise DataError unless the images called `name` have the expected (C, H, W)."""
    if found != tuple(expected):
        raise DataError(
            f"{name}: expected images of shape {tuple(expected)} (channels, height, width), found {found}. Images are"
            " never resized or recoloured silently: convert them beforehand, or choose a backbone of their shape"
        )


# Pictures.


def picture_shape(image: Image.Image, name: str) -> Shape:
    """(C, H, W) of a Pillow image, from its header. Raises DataError for a mode that would lose something."""
    if image.mode not in _MODES or "transparency" in image.info:
        raise DataError(
            f"{name}: expected an 8-bit grey or RGB image without transparency, found mode {image.mode}; convert it,"
            " for instance with Pillow's image.convert('RGB')"
        )
    return _MODES[image.mode], image.height, image.width


def picture_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels (C, H, W) of a Pillow image that `picture_shape` accepts."""
    grey = _MODES[image.mode] == 1
    pixels: NDArray[np.uint8] = np.array(image.convert("L" if grey else "RGB"))
    return pixels[None] if grey else np.moveaxis(pixels, 2, 0)


def read_picture(path: Path, expected: Shape) -> NDArray[np.uint8]:
    """Decode one image file, (C, H, W) as expected."""
    with reading(path, "an image"), Image.open(path) as image:
        require_shape(str(path), picture_shape(image, str(path)), expected)
        return picture_pixels(image)


def list_pictures(folder: Path) -> list[Path]:
    """The image files below `folder`, sorted.

    Names that start with a dot are skipped: thumbnails, notebook checkpoints, what macOS leaves on foreign disks.
    """
    paths = [
        Path(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in _SUFFIXES
    ]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(paths, key=lambda path: path.relative_to(folder).parts)


def find_pictures(folder: Path, image_shape: Shape | None) -> tuple[list[Path], Shape]:
    """`list_pictures` and their common (C, H, W), which must be `image_shape` if given.

    Every header is read here: a wrong size must show at the start, not after an hour of training.
    """
    paths = list_pictures(folder)
    if not paths:
        raise DataError(f"{folder}: no images in this folder (looked for {', '.join(sorted(_SUFFIXES))})")
    shape = image_shape
    for path in paths:
        with reading(path, "an image"), Image.open(path) as image:
            found = picture_shape(image, str(path))
        shape = shape or found
        if image_shape is None and found != shape:
            raise DataError(
                f"{path}: the images are of mixed sizes, this one is {found}, {paths[0].name} is {shape}"
                " (channels, height, width); make them equal first"
            )
        require_shape(str(path), found, shape)
    return paths, shape or found


def picture_classes(folder: Path, paths: Sequence[Path]) -> list[str] | None:
    """The name of the subfolder of `folder` that holds each of the files; None if a file lies in no subfolder."""
    parts = [path.relative_to(folder).parts for path in paths]
    return [part[0] for part in parts] if all(len(part) > 1 for part in parts) else None


def split_folder(folder: Path, split: Split) -> Path:
    """The subfolder that holds `split`, or `folder` itself if it has no subfolders named after splits."""
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


# idx files.


def find_idx(folder: Path, split: Split) -> Path | None:
    """The idx file of the split's images in `folder` or its raw/ (torchvision's layout), plain or .gz."""
    name = f"{_IDX_PREFIX[split]}-images-idx3-ubyte"
    candidates = [place / f"{name}{ending}" for place in (folder / "raw", folder) for ending in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Images (N, H, W) of an idx3 file, and labels (N,) of the idx1 file beside it, if there is one."""
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    beside = [path.with_name(name), path.with_name(f"{name}.gz")]
    labels = next((_read_idx(file, 1) for file in beside if file.is_file()), None)
    return _read_idx(path, 3), labels


def _read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The format: bytes 0, 0, the type (8: uint8), the number of axes; the axes as big-endian uint32; the data."""
    with reading(path, "an idx file"), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        magic = file.read(4)
        if magic != bytes((0, 0, 8, ndim)):
            raise DataError(
                f"{path}: expected an idx file of uint8 with {ndim} axes, which starts with 00 00 08 0{ndim}, found"
                f" {magic.hex(' ') or 'an empty file'}"
            )
        sizes = struct.unpack(f">{ndim}I", file.read(4 * ndim))
        promised = math.prod(sizes)
        _refuse_bomb(path, path.stat().st_size, promised)
        data = file.read(promised + 1)
    if len(data) != promised:
        found = f"only {len(data)}" if len(data) < promised else "more"
        raise DataError(f"{path}: the header promises {sizes} = {promised} bytes, found {found}; is the file damaged?")
    return np.frombuffer(data, np.uint8).reshape(sizes)


# numpy files.


def read_numpy(path: Path, split: Split) -> tuple[str, NDArray[Any], NDArray[Any] | None]:
    """A name for what was read, the images and the labels (None if absent) of an .npy or .npz file, unchecked."""
    with reading(path, "a numpy array file"):
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return str(path), loaded, None
        with loaded:
            for member in loaded.zip.infolist():
                _refuse_bomb(path, member.compress_size, member.file_size)
            images, labels = _npz_keys(path, loaded.files, split)
            return f"{path}:{images}", loaded[images], loaded[labels] if labels in loaded.files else None


def _npz_keys(path: Path, keys: list[str], split: Split) -> tuple[str, str]:
    """Which arrays of an archive are the images and the labels of the split."""
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


def _refuse_bomb(path: Path, packed: int, unpacked: int) -> None:
    if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * packed:
        raise DataError(
            f"{path}: {packed} bytes claim to hold {unpacked / 2**30:.1f} GiB, which no file of images does;"
            " if it is what you want, store it uncompressed"
        )
