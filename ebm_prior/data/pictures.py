"""Decoding of picture files: which kinds are read, with which pixel values, and why other kinds are refused."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ebm_prior.data.arrays import shape_problem
from ebm_prior.data.image_files import Refusal, reading
from ebm_prior.data.source import CHANNELS, Mode, Shape, recolour
from ebm_prior.errors import DataError, few

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

# Channels of the Pillow modes that are read without losing anything. Alpha channels must be opaque.
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3}
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_ADVICE = {
    "CMYK": "CMYK, the colours of printing; convert it with Pillow's image.convert('RGB')",
    "I": "I, 32-bit integers of which nobody knows which is white; store 8 or 16 bits, or an .npy of floats in [0, 1]",
    "F": "F, floats of which nobody knows which is white; store 8 or 16 bits, or an .npy of floats in [0, 1]",
}
_SHOWN_REASONS, _SHOWN_NAMES = 5, 3


class Header(NamedTuple):
    """Properties of a picture after reading. turned: whether its EXIF data say that it must be rotated or mirrored."""

    shape: Shape
    turned: bool


def read_header(image: Image.Image, name: str) -> Header:
    """(C, H, W) of an image as `read_pixels` gives it. Raises DataError for what cannot be read without a loss."""
    orientation = _orientation(image)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # in an MPO, from a phone's camera, the others are previews of the first
        raise Refusal(name, f"expected a still, found an animation of {frames} frames; save the ones you want as files")
    deep = _png_header(image)[:1] == b"\x10"
    grey16 = image.mode in _SIXTEEN or (image.mode == "I" and image.format == "PNG")  # so in older Pillow
    if deep and not grey16:
        raise Refusal(
            name,
            "expected 8 bits per colour, or grey of 16 bits, found 16 bits per channel, of which Pillow reads 8;"
            " convert it to 8 bits (ImageMagick: -depth 8), or store an .npy of floats in [0, 1]",
        )
    if not grey16 and image.mode not in _CHANNELS:
        found = _ADVICE.get(image.mode, f"{image.mode}; convert it, for instance with Pillow's image.convert('RGB')")
        raise Refusal(name, f"expected a grey, palette or RGB image, found mode {found}")
    _require_opaque(image, name)
    channels = _CHANNELS.get(image.mode, 1)
    width, height = image.size[::-1] if orientation >= 5 else image.size
    return Header((channels, height, width), orientation > 1)


def read_pixels(image: Image.Image, name: str) -> Pixels:
    """The pixels (C, H, W) of an image: uint8, or uint16 where it is grey of 16 bits; turned as its EXIF data say."""
    header = read_header(image, name)
    if header.turned:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return np.array(image).astype(np.uint16)[None]
    pixels: NDArray[np.uint8] = np.array(image.convert("L" if header.shape[0] == 1 else "RGB"))
    return pixels[None] if header.shape[0] == 1 else np.moveaxis(pixels, 2, 0)


def scaled(pixels: Pixels) -> Tensor:
    """Pixels as float32 in [0, 1]: 8 bits by 255, 16 bits by 65535."""
    return torch.from_numpy(pixels.astype(np.float32)).div_(255 if pixels.dtype == np.uint8 else 65535)


def decode(file: BinaryIO, name: str) -> Pixels:
    """The pixels of one encoded picture."""
    with _opened(file, name) as image:
        return read_pixels(image, name)


def decode_as(file: BinaryIO, name: str, expected: Shape, mode: Mode | None) -> Tensor:
    """One encoded picture as float32 (C, H, W), which must be as expected; `mode` converts its colours first."""
    image = scaled(decode(file, name))
    if mode is not None:
        image = recolour(image, CHANNELS[mode])
    found = (image.shape[0], image.shape[1], image.shape[2])
    if found != tuple(expected):
        raise Refusal(name, shape_problem(found, expected))
    return image


@contextlib.contextmanager
def _opened(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    with reading(name, "an image"):
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            empty = file.seek(0, os.SEEK_END) == 0
            why = "the file is empty (0 bytes)" if empty else "of no format that Pillow knows, or damaged"
            raise Refusal(name, f"cannot be read as an image: {why}; replace it or take it away") from None
        with image:
            yield image


def _png_header(image: Image.Image) -> bytes:
    """Bit depth and colour type of a PNG that is not decoded yet; else nothing. Pillow does not tell the depth."""
    file = getattr(image, "fp", None)
    if image.format != "PNG" or file is None:
        return b""
    place = file.tell()
    file.seek(24)
    header: bytes = file.read(2)
    file.seek(place)
    return header


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 to 8, of the way up. 1: as stored."""
    if image.format == "PNG" and "exif" not in image.info and not _late_exif(image):
        return 1  # getexif() would decode the pixels to look behind them
    orientation = image.getexif().get(0x0112, 1)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _late_exif(image: Image.Image) -> bool:
    """Whether a PNG that is not decoded yet has EXIF data behind its pixels, where some tools append them."""
    file = getattr(image, "fp", None)
    if file is None:
        return False
    place, found = file.tell(), False
    file.seek(8)
    while len(chunk := file.read(8)) == 8 and chunk[4:] != b"IEND" and not found:
        found = chunk[4:] == b"eXIf"
        file.seek(int.from_bytes(chunk[:4], "big") + 4, os.SEEK_CUR)
    file.seek(place)
    return found


