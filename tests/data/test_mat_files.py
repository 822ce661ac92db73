"""MATLAB files as SVHN's, with scipy's writer as an oracle, and files that are damaged or made to do harm."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from ebm_prior.data.images import open_images
from ebm_prior.data.mat_files import find_mat, read_mat
from ebm_prior.errors import DataError, MemoryLimitError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 3, 5), dtype=np.uint8)
DIGITS = np.array([[10, 1, 2, 10, 9]]).T


def saved(path: Path, **options: Any) -> Path:
    savemat(path, {"X": PIXELS, "y": DIGITS} | options.pop("more", {}), **options)
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "int64", "uint16"])
def test_what_scipy_writes_is_read(kind: str, compressed: bool, tmp_path: Path) -> None:
    more = {"a": {"b": 1.0}, "text": "words", "y": DIGITS.astype(kind), "cells": np.array([1, "x"], dtype=object)}
    images, labels = read_mat(saved(tmp_path / "a.mat", more=more, do_compression=compressed))
    np.testing.assert_array_equal(images, PIXELS.transpose(3, 0, 1, 2))
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 0, 9]
    savemat(tmp_path / "bare.mat", {"X": PIXELS}, do_compression=compressed)
    assert read_mat(tmp_path / "bare.mat")[1] is None


def element(kind: int, content: bytes, order: str) -> bytes:
    return struct.pack(f"{order}II", kind, len(content)) + content + bytes(-len(content) % 8)


def variable(name: str, shape: tuple[int, ...], content: bytes, order: str, *, class_: int = 9, kind: int = 2) -> bytes:
    flags = element(6, struct.pack(f"{order}II", class_, 0), order)
    shapes = element(5, struct.pack(f"{order}{len(shape)}i", *shape), order)
    inner = flags + shapes + element(1, name.encode(), order) + element(kind, content, order)
    return element(14, inner, order)


def file_of(path: Path, *variables: bytes, order: str = "<") -> Path:
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}HH", 0x0100, 0x4D49)
    path.write_bytes(header + b"".join(variables))
    return path


def test_the_other_byte_order_is_read(tmp_path: Path) -> None:
    labels = struct.pack(">5H", *DIGITS[:, 0])
    y = variable("y", (5, 1), labels, ">", class_=11, kind=4)
    path = file_of(tmp_path / "a.mat", variable("X", PIXELS.shape, PIXELS.tobytes("F"), ">"), y, order=">")
    images, found = read_mat(path)
    np.testing.assert_array_equal(images, PIXELS.transpose(3, 0, 1, 2))
    assert found is not None
    assert found.tolist() == [0, 1, 2, 0, 9]


def test_a_folder_as_people_have_it(tmp_path: Path) -> None:
    """The files in a folder of their own, or under the data root; the extra split is left alone."""
    folder = tmp_path / "root" / "SVHN"
    folder.mkdir(parents=True)
    for name, mark in (("train", 1), ("test", 2), ("extra", 3)):
        saved(folder / f"{name}_32x32.mat", more={"X": np.full((32, 32, 3, 5), mark, np.uint8)})
    for source in open_images(folder, split="test"), open_images("svhn", split="test", data_root=tmp_path / "root"):
        assert (source.batch(range(5)) * 255).unique().tolist() == [2]
    assert (open_images(folder).batch([0]) * 255).unique().tolist() == [1]
    (folder / "test_32x32.mat").unlink()
    assert find_mat(folder, "test") is None
    with pytest.raises(DataError, match="none of the test split"):
        open_images(folder, split="test")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"X": PIXELS[..., 0]}, r"found X \(uint8 \(8, 6, 3\)\)"),
        ({"X": PIXELS / 255}, r"found X \(double"),
        ({"y": np.array(list("abcde"))}, r"expected integer labels in y.*found y \(char"),
        ({"y": DIGITS * 1j}, r"found y \(complex double"),
        ({"y": DIGITS + 0.5}, r"one integer label per image"),
        ({"y": DIGITS[:3]}, r"one integer label per image"),
        ({"X": PIXELS[..., :0], "y": DIGITS[:0]}, "no images"),
    ],
)
def test_other_variables_are_named(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        open_images(saved(tmp_path / "a.mat", more=more))


def test_other_levels_are_named(tmp_path: Path) -> None:
    hdf5 = tmp_path / "new.mat"
    hdf5.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF" * 100)
    with pytest.raises(DataError, match=r"version 7.3; .*save -v7"):
        read_mat(hdf5)
    savemat(tmp_path / "old.mat", {"y": DIGITS}, format="4")
    with pytest.raises(DataError, match="level 5, found no such header"):
        read_mat(tmp_path / "old.mat")


def test_promises_that_are_not_kept_are_refused(tmp_path: Path) -> None:
    pixels = PIXELS.tobytes("F")
    for shape, content in (
        ((8, 6, 3, 6), pixels),
        ((8, 6, 3, 4), pixels),
        ((8, 6, 3, -5), pixels),
        ((0, 6, 3, 5), b""),
    ):
        path = file_of(tmp_path / "a.mat", variable("X", shape, content, "<"))
        with pytest.raises(DataError):
            open_images(path)
    huge = variable("X", (2**20, 2**20, 3, 2**10), pixels, "<")
    for made in (huge, struct.pack("<II", 15, len(packed := zlib.compress(huge))) + packed):
        with pytest.raises((DataError, MemoryLimitError), match="GiB"):
            open_images(file_of(tmp_path / "a.mat", made))
    labels = variable("y", (2**30, 2**10), b"", "<")
    with pytest.raises((DataError, MemoryLimitError), match="GiB"):
        open_images(file_of(tmp_path / "a.mat", variable("X", PIXELS.shape, pixels, "<"), labels))


@pytest.mark.parametrize("compressed", [False, True])
def test_no_damage_is_more_than_a_stated_error(compressed: bool, tmp_path: Path) -> None:
    """Bytes changed anywhere, most of them in headers, and files cut short. scipy's reader dies of some of these."""
    whole = saved(tmp_path / "a.mat", do_compression=compressed).read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for trial in range(300):
        damaged = bytearray(whole)
        end = 280 if trial % 3 else len(whole)
        for place in random.integers(124, min(end, len(whole)), 3):
            damaged[place] = random.integers(256)
        (tmp_path / "b.mat").write_bytes(damaged[: random.integers(len(whole)) if trial % 10 == 0 else len(whole)])
        try:
            open_images(tmp_path / "b.mat")
        except (DataError, MemoryLimitError):
            refused += 1
    assert refused > 150
