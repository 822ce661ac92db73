"""Opening images from a folder, arrays, idx files, an LMDB, or by the name of a known data set.

Images are never resized or padded, and recoloured only on request. A backbone is trained on images of one shape, and an
unnoticed resize would change every score. So images of another shape are an error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, get_args

from ebm_prior.data.arrays import from_array, require_shape
from ebm_prior.data.datasets import from_dataset
from ebm_prior.data.folders import open_folder
from ebm_prior.data.image_files import find_idx, read_idx, read_numpy, reading, special_kind
from ebm_prior.data.lmdb_files import find_lmdb, open_lmdb
from ebm_prior.data.mat_files import SVHN_FILE, find_mat, read_mat
from ebm_prior.data.source import ImageSource, Mode, Origin, Shape, Split
from ebm_prior.errors import ConfigurationError, DataError
from ebm_prior.storage.atomic import user_cache

__all__ = [
    "DATA_SET_NAMES",
    "SUBSET",
    "ImageSource",
    "default_data_root",
    "from_array",
    "from_dataset",
    "known_data_set",
    "open_images",
]

SUBSET = "fashion-mnist-subset"
_DATA_SETS = {  # name: (class in torchvision.datasets, where it keeps its files under the data root)
    "mnist": ("MNIST", "MNIST"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST"),
    "kmnist": ("KMNIST", "KMNIST"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "svhn": ("SVHN", SVHN_FILE),
}
DATA_SET_NAMES = (*_DATA_SETS, SUBSET)


def open_images(
    spec: str | os.PathLike[str],
    *,
    split: Split = "train",
    data_root: str | os.PathLike[str] | None = None,
    image_shape: Shape | None = None,
    download: bool = False,
    array: str | None = None,
    mode: Mode | None = None,
) -> ImageSource:
    """Open images by path or by the name of a data set. A string that is a known name means the data set.

    - a folder of png, jpg, jpeg, bmp or webp files, searched recursively and sorted; each real file counts once.
      `split` chooses among train/ and test/ (or val/) where it has these. Images that all lie in subfolders are
      labelled by them (as torchvision's ImageFolder does), with the numbers that train/ gives to their names.
    - .npy or .npz: (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 in 0..255 or float in [0, 1]. Keys of an .npz:
      x_train, y_train, x_test, y_test; or images, labels; or one array; or `array`, as in PATH.npz:KEY.
    - idx files as MNIST's, plain or .gz: the images file (labels are found beside it), or their folder.
    - .mat files as SVHN's, or the folder of train_32x32.mat and test_32x32.mat.
    - an LMDB as NVAE's recipes write it (pictures or pixels, by number), or a folder with train.lmdb and test.lmdb or
      validation.lmdb; needs the extra `lmdb`.
    - one of `DATA_SET_NAMES` (case, hyphens and underscores do not matter), read under `data_root` (default: see
      `default_data_root`) in torchvision's layout or from NAME.npz. Downloaded only if `download` says so.

    split: also of a data set; a plain folder, an .npy file or an idx file has no splits and ignores it.
    image_shape: (C, H, W) that the images must have, usually the backbone's.
    mode: "rgb" or "grey" converts the colours, for instance of a folder that has both kinds.
    Raises DataError, naming the file, where images are missing, unreadable, of mixed or wrong size, or not in [0, 1];
    MemoryLimitError where arrays do not fit in free memory; ConfigurationError for arguments that make no sense.

    >>> open_images("fashion-mnist-subset", split="test")
    <ImageSource fashion-mnist-subset/test: 2000 images (1, 28, 28), labels>
    """
    if split not in get_args(Split):
        raise ConfigurationError(f"split: expected 'train' or 'test', found {split!r}")
    if mode not in (None, *get_args(Mode)):
        raise ConfigurationError(f"--data-mode (mode): expected 'rgb' or 'grey', found {mode!r}")
    _require_words("--data", spec)
    _require_words("--data-root (data_root)", data_root)
    given = os.fsdecode(spec)
    name = known_data_set(spec) if isinstance(spec, str) else None
    if name is None:
        path, array = _existing(given, array)
        source = _open_path(path, split, image_shape, array, mode)
        source.origin = Origin(os.path.abspath(path), given, split, source.shape, None, array, mode)
        return source
    if array is not None:
        raise ConfigurationError(f"--array (array=) chooses among the arrays of an .npz file, but {name} is a data set")
    root = (default_data_root() if data_root is None else Path(data_root)).expanduser()
    source = _open_named(name, split, root, image_shape, mode, download)
    source.name = f"{name}/{split}"  # a record must not depend on where this machine keeps its data
    source.origin = Origin(name, given, split, source.shape, os.path.abspath(root), None, mode)
    return source


def known_data_set(name: str) -> str | None:
    """The data set's name in `DATA_SET_NAMES`, without regard to case, hyphens and underscores; None if unknown."""
    return {plain_name(known): known for known in DATA_SET_NAMES}.get(plain_name(name))


def default_data_root() -> Path:
    """The default folder of data sets: $EBM_PRIOR_DATA, else ebm-prior/data in the user's cache directory."""
    if chosen := os.environ.get("EBM_PRIOR_DATA"):
        return Path(chosen).expanduser()
    return user_cache() / "data"


# Opening by path.


def _require_words(option: str, value: object) -> None:
    """Refuse an empty string, which as a path would be the current folder."""
    if isinstance(value, str) and not value.strip():
        raise ConfigurationError(
            f"{option}: expected a path or a name, found an empty string; if it comes from a variable, is that set?"
            " The current folder is called ."
        )


def _existing(spec: str, array: str | None) -> tuple[Path, str | None]:
    """The existing path and the array in it, from PATH or PATH.npz:KEY. Raises DataError where nothing exists."""
    path = os.path.expanduser(spec)
    file, marked, key = path.rpartition(".npz:")
    if marked and key and not os.path.lexists(path):
        if array not in (None, key):
            raise ConfigurationError(f"{spec}: names the array {key}, but --array (array=) is {array}; leave out one")
        path, array = f"{file}.npz", key
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        broken = "a link that leads nowhere" if _is_link(path) else "no such file or folder"
        if isinstance(error, PermissionError):
            broken = "this user may not look there"
        raise DataError(
            f"{path}: {broken}, nor the name of a data set ({', '.join(DATA_SET_NAMES)}); check the path"
        ) from None
    return Path(path), array


def _is_link(path: str) -> bool:
    try:
        return os.path.islink(path)
    except ValueError:  # a null character
        return False


def _open_path(
    path: Path, split: Split, image_shape: Shape | None, array: str | None, mode: Mode | None
) -> ImageSource:
    if array is not None and path.suffix.lower() not in (".npz", ".npy"):
        raise ConfigurationError(f"--array (array=) chooses among the arrays of an .npz file, but {path} is none")
    if not path.is_dir() and (kind := special_kind(path.stat().st_mode)):
        raise DataError(
            f"{path}: expected a folder or a regular file, found a {kind}; store the images in a file first"
        )
    if path.suffix.lower() in (".npy", ".npz") and not path.is_dir():
        return _open_numpy(path, split, image_shape, array, mode)
    if path.suffix.lower() == ".mat" and not path.is_dir():
        return _open_mat(path, image_shape, mode)
    if database := find_lmdb(path, split):
        return open_lmdb(database, image_shape, mode)
    if path.is_dir():
        if idx := find_idx(path, split):
            return _open_idx(idx, image_shape, mode)
        if mat := find_mat(path, split):
            return _open_mat(mat, image_shape, mode)
        other: Split = "test" if split == "train" else "train"
        if found := find_idx(path, other) or find_mat(path, other):
            raise DataError(f"{path}: has {found.name} of the {other} split, but none of the {split} split")
        return open_folder(path, split, image_shape, mode)
    if "idx3" in path.name.lower():
        return _open_idx(path, image_shape, mode)
    raise DataError(
        f"{path}: expected a folder of images, .npy, .npz, .mat, an LMDB, or an idx file (…-images-idx3-ubyte, also"
        " .gz)"
    )


def _open_numpy(
    path: Path, split: Split, image_shape: Shape | None, array: str | None, mode: Mode | None
) -> ImageSource:
    name, images, labels, rest = read_numpy(path, split, array)
    source = _in_memory(images, labels, name, image_shape, mode)
    if rest:
        few = ", ".join(rest[:3]) + ", …" * (len(rest) > 3)
        source.remarks = (*source.remarks, f"left out: {len(rest)} other arrays of the file ({few})")
    return source


def _open_idx(path: Path, image_shape: Shape | None, mode: Mode | None) -> ImageSource:
    images, labels = read_idx(path)
    return _in_memory(images, labels, str(path), image_shape, mode)


def _open_mat(path: Path, image_shape: Shape | None, mode: Mode | None) -> ImageSource:
    images, labels = read_mat(path)
    return _in_memory(images, labels, str(path), image_shape, mode)


def _in_memory(images: Any, labels: Any, name: str, image_shape: Shape | None, mode: Mode | None) -> ImageSource:
    """`from_array`, recoloured by `mode` before it is compared with `image_shape`."""
    if mode is None:
        return from_array(images, labels, name=name, image_shape=image_shape)
    source = from_array(images, labels, name=name).recoloured(mode)
    if image_shape is not None:
        require_shape(name, source.shape, image_shape)
    return source


# Opening by name.


def _open_named(
    name: str, split: Split, root: Path, image_shape: Shape | None, mode: Mode | None, download: bool
) -> ImageSource:
    if name == SUBSET:
        with as_file(files("ebm_prior.checkpoints") / "fashion_mnist_subset.npz") as bundled:
            return _open_numpy(bundled, split, image_shape, None, mode)
    archive = root / f"{name}.npz"
    if archive.exists():
        return _open_numpy(archive, split, image_shape, None, mode)
    class_name, place = _DATA_SETS[name]
    where = root / place.format(split=split)
    if class_name == "SVHN":  # torchvision keeps its files in the root itself, others in a folder of its name
        where = next(filter(None, (find_mat(root / folder, split) for folder in ("", "svhn", "SVHN"))), where)
    has_idx = class_name.endswith("MNIST")
    idx = find_idx(where, split) if has_idx else None
    if not download and not (idx if has_idx else where.exists()):
        raise DataError(
            f"{name}: the {split} split is not in {where}{'/raw' * has_idx}, and there is no {archive};"
            " pass --data-root DIR (data_root=) for the folder that has it, --download (download=True) to fetch it, or"
            " other images as --data"
        )
    if idx:
        return _open_idx(idx, image_shape, mode)
    if class_name == "SVHN" and not download:
        return _open_mat(where, image_shape, mode)
    dataset = _torchvision(class_name, root, split, download)
    labels = dataset.labels if class_name == "SVHN" else dataset.targets
    return _in_memory(dataset.data, labels, str(where), image_shape, mode)


def _torchvision(class_name: str, root: Path, split: Split, download: bool) -> Any:
    """torchvision's reader; it verifies the MD5 sums of CIFAR and SVHN before it opens them (CIFAR's are pickles)."""
    which = {"split": split} if class_name == "SVHN" else {"train": split == "train"}
    # Its progress messages go to stdout, which is for results.
    with reading(root, f"torchvision's {class_name}"), contextlib.redirect_stdout(sys.stderr):
        from torchvision import datasets

        return getattr(datasets, class_name)(root, download=download, **which)


def plain_name(name: str) -> str:
    """A data set's name without case, hyphens and underscores, by which names are compared."""
    return name.lower().replace("-", "").replace("_", "")
