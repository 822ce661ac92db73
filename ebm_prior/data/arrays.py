"""Images in memory: arrays of any usual layout become an `ImageSource`, after a check of shape, type and range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ebm_prior.compute.memory import free_bytes
from ebm_prior.data.source import Arrays, ImageSource, Shape
from ebm_prior.errors import DataError, MemoryLimitError, few
from ebm_prior.model.checked_images import require_unit_interval


def from_array(
    images: ArrayLike, labels: ArrayLike | None = None, *, name: str = "array", image_shape: Shape | None = None
) -> ImageSource:
    """Images in memory: (N, H, W), (N, C, H, W) or (N, H, W, C), uint8 or float in [0, 1].

    labels: integers (N,). `name` stands in messages and records. Memory is shared with `images` where that can be.
    image_shape: (C, H, W) that the images must have; needed where C is neither 1 nor 3.
    Raises DataError for another shape or type, for NaN or values outside [0, 1], and for labels that do not fit.
    """
    pixels = as_pixels(images, name, image_shape)
    if pixels.is_floating_point():
        require_unit_interval(name, pixels)
    shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
    return ImageSource(name, Arrays(pixels, shape), labels_of(labels, len(pixels), name))


def as_pixels(images: ArrayLike, name: str, image_shape: Shape | None) -> Tensor:
    """Images of `from_array` as uint8 or float32 (N, C, H, W); the range of values is not checked yet."""
    array = np.asarray(images)
    if 0 in array.shape:
        raise DataError(f"{name}: no images, the array has shape {array.shape}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise DataError(f"{name}: expected uint8 in 0..255 or floats in [0, 1], found {array.dtype}; convert the array")
    array = _channels_first(array, name, image_shape)
    if image_shape is not None:
        require_shape(name, (array.shape[1], array.shape[2], array.shape[3]), image_shape)
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes inf, which is reported below
        dtype = np.uint8 if array.dtype == np.uint8 else np.float32
        return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


def require_shape(name: str, found: Shape, expected: Shape) -> None:
    """Raise DataError unless the images called `name` have the expected (C, H, W)."""
    if found != tuple(expected):
        raise DataError(f"{name}: {shape_problem(found, expected)}")


def shape_problem(found: Shape, expected: Shape) -> str:
    """What is wrong with images of another shape, and what to do about it."""
    convert = ""
    if found[1:] == tuple(expected)[1:] and {found[0], expected[0]} == {1, 3}:
        mode = "rgb" if expected[0] == 3 else "grey"
        convert = f"; --data-mode {mode} (mode={mode!r}) converts the colours"
    return (
        f"expected images of shape {tuple(expected)} (channels, height, width), found {found}. Images are never resized"
        f" or recoloured silently: convert them beforehand, or choose a backbone of their shape{convert}"
    )


def require_memory(name: str, needed: int, *, instead: str = "") -> None:
    """Raise MemoryLimitError if less than `needed` bytes are free. Called before the memory is allocated.

    instead: further advice for the error message.
    """
    free = free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise MemoryLimitError(
            f"{name}: expected images that fit in memory, found {needed / 2**30:.1f} GiB where {free / 2**30:.1f} GiB"
            " are free; free some memory, store 8-bit pixels instead of floats, or store pictures in a folder or an"
            f" LMDB, which are read one by one{instead}"
        )


def loaded_bytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Peak memory in bytes while an array becomes a source: its own, and that of the copy if `from_array` makes one."""
    count = int(np.prod([int(side) for side in shape], dtype=object))
    kept = 1 if dtype == np.uint8 else 4
    copied = dtype not in (np.dtype(np.uint8), np.dtype(np.float32)) or (len(shape) == 4 and shape[1] not in (1, 3))
    return count * (dtype.itemsize + kept * copied)


def _channels_first(array: NDArray[Any], name: str, image_shape: Shape | None) -> NDArray[Any]:
    """(N, H, W), (N, C, H, W) or (N, H, W, C) as (N, C, H, W); `image_shape` decides where both would do."""
    usual = {1, 3} if image_shape is None else {1, 3, image_shape[0]}
    readings = []
    if array.ndim == 3:
        readings = [array[:, None]]
    elif array.ndim == 4:
        readings += [array] if array.shape[1] in usual else []
        readings += [array.transpose(0, 3, 1, 2)] if array.shape[3] in usual else []
    if len(readings) == 2 and image_shape is not None:
        readings = [reading for reading in readings if reading.shape[1:] == tuple(image_shape)] or readings
    if len(readings) != 1:
        channels = few(map(str, sorted(usual)), separator=" or ")
        other = " (image_shape= allows other numbers of channels)" * (image_shape is None and array.ndim == 4)
        raise DataError(
            f"{name}: expected an array (N, H, W), (N, C, H, W) or (N, H, W, C) with C = {channels}, found"
            f" {array.shape}{', which can be read in two ways' if readings else other}"
        )
    return readings[0]


def labels_of(labels: ArrayLike | None, count: int, name: str) -> Tensor | None:
    """Labels as int64 (N,). Raises DataError unless they are integers, one per image."""
    if labels is None:
        return None
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:  # as Keras stores CIFAR's
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) != count:
        raise DataError(
            f"{name}: expected one integer label per image ({count}), found {array.dtype} of shape {array.shape}"
        )
    return torch.from_numpy(array.astype(np.int64))
