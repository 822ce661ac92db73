"""Reading images from MATLAB files (the MAT-file format, level 5), as SVHN comes.

No file is trusted. scipy.io.loadmat ends the whole process on some damaged files, so the two variables that are needed
are read here: a file holds one element after another, each a tag (type, number of bytes) and its content, and a
variable is an element that holds others: flags, dimensions, name, values. With compression each variable is a zlib
stream. Sizes are compared with the file and with free memory before anything is allocated.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebm_prior.data.arrays import require_memory
from ebm_prior.data.image_files import open_regular, reading, refuse_bomb
from ebm_prior.data.source import Split
from ebm_prior.errors import DataError, few

Order = Literal["<", ">"]
"""The byte order of a file: little or big endian."""

_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}  # type -> dtype
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = ("double", "single", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
_KINDS = dict(enumerate(("cell", "struct", "object", "char", "sparse", *_NUMBERS), start=1))  # as MATLAB calls them
_ORDERS: dict[bytes, Order] = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}  # version 1 in the byte order of the file
_COMPLEX = 0x800  # flag of a variable
_MOST_HEADER = 4_096  # bytes of dimensions or of a name
SVHN_FILE = "{split}_32x32.mat"


class _Variable(NamedTuple):
    """The header of a variable, and where its values are."""

    name: str
    shape: tuple[int, ...]
    kind: str  # in `_KINDS`
    stream: BinaryIO  # the values' element comes next
    order: Order
    packed: int  # bytes that the variable takes in the file

    @property
    def described(self) -> str:
        return f"{self.name} ({self.kind} {self.shape})"


def find_mat(folder: Path, split: Split) -> Path | None:
    """SVHN's file of a split in a folder, or None if it is not there."""
    path = folder / SVHN_FILE.format(split=split)
    return path if path.is_file() else None


def read_mat(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.generic] | None]:
    """Images (N, H, W, C) and labels (N,) of a .mat file in SVHN's form; labels are None where it has no y.

    X is (H, W, C, N) of uint8; y (N, 1) has 10 for the digit 0, which becomes 0 as in torchvision. Raises DataError for
    a file that is not of this form, damaged or of another level, MemoryLimitError where the images do not fit.
    """
    with reading(path, "a MATLAB file"), open_regular(path) as file:
        images, labels, found = None, None, list[str]()
        for variable in _variables(file, path):
            found.append(variable.described)
            if variable.name == "X" and images is None and variable.kind == "uint8" and len(variable.shape) == 4:
                images = _values(variable, path)
            elif variable.name == "y" and labels is None:
                labels = _labels(variable, path)
        if images is None:
            held = few(found) or "no variables"
            raise DataError(f"{path}: expected X (height, width, channels, N) of uint8, as SVHN has it, found {held}")
        return np.ascontiguousarray(images.transpose(3, 0, 1, 2), np.uint8), labels


def _labels(y: _Variable, path: Path) -> NDArray[np.generic]:
    if y.kind not in _NUMBERS:
        raise DataError(f"{path}: expected integer labels in y, one per image, found {y.described}")
    values = _values(y, path).reshape(-1)
    found: NDArray[np.generic] = np.where(values == 10, values.dtype.type(0), values)
    return found


def _variables(file: BinaryIO, path: Path) -> Iterator[_Variable]:
    """The variables of an open file, in order; one's values must be read before the next one is asked for."""
    size = os.fstat(file.fileno()).st_size
    header = file.read(128)
    order = _ORDERS.get(header[124:])
    if order is None:
        newer = b"MATLAB 7.3" in header[:116]
        raise DataError(
            f"{path}: expected a MATLAB file of level 5, found "
            + ("one of version 7.3; " if newer else "no such header; is the file complete? ")
            + "MATLAB writes level 5 with save -v7"
        )
    at = len(header)
    while at < size:
        file.seek(at)
        kind, packed, inline = _tag(file, order)
        if inline is not None or kind not in (_MATRIX, _COMPRESSED):
            raise ValueError(f"an element of type {kind} where a variable should be")
        at += 8 + packed
        if at > size:
            raise ValueError(f"it should have {at:,} bytes and has {size:,}")
        stream: BinaryIO = file
        if kind == _COMPRESSED:
            stream = io.BufferedReader(_Inflated(file, packed))
            kind, _, inline = _tag(stream, order)
            if inline is not None or kind != _MATRIX:
                raise ValueError(f"a compressed element of type {kind} where a variable should be")
        yield _header(stream, order, packed)