def _require_opaque(image: Image.Image, name: str) -> None:
    if not image.has_transparency_data:
        return
    sixteen = image.mode.startswith("I")  # Pillow cannot look for the one value that is transparent there
    if sixteen or image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise Refusal(
            name,
            f"expected an image without transparency, found mode {image.mode} with transparent pixels; put it on a"
            " background of your choice first (Pillow's image.convert('RGB') would show what is hidden)",
        )


# Many pictures.


def survey(
    where: str,
    names: Sequence[str],
    opened: Callable[[int], contextlib.AbstractContextManager[BinaryIO]],
    expected: Shape | None,
    mode: Mode | None,
) -> tuple[Shape, list[str]]:
    """The common (C, H, W) of pictures, which must be `expected` if given, and remarks on them.

    All headers are read here, so that a wrong size shows at the start and not after an hour of training. One error
    reports everything that is wrong: how many pictures, why, and the first names. `opened(i)` opens picture names[i].
    """
    shapes: dict[Shape, list[str]] = {}
    refused: dict[str, list[str]] = {}
    turned = 0
    for index, name in enumerate(names):
        try:
            with reading(name, "an image"), opened(index) as file, _opened(file, name) as image:
                header = read_header(image, name)
        except Refusal as refusal:
            refused.setdefault(refusal.reason, []).append(name)
            continue
        shape = header.shape if mode is None else (CHANNELS[mode], *header.shape[1:])
        shapes.setdefault(shape, []).append(name)
        turned += header.turned
    for shape, concerned in shapes.items():
        if expected is not None and shape != tuple(expected):
            refused.setdefault(shape_problem(shape, expected), []).extend(concerned)
    if refused:
        raise DataError(_refusals(where, len(names), refused))
    if len(shapes) > 1:
        raise DataError(_mixed(shapes))
    remarks = [f"{turned} of {len(names)} images are turned as their EXIF orientation says"] * (turned > 0)
    return next(iter(shapes)), remarks


def _refusals(where: str, total: int, refused: Mapping[str, Sequence[str]]) -> str:
    """One message on all pictures that cannot be used."""
    bad = sum(map(len, refused.values()))
    if bad == 1:
        ((reason, (name,)),) = refused.items()
        return f"{name}: {reason}"
    most = sorted(refused.items(), key=lambda entry: -len(entry[1]))
    parts = [f"{len(names)} ({_few(names)}): {reason}" for reason, names in most[:_SHOWN_REASONS]]
    if rest := sum(len(names) for _, names in most[_SHOWN_REASONS:]):
        parts.append(f"{rest} for other reasons")
    return f"{where}: {bad} of {total} images cannot be used. " + ". ".join(parts)


def _mixed(shapes: Mapping[Shape, Sequence[str]]) -> str:
    first = next(iter(shapes))
    other = next(shape for shape in shapes if shape != first)
    counts = Counter({shape: len(names) for shape, names in shapes.items()}).most_common(_SHOWN_REASONS)
    listed = few(f"{count} are {shape}" for shape, count in counts)
    rest = f", and there are {len(shapes) - len(counts)} more shapes" * (len(shapes) > len(counts))
    colours = len({shape[1:] for shape in shapes}) == 1
    what = "convert them with --data-mode rgb or grey (mode=)" if colours else "make them equal first"
    return (
        f"{shapes[other][0]}: the images are of mixed sizes or colours, this one is {other}, {shapes[first][0]} is"
        f" {first} (channels, height, width); {listed}{rest}; {what}"
    )


def _few(names: Sequence[str]) -> str:
    """The first names, and a sign that there are more."""
    return ", ".join(names[:_SHOWN_NAMES]) + ", …" * (len(names) > _SHOWN_NAMES)
