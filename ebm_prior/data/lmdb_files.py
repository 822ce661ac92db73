"""LMDB as NVAE's recipes write it: encoded pictures, or bytes of pixels (H, W, C), under "0", "1", "2", …

Values are pictures or pixels, never unpickled. Needs the extra `lmdb`, which is imported when such data are opened.
"""

from __future__ import annotations

import hashlib
import io
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_prior.data.arrays import require_shape
from ebm_prior.data.image_files import open_regular, reading
from ebm_prior.data.pictures import decode_as, scaled, survey
from ebm_prior.data.source import CHANNELS, ImageSource, Mode, Shape, Split, recolour
from ebm_prior.errors import ConfigurationError, DataError, few

_SPLIT_NAMES = {"train": ("train.lmdb",), "test": ("test.lmdb", "validation.lmdb", "valid.lmdb", "val.lmdb")}
_ENCODED = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_ONE_AT_A_TIME = threading.Lock()  # lmdb refuses to open an environment twice in one process


def find_lmdb(path: Path, split: Split) -> Path | None:
    """The LMDB of the split at `path`: a file or folder that is one, or holds one per split; None where none is."""
    if path.is_file():
        return path if path.suffix.lower() in (".lmdb", ".mdb") else None
    if (path / "data.mdb").exists():
        return path
    present = [name for names in _SPLIT_NAMES.values() for name in names if (path / name).exists()]
    if not present:
        return None
    for name in _SPLIT_NAMES[split]:
        if name in present:
            return path / name
    raise DataError(
        f"{path}: has {few(present)} but no LMDB of the {split} split ({' or '.join(_SPLIT_NAMES[split])});"
        " add it, or pass the LMDB itself"
    )


def open_lmdb(path: Path, image_shape: Shape | None, mode: Mode | None) -> ImageSource:
    """The images of an LMDB in the order of their numbers, or of their keys where these are no numbers.

    image_shape: (C, H, W); values that are plain pixels are square and RGB unless it says otherwise.
    Raises DataError for values that are neither pictures nor pixels of that shape.
    """
    with _values(path) as database:
        keys = [bytes(key) for key in database.cursor().iternext(keys=True, values=False)]
        if not keys:
            raise DataError(f"{path}: no images, the LMDB is empty")
        keys = _in_order(path, keys)
        first = database.get(keys[0])
        names = [_name(path, key) for key in keys]
        if first.startswith(_ENCODED):
            shape, remarks = survey(str(path), names, lambda i: io.BytesIO(database.get(keys[i])), image_shape, mode)
            return ImageSource(str(path), Lmdb(path, keys, None, shape, mode), remarks=remarks)
        stored = _stored_shape(names[0], first, image_shape, mode)
        size = math.prod(stored)
        if wrong := [name for name, key in zip(names, keys, strict=True) if len(database.get(key)) != size]:
            raise DataError(
                f"{wrong[0]}: expected {size} bytes of pixels, {stored} (channels, height, width), found another length"
                f" ({len(wrong)} of {len(keys)} such); store pictures or pixels of one shape"
            )
    shape = stored if mode is None else (CHANNELS[mode], *stored[1:])
    if image_shape is not None:
        require_shape(str(path), shape, image_shape)
    return ImageSource(str(path), Lmdb(path, keys, stored, shape, mode))


@dataclass(frozen=True, eq=False)
class Lmdb:
    """Values of an LMDB, decoded when they are read. stored: (C, H, W) of plain pixels; None: encoded pictures."""

    path: Path
    keys: list[bytes]
    stored: Shape | None
    shape: Shape
    mode: Mode | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, rows: Tensor) -> Tensor:
        """The values, decoded and scaled."""
        images = torch.empty(len(rows), *self.shape)
        for index, (name, value) in enumerate(self._read(rows)):
            if self.stored is None:
                images[index] = decode_as(io.BytesIO(value), name, self.shape, self.mode)
                continue
            channels, height, width = self.stored
            with reading(name, "pixels"):
                pixels = np.frombuffer(value, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)
            images[index] = recolour(scaled(pixels), self.shape[0])
        return images

    def content(self, rows: Tensor) -> Iterator[bytes]:
        """A digest of each value as it is."""
        for _, value in self._read(rows):
            yield hashlib.sha256(value).digest()

    def _read(self, rows: Tensor) -> Iterator[tuple[str, bytes]]:
        wanted = [self.keys[row] for row in rows.tolist()]
        for start in range(0, len(wanted), 256):  # nobody else can open it while it is open
            part = wanted[start : start + 256]
            with _values(self.path) as database:
                values = [database.get(key) for key in part]
            for key, value in zip(part, values, strict=True):
                if value is None:
                    raise DataError(f"{_name(self.path, key)}: is no longer there; was the LMDB written anew?")
                yield _name(self.path, key), value


@contextmanager
def _values(path: Path) -> Iterator[Any]:
    """A reading transaction. Raises ConfigurationError without the lmdb package, DataError for a damaged file."""
    try:
        import lmdb
    except ImportError as error:
        raise ConfigurationError(f"{path}: reading it needs lmdb; pip install lmdb") from error
    file = path / "data.mdb" if path.is_dir() else path
    with reading(path, "an LMDB"), _ONE_AT_A_TIME:
        with open_regular(file) as data:  # a pipe would wait for ever
            size = data.seek(0, io.SEEK_END)
        with lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False) as environment:
            promised = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if promised > size:  # reading past the end would kill the process
                raise DataError(f"{path}: its header promises {promised} bytes, found {size}; is the copy complete?")
            with environment.begin() as transaction:
                yield transaction


def _in_order(path: Path, keys: list[bytes]) -> list[bytes]:
    """By number where all keys are numbers, and then none may lack; else as they are sorted."""
    if not all(key.isdigit() for key in keys):
        return keys
    ordered = sorted(keys, key=int)
    missing = next((number for number, key in enumerate(ordered) if int(key) != number), None)
    if missing is not None:
        raise DataError(
            f"{path}: expected the keys 0 to {len(keys) - 1}, found none for {missing}; write the LMDB again"
        )
    return ordered


def _stored_shape(name: str, value: bytes, image_shape: Shape | None, mode: Mode | None) -> Shape:
    """(C, H, W) of plain pixels: that of `image_shape` in any colours that `mode` converts, else square and RGB."""
    size = len(value)
    if image_shape is not None:
        channels = [3, 1] if mode else [image_shape[0]]
        shapes = [(count, *image_shape[1:]) for count in channels]
        if fitting := [shape for shape in shapes if math.prod(shape) == size]:
            return fitting[0]
        expected = f"{math.prod(image_shape)} bytes of pixels, {tuple(image_shape)} (channels, height, width)"
    else:
        side = math.isqrt(size // 3)
        if size and 3 * side * side == size:
            return 3, side, side
        expected = "bytes of a square RGB image (for another shape, image_shape=)"
    pickled = value[:1] == b"\x80" and value[-1:] == b"."
    found = "a pickled object, which is never opened, for that runs code" if pickled else f"{size} bytes"
    raise DataError(
        f"{name}: expected a picture (PNG, JPEG, WebP) or {expected}, found {found}; store pictures or pixels instead"
    )


def _name(path: Path, key: bytes) -> str:
    return f"{path}[{key.decode('ascii', 'backslashreplace')}]"