def _header(stream: BinaryIO, order: Order, packed: int) -> _Variable:
    flags = _element(stream, order, _MOST_HEADER)
    if len(flags) != 2 or flags.dtype != np.uint32:
        raise ValueError("a variable without flags")
    kind = _KINDS.get(int(flags[0]) & 0xFF)
    if kind is None:  # objects of newer kinds, whose headers differ
        return _Variable("?", (), "unknown", stream, order, packed)
    shape, name = (_element(stream, order, _MOST_HEADER) for _ in range(2))
    if shape.dtype != np.int32 or min(shape.tolist(), default=-1) < 0:
        raise ValueError("a variable without dimensions")
    kind = "complex " * bool(int(flags[0]) & _COMPLEX) + kind
    return _Variable(name.tobytes().decode("latin-1"), tuple(shape.tolist()), kind, stream, order, packed)


def _values(variable: _Variable, path: Path) -> NDArray[np.generic]:
    """The values of a variable of real numbers, in its shape and in the type in which they are stored."""
    count = math.prod(variable.shape)
    size = count * np.dtype(variable.kind).itemsize
    refuse_bomb(str(path), variable.packed, size)
    require_memory(str(path), 2 * size)
    values = _element(variable.stream, variable.order, size)
    if len(values) != count:
        raise ValueError(f"{variable.described} holds {len(values):,} numbers")
    return values.reshape(variable.shape, order="F")


def _tag(stream: BinaryIO, order: Order) -> tuple[int, int, bytes | None]:
    """Type and number of bytes of the next element, and its content where that is short enough to be in the tag."""
    tag = _read(stream, 8)
    first, size = np.frombuffer(tag, f"{order}u4").tolist()
    if short := first >> 16:
        if short > 4:
            raise ValueError(f"{short} bytes in a tag that has room for 4")
        return first & 0xFFFF, short, tag[4 : 4 + short]
    return first, size, None


def _element(stream: BinaryIO, order: Order, most: int) -> NDArray[np.generic]:
    """The numbers of the next element, of `most` bytes at most."""
    kind, size, content = _tag(stream, order)
    dtype = np.dtype(_STORED.get(kind, "V1")).newbyteorder(order)
    if kind not in _STORED or size % dtype.itemsize or size > most:
        raise ValueError(f"an element of type {kind} and {size:,} bytes, where numbers of {most:,} bytes should be")
    if content is None:
        content = _read(stream, size)
        _read(stream, -size % 8)  # elements begin at multiples of 8 bytes
    found: NDArray[np.generic] = np.frombuffer(content, dtype)
    return found if dtype.isnative else found.astype(dtype.newbyteorder("="))


def _read(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError(f"{size:,} bytes should follow, found {len(content):,}")
    return content


class _Inflated(io.RawIOBase):
    """The content of a zlib stream of `packed` bytes that begins at the position of a file."""

    def __init__(self, file: BinaryIO, packed: int) -> None:
        super().__init__()
        self._file, self._left, self._zlib = file, packed, zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._zlib.eof:
            waiting = self._zlib.unconsumed_tail
            if not waiting:
                waiting = self._file.read(min(self._left, io.DEFAULT_BUFFER_SIZE))
                self._left -= len(waiting)
            content = self._zlib.decompress(waiting, len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)
            if not waiting:
                break
        return 0
