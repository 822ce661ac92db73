"""What a user reads when images are wrong: one error, and every message names the file."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_writers import COLOUR, GREY, LABELS, Items, write_idx, write_npy, write_npz, write_pictures
from PIL import Image
from torch.utils.data import IterableDataset

from ebm_prior.data import image_files
from ebm_prior.data.images import from_dataset, open_images
from ebm_prior.errors import DataError


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def filled(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def with_value(value: float, image: int = 2) -> np.ndarray:
    images = (GREY / 255).astype(np.float32)
    images[image:, 1, 1] = value
    return images


def picture(path: Path, mode: str, size: tuple[int, int] = (4, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def lying_header(path: Path) -> Path:
    header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 28, 28)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(100))
    return path


MISTAKES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda d: d / "nowhere", "no such file or folder.*fashion-mnist"),
    "empty folder": (lambda d: filled(d / "notes.txt", b"").parent, r"no images.*\.png"),
    "too long": (lambda d: d / (300 * "x"), "no such file or folder"),
    "other file": (lambda d: filled(d / "a.txt", b"hello"), "expected a folder of images"),
    "empty npy": (lambda d: filled(d / "a.npy", b""), "cannot be read as a numpy"),
    "truncated npy": (lambda d: truncated(write_npy(d / "a.npy", GREY)), "cannot be read as a numpy"),
    "npy with a lying header": (lambda d: lying_header(d / "a.npy"), "cannot be read as a numpy"),
    "pickle": (lambda d: filled(d / "a.npy", pickle.dumps(GREY)), "cannot be read.*allow_pickle"),
    "objects": (lambda d: write_npy(d / "a.npy", np.array([None])), "cannot be read.*allow_pickle"),
    "truncated npz": (lambda d: truncated(write_npz(d / "a.npz", images=GREY)), "cannot be read as a numpy"),
    "no images": (lambda d: write_npy(d / "a.npy", GREY[:0]), r"no images.*\(0, 5, 4\)"),
    "integers": (lambda d: write_npy(d / "a.npy", GREY.astype(np.int64)), "uint8.*found int64"),
    "booleans": (lambda d: write_npy(d / "a.npy", GREY > 9), "uint8.*found bool"),
    "two axes": (lambda d: write_npy(d / "a.npy", GREY[0]), r"\(N, H, W\).*found \(5, 4\)"),
    "two channels": (lambda d: write_npy(d / "a.npy", COLOUR[..., :2]), r"C = 1 or 3, found \(6, 5, 4, 2\)"),
    "NaN": (lambda d: write_npy(d / "a.npy", with_value(np.nan)), r"NaN or infinite values in image 2 .*of 4 such"),
    "infinite": (lambda d: write_npy(d / "a.npy", with_value(np.inf, 5)), r"NaN or infinite values in image 5"),
    "huge": (lambda d: write_npy(d / "a.npy", with_value(0).astype(np.float64) + 1e300), r"infinite values in image 0"),
    "above one": (lambda d: write_npy(d / "a.npy", with_value(255)), r"to 255 in image 2 .*rescale"),
    "just above one": (lambda d: write_npy(d / "a.npy", with_value(1.001)), r"to 1.001 in image 2 "),
    "below zero": (lambda d: write_npy(d / "a.npy", with_value(-1)), r"from -1 to .* image 2"),
    "too few labels": (lambda d: write_npz(d / "a.npz", images=GREY, labels=LABELS[1:]), r"label per image \(6\)"),
    "fractional labels": (lambda d: write_npz(d / "a.npz", images=GREY, labels=LABELS / 2), "float64"),
    "idx of the wrong kind": (lambda d: write_idx(d / "a-idx3-ubyte", LABELS), "3 axes.*found 00 00 08 01"),
    "empty idx": (lambda d: filled(d / "a-idx3-ubyte", b""), "found an empty file"),
    "idx header only": (lambda d: filled(d / "a-idx3-ubyte", bytes((0, 0, 8, 3, 0))), "cannot be read as an idx"),
    "truncated idx": (lambda d: truncated(write_idx(d / "a-idx3-ubyte", GREY)), r"\(6, 5, 4\) = 120 bytes, found only"),
    "idx with more": (lambda d: filled(d / "a-idx3-ubyte", bytes((0, 0, 8, 3, *(0, 0, 0, 1) * 3, 7, 7))), "found more"),
    "truncated idx gz": (lambda d: truncated(write_idx(d / "a-idx3.gz", GREY)), "cannot be read as an idx"),
    "idx bomb": (lambda d: filled(d / "a-idx3-ubyte", bytes((0, 0, 8, 3, *[99] * 12))), "claim to hold"),
    "no picture": (lambda d: filled(d / "p" / "a.png", b"not a picture"), "cannot be read as an image"),
    "grey among colour": (
        lambda d: picture(picture(d / "p/a.png", "RGB").with_name("b.png"), "L"),
        "mixed sizes.*a.png",
    ),
    "mixed sizes": (
        lambda d: picture(picture(d / "p/a.png", "L").with_name("b.png"), "L", (5, 5)),
        r"\(1, 5, 5\).*a.png",
    ),
    "transparent": (lambda d: picture(d / "p" / "a.png", "RGBA"), r"mode RGBA.*convert\('RGB'\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_names_its_file(mistake: str, tmp_path: Path) -> None:
    make, message = MISTAKES[mistake]
    path = make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_images(path.parent if path.parent.name == "p" else path)
    assert str(path) in str(caught.value)
    assert "DataError" not in str(caught.value)  # one message, not one wrapped in another


def test_a_damaged_picture_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", np.tile(COLOUR, (1, 9, 9, 1)))
    damaged = truncated(folder / "003.png")
    source = open_images(folder)
    assert len(source.batch([0, 1, 2])) == 3
    with pytest.raises(DataError, match="cannot be read as an image") as caught:
        source.batch([2, 3])
    assert str(damaged) in str(caught.value)
    picture(folder / "002.png", "RGB")
    with pytest.raises(DataError, match=r"002.png: expected .*\(3, 45, 36\).*found \(3, 5, 4\)"):
        source.batch([2])


@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 4, 5), (3, 32, 32)])
def test_images_of_another_shape_than_the_backbones_are_refused(shape: tuple[int, int, int], tmp_path: Path) -> None:
    folder, array = write_pictures(tmp_path / "p", COLOUR), write_npy(tmp_path / "a.npy", COLOUR)
    dataset = Items([Image.fromarray(x) for x in COLOUR])
    message = f"expected .*{re.escape(str(shape))}.*found {re.escape('(3, 5, 4)')}"
    for open_them in (
        lambda shape: open_images(folder, image_shape=shape),
        lambda shape: open_images(array, image_shape=shape),
        lambda shape: from_dataset(dataset, image_shape=shape),
    ):
        assert open_them((3, 5, 4)).shape == (3, 5, 4)
        with pytest.raises(DataError, match=message):
            open_them(shape)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "length of 1 or more"),
        ([GREY[0], GREY[1, :4]], r"mine\[1\]: expected uint8 of shape \(5, 4\)"),
        ([GREY[0], GREY[1] / 255], r"mine\[1\]: .*found float64"),
        ([Image.new("L", (4, 5)), Image.new("RGBA", (4, 5))], r"mine\[1\]: .*RGBA"),
        ([{"pixels": GREY[0], "mask": GREY[0]}], r"mine\[0\]: .* found the keys 'pixels', 'mask'"),
    ],
)
def test_mistakes_in_a_dataset_name_the_item(items: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_dataset(Items(items), name="mine")


def test_a_dataset_without_length_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(GREY)

    with pytest.raises(DataError, match="found a Stream"):
        from_dataset(Stream())


def test_an_archive_that_unpacks_to_nonsense_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_BOMB_BYTES", 2**16)
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((100, 64, 64), np.uint8))
    with pytest.raises(DataError, match=r"bomb\.npz.*claim to hold"):
        open_images(tmp_path / "bomb.npz")
    np.savez(tmp_path / "stored.npz", images=np.zeros((100, 64, 64), np.uint8))
    assert len(open_images(tmp_path / "stored.npz")) == 100


@settings(deadline=None)
@given(
    st.binary(max_size=300), st.sampled_from(["a.npy", "a.npz", "a-idx3-ubyte", "a-idx3.gz", "a.png"]), st.booleans()
)
def test_no_bytes_raise_anything_but_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str, signed: bool
) -> None:
    signature = {"a.npy": b"\x93NUMPY\x01\x00", "a.npz": b"PK\x03\x04", "a.png": b"\x89PNG\r\n\x1a\n"}
    signature |= {"a-idx3-ubyte": bytes((0, 0, 8, 3)), "a-idx3.gz": b"\x1f\x8b\x08"}
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(signature[name] * signed + content)
    with pytest.raises(DataError):
        open_images(path.parent if name == "a.png" else path)
