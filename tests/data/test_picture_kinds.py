"""Pictures as people have them: each kind is read right, or refused with the reason, all of them in one message."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_writers import COLOUR, GREY, Items, everything, write_pictures
from PIL import Image

from ebm_prior.data.images import from_dataset, open_images
from ebm_prior.errors import DataError

DEEP = np.random.default_rng(3).integers(0, 65536, (5, 4), dtype=np.uint16)


def png(path: Path, depth: int, colour: int, rows: np.ndarray, *, behind: bytes = b"", before: bytes = b"") -> Path:
    """A PNG by its specification: `rows` as big-endian bytes; chunks before and behind the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    size = struct.pack(">IIBBBBB", 4, len(rows), depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", size), before and chunk(before[:4], before[4:]), chunk(b"IDAT", zlib.compress(raw))]
    parts += [behind and chunk(behind[:4], behind[4:]), chunk(b"IEND", b"")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def saved(image: Image.Image, path: Path, **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)
    return path


def grey() -> Image.Image:
    return Image.fromarray(GREY[0])


def colour() -> Image.Image:
    return Image.fromarray(COLOUR[0])


def with_alpha(image: Image.Image, lowest: int) -> Image.Image:
    alpha = Image.new("L", image.size, 255)
    alpha.putpixel((1, 1), lowest)
    image.putalpha(alpha)
    return image


def as_channels(array: np.ndarray) -> torch.Tensor:
    return (
        torch.from_numpy(array.astype(np.float32))[None]
        if array.ndim == 2
        else torch.from_numpy(np.moveaxis(array, 2, 0).astype(np.float32))
    )


EXIF = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # one entry: orientation 6
TURNED = torch.rot90(as_channels(GREY[0]), -1, (1, 2)) / 255

# A picture, and its pixels.
READ: dict[str, tuple[Callable[[Path], object], torch.Tensor]] = {
    "grey of 16 bits": (lambda d: png(d / "a.png", 16, 0, DEEP.astype(">u2")), as_channels(DEEP) / 65535),
    "grey of 16 bits by Pillow": (lambda d: saved(Image.fromarray(DEEP), d / "a.png"), as_channels(DEEP) / 65535),
    "grey of 16 bits, turned": (
        lambda d: png(d / "a.png", 16, 0, DEEP.astype(">u2"), before=b"eXIf" + EXIF),
        torch.rot90(as_channels(DEEP), -1, (1, 2)) / 65535,
    ),
    "black and white": (
        lambda d: saved(grey().convert("1", dither=0), d / "a.png"),
        (as_channels(GREY[0]) > 127) * 1.0,
    ),
    "palette": (lambda d: saved(colour().quantize(256), d / "a.png"), as_channels(COLOUR[0]) / 255),
    "opaque alpha": (lambda d: saved(with_alpha(colour(), 255), d / "a.png"), as_channels(COLOUR[0]) / 255),
    "opaque grey alpha": (lambda d: saved(with_alpha(grey(), 255), d / "a.png"), as_channels(GREY[0]) / 255),
    "turned before the pixels": (lambda d: png(d / "a.png", 8, 0, GREY[0], before=b"eXIf" + EXIF), TURNED),
    "turned behind the pixels": (lambda d: png(d / "a.png", 8, 0, GREY[0], behind=b"eXIf" + EXIF), TURNED),
    "BMP": (lambda d: saved(colour(), d / "a.BMP"), as_channels(COLOUR[0]) / 255),
    "WebP": (lambda d: saved(colour(), d / "a.webp", lossless=True), as_channels(COLOUR[0]) / 255),
    "one frame of WebP": (
        lambda d: saved(colour(), d / "a.webp", lossless=True, save_all=True),
        as_channels(COLOUR[0]) / 255,
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_kinds_that_are_read(kind: str, tmp_path: Path) -> None:
    make, expected = READ[kind]
    make(tmp_path / "p")
    source = open_images(tmp_path / "p")
    assert source.shape == tuple(expected.shape)
    torch.testing.assert_close(source.batch([0])[0], expected, atol=1e-6, rtol=0)
    assert source.remarks == (("1 of 1 images are turned as their EXIF orientation says",) if "turned" in kind else ())


def test_a_phones_photo_with_a_preview_is_its_first_picture(tmp_path: Path) -> None:
    big = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    saved(big, tmp_path / "p" / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    image = Image.open(tmp_path / "p" / "a.jpg")
    assert (image.format, image.n_frames) == ("MPO", 2)
    assert everything(open_images(tmp_path / "p")).mean() > 0.7


def frames(d: Path, name: str) -> Path:
    return saved(grey(), d / name, save_all=True, append_images=[Image.fromarray(255 - GREY[0])])


# A picture that is refused, and why.
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "colour of 16 bits": (
        lambda d: png(d / "a.png", 16, 2, np.repeat(DEEP.astype(">u2"), 3, axis=1)),
        "found 16 bits per channel, of which Pillow reads 8; convert it to 8 bits",
    ),
    "colour and alpha of 16 bits": (
        lambda d: png(d / "a.png", 16, 6, np.repeat(DEEP.astype(">u2"), 4, axis=1)),
        "16 bits per channel",
    ),
    "grey and alpha of 16 bits": (
        lambda d: png(d / "a.png", 16, 4, np.repeat(DEEP.astype(">u2"), 2, axis=1)),
        "16 bits per channel",
    ),
    "transparent grey of 16 bits": (
        lambda d: png(d / "a.png", 16, 0, DEEP.astype(">u2"), before=b"tRNS" + DEEP[0, :1].astype(">u2").tobytes()),
        "without transparency",
    ),
    "transparent": (lambda d: saved(with_alpha(colour(), 254), d / "a.png"), "mode RGBA with transparent pixels"),
    "transparent grey": (lambda d: saved(with_alpha(grey(), 0), d / "a.png"), "mode LA with transparent pixels"),
    "transparent palette": (
        lambda d: saved(colour().quantize(256), d / "a.png", transparency=0),
        "mode P with transparent pixels",
    ),
    "CMYK": (
        lambda d: saved(colour().convert("CMYK"), d / "a.jpg"),
        r"CMYK, the colours of printing.*convert\('RGB'\)",
    ),
    "animated PNG": (lambda d: frames(d, "a.png"), "expected a still, found an animation of 2 frames"),
    "animated WebP": (lambda d: frames(d, "a.webp"), "an animation of 2 frames"),
    "animated GIF under another name": (lambda d: frames(d, "a.gif").rename(d / "a.png"), "an animation of 2 frames"),
    "floats": (lambda d: saved(Image.new("F", (4, 5)), d / "a.tif").rename(d / "a.png"), "mode F, floats of which"),
    "32 bits": (lambda d: saved(Image.new("I", (4, 5)), d / "a.tif").rename(d / "a.png"), "mode I, 32-bit integers"),
    "zero bytes": (lambda d: (d.mkdir(), (d / "a.png").write_bytes(b"")), r"the file is empty \(0 bytes\)"),
    "text": (lambda d: (d.mkdir(), (d / "a.png").write_bytes(b"<html>")), "of no format that Pillow knows"),
    "header alone": (
        lambda d: (saved(colour(), d / "a.jpg"), (d / "a.jpg").write_bytes((d / "a.jpg").read_bytes()[:20])),
        "cannot be read as an image",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_are_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    make, reason = REFUSED[kind]
    make(tmp_path / "p")
    (path,) = (tmp_path / "p").iterdir()
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: .*{reason}"):
        open_images(tmp_path / "p")


def test_the_pixels_of_16_bits_are_not_made_white(tmp_path: Path) -> None:
    """Pillow's convert("L") clips at 255: nearly all of them."""
    png(tmp_path / "p" / "a.png", 16, 0, DEEP.astype(">u2"))
    image = open_images(tmp_path / "p").batch([0])
    assert (image == 1).float().mean() < 0.1
    assert image.std() > 0.2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = np.kron(GREY[0], np.ones((8, 8), np.uint8))  # JPEG keeps blocks of one value
    saved(Image.fromarray(shown), tmp_path / "p" / "a.jpg", exif=exif, quality=100)
    x = torch.from_numpy(shown.astype(np.float32))[None] / 255
    expected = {
        1: x,
        2: x.flip(2),
        3: x.flip(1, 2),
        4: x.flip(1),
        5: x.mT,
        6: torch.rot90(x, -1, (1, 2)),
        7: x.mT.flip(1, 2),
        8: torch.rot90(x, 1, (1, 2)),
    }[orientation]
    source = open_images(tmp_path / "p")
    assert source.shape == tuple(expected.shape)
    torch.testing.assert_close(source.batch([0])[0], expected, atol=0.02, rtol=0)
    assert len(source.remarks) == (orientation > 1)
    dataset = from_dataset(Items([Image.open(tmp_path / "p" / "a.jpg")]))
    torch.testing.assert_close(dataset.batch([0])[0], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_nonsense_orientations_are_none(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    saved(grey(), tmp_path / "p" / "a.png", exif=exif)
    source = open_images(tmp_path / "p")
    assert source.shape == (1, 5, 4)
    assert source.remarks == ()


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", COLOUR)
    for index in range(5):
        saved(with_alpha(colour(), 0), folder / f"t{index}.png")
    saved(colour().convert("CMYK"), folder / "c.jpg")
    for index in range(2):
        (folder / f"z{index}.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        open_images(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: 8 of 14 images cannot be used. 5 ({folder}/t0.png, {folder}/t1.png, ")
    assert "t2.png, …): expected an image without transparency" in message
    assert "t3.png" not in message
    assert f"2 ({folder}/z0.png, {folder}/z1.png): cannot be read as an image: the file is empty" in message
    assert f"1 ({folder}/c.jpg): expected a grey, palette or RGB image, found mode CMYK" in message


def test_many_wrong_sizes_are_counted(tmp_path: Path) -> None:
    for index in range(9):
        saved(Image.new("L", (4, 5 + index)), tmp_path / "p" / f"{index}.png")
    with pytest.raises(DataError, match=r"8 of 9 images cannot be used.*found \(1, 6, 4\).*\. 3 for other reasons"):
        open_images(tmp_path / "p", image_shape=(1, 5, 4))
    with pytest.raises(DataError, match=r"1\.png: the images are of mixed sizes.*1 are \(1, 5, 4\).*4 more shapes"):
        open_images(tmp_path / "p")


def test_pillow_images_of_a_dataset_are_read_likewise(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", 16, 0, DEEP.astype(">u2"))
    torch.testing.assert_close(from_dataset(Items([Image.open(path)])).batch([0])[0], as_channels(DEEP) / 65535)
    path = png(tmp_path / "b.png", 16, 2, np.repeat(DEEP.astype(">u2"), 3, axis=1))
    with pytest.raises(DataError, match=r"mine\[0\]: .*16 bits per channel"):
        from_dataset(Items([Image.open(path)]), name="mine")


# Mixed colours.


def test_a_mixed_folder_is_converted_on_request(tmp_path: Path) -> None:
    saved(colour(), tmp_path / "p" / "a.png")
    saved(grey(), tmp_path / "p" / "b.png")
    png(tmp_path / "p" / "c.png", 16, 0, DEEP.astype(">u2"))
    with pytest.raises(DataError, match=r"mixed sizes or colours.*2 are \(1, 5, 4\).*--data-mode rgb or grey"):
        open_images(tmp_path / "p")
    in_colour, in_grey = (open_images(tmp_path / "p", mode=mode) for mode in ("rgb", "grey"))  # type: ignore[arg-type]
    assert (in_colour.shape, in_grey.shape) == ((3, 5, 4), (1, 5, 4))
    images = everything(in_colour)
    assert torch.equal(images[0], as_channels(COLOUR[0]) / 255)
    assert torch.equal(images[1], (as_channels(GREY[0]) / 255).expand(3, -1, -1))
    luma = as_channels(np.array(colour().convert("L"))) / 255
    torch.testing.assert_close(everything(in_grey)[0], luma, atol=1 / 255, rtol=0)
    assert torch.equal(everything(in_grey)[2], as_channels(DEEP) / 65535)
    assert in_colour.fingerprint() != in_grey.fingerprint()
    with pytest.raises(DataError, match=r"expected images of shape \(1, 5, 4\).*found \(3, 5, 4\)"):
        open_images(tmp_path / "p", mode="rgb", image_shape=(1, 5, 4))


def test_a_refusal_of_colours_names_the_way_out(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", COLOUR)
    with pytest.raises(DataError, match="--data-mode grey"):
        open_images(folder, image_shape=(1, 5, 4))
    assert open_images(folder, image_shape=(1, 5, 4), mode="grey").shape == (1, 5, 4)
