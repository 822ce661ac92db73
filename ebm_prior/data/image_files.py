"""Reading arrays of images from files: idx, .npy and .npz. `ebm_prior.data.images` makes sources of them.

No file is trusted. Only regular files are opened, and nothing is unpickled. Sizes in headers are compared with the file
and with free memory before anything is decompressed. Any error of a decoder becomes a DataError with the file's name.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ebm_prior.data.arrays import loaded_bytes, require_memory
from ebm_prior.data.source import Split
from ebm_prior.errors import DataError, EbmPriorError, few

_IDX_PREFIX = {"train": "train", "test": "t10k"}
_BOMB_BYTES, _BOMB_RATIO = 2**32, 250  # size and compression ratio of archives made to fill the memory, not of images
_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


class Refusal(DataError):
    """A file that cannot be used. `reason` lacks the file's name, so that equal reasons can be counted."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


@contextlib.contextmanager
def reading(name: Path | str, what: str) -> Iterator[None]:
    """Turn whatever a decoder raises on a damaged or hostile file (nearly anything) into a DataError with its name."""
    try:
        yield
    except EbmPriorError:
        raise
    except Exception as error:
        said = (isinstance(error, OSError) and error.strerror) or error  # without the path, which stands before it
        raise Refusal(
            str(name),
            f"cannot be read as {what} ({type(error).__name__}: {said}); is it complete and of that format?",
        ) from error


def special_kind(mode: int) -> str | None:
    """What a file that is not regular is, from the `st_mode` of its status; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "special file")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file. Raises DataError for a named pipe, which would wait for ever for a writer, and the like."""
    if kind := special_kind(path.stat().st_mode):
        raise Refusal(str(path), f"expected a regular file, found a {kind}; store the images in a file first")
    return path.open("rb")


def refuse_bomb(name: str, packed: int, unpacked: int) -> None:
    """Raise DataError for `packed` bytes that claim to hold far more than images do."""
    if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * packed:
        raise DataError(
            f"{name}: {packed} bytes claim to hold {unpacked / 2**30:.1f} GiB, which no file of images does;"
            " if it is what you want, store it uncompressed"
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
    packed = path.suffix == ".gz"
    with reading(path, "an idx file"), open_regular(path) as raw, _unpacked(raw, packed) as file:
        magic = file.read(4)
        if magic != bytes((0, 0, 8, ndim)):
            raise DataError(
                f"{path}: expected an idx file of uint8 with {ndim} axes, which starts with 00 00 08 0{ndim}, found"
                f" {magic.hex(' ') or 'an empty file'}"
            )
        sizes = struct.unpack(f">{ndim}I", file.read(4 * ndim))
        promised = math.prod(sizes)
        size = os.fstat(raw.fileno()).st_size
        refuse_bomb(str(path), size, promised)
        if packed:
            require_memory(str(path), 2 * promised)  # as bytes, and as the array
            data = file.read(promised + 1)
            there = len(data)
        elif (there := size - 4 - 4 * ndim) == promised:
            require_memory(str(path), 2 * promised)
            data = file.read(promised)
    if there != promised:
        found = f"only {there}" if there < promised else "more"
        raise DataError(f"{path}: the header promises {sizes} = {promised} bytes, found {found}; is the file damaged?")
    return np.frombuffer(data, np.uint8).reshape(sizes)


def _unpacked(file: BinaryIO, packed: bool) -> contextlib.AbstractContextManager[Any]:
    return gzip.open(file) if packed else contextlib.nullcontext(file)


# numpy files.


def read_numpy(
    path: Path, split: Split, array: str | None = None
) -> tuple[str, NDArray[Any], NDArray[Any] | None, list[str]]:
    """The contents of an .npy or .npz file, unchecked: a name, the images, the labels or None, and a note.

    array: the key of the images in an .npz. The note describes arrays in the file that were not read.
    """
    with reading(path, "a numpy array file"), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        declared = _declared(file)
        if declared:
            _require_promise(str(path), declared, size)
            require_memory(str(path), loaded_bytes(declared[0], declared[1]))
        file.seek(0)
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if array is not None:
                raise DataError(f"{path}: holds one array, without a name; leave out --array (array=)")
            return str(path), loaded, None, []
        with loaded:
            for member in loaded.zip.infolist():
                refuse_bomb(str(path), member.compress_size, member.file_size)
            images, labels = _npz_keys(path, loaded.files, split, array)
            keys = [key for key in (images, labels) if key in loaded.files]
            _require_members(path, loaded.zip, keys)
            other = {"train": "test", "test": "train"}[split]
            expected = {images, labels, f"x_{other}", f"y_{other}"}
            rest = [key for key in loaded.files if key not in expected]
            return f"{path}:{images}", loaded[images], loaded[labels] if labels in keys else None, rest


def _declared(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int] | None:
    """Shape, type and header length of an .npy stream; None where it has no such header, so that numpy can complain."""
    try:
        version = np.lib.format.read_magic(file)
    except ValueError:
        return None
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format is not for plain numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype, file.tell()


def _require_promise(name: str, declared: tuple[tuple[int, ...], np.dtype[Any], int], size: int) -> None:
    """Raise ValueError where the header of an .npy stream promises more, or less, than its `size` in bytes."""
    shape, dtype, header = declared
    promised = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and (min(shape, default=0) < 0 or promised != size - header):
        raise ValueError(f"the header of {name} promises {promised} bytes of {dtype} {shape}, found {size - header}")


def _require_members(path: Path, archive: zipfile.ZipFile, keys: Sequence[str]) -> None:
    """Check the headers of an archive's members without decompressing them.

    Raises ValueError for a wrong header, and MemoryLimitError where `keys` together do not fit in memory. zipfile never
    decompresses a member beyond the size that the archive declares.
    """
    needed = 0
    for key in keys:
        name = key if key in archive.namelist() else f"{key}.npy"
        size = archive.getinfo(name).file_size
        with archive.open(name) as member:
            declared = _declared(member)
        if declared:
            _require_promise(key, declared, size)
        needed += loaded_bytes(declared[0], declared[1]) if declared else size
    require_memory(str(path), needed)


def _npz_keys(path: Path, keys: list[str], split: Split, array: str | None) -> tuple[str, str]:
    """Which arrays of an archive are the images and the labels of the split."""
    if array is not None:
        if array not in keys:
            raise DataError(f"{path}: expected the array {array!r}, found the keys {few(keys) or '(none)'}")
        return array, "labels" if array == "images" else f"y_{array[2:]}" if array.startswith("x_") else ""
    pairs = [pair for pair in ((f"x_{split}", f"y_{split}"), ("images", "labels")) if pair[0] in keys]
    if len(pairs) == 1:
        return pairs[0]
    if not pairs and {"x_train", "x_test"} & set(keys):
        raise DataError(f"{path}: expected x_{split} for the {split} split, found the keys {few(keys)}")
    if len(keys) == 1:
        return keys[0], ""
    raise DataError(
        f"{path}: which array holds the images? Expected x_{split} (and y_{split}), or images (and labels), or a single"
        f" array; found the keys {few(keys) or '(none)'}; choose one with --array KEY (array=)"
    )
