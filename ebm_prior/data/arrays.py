"""Checks of images and labels that are arrays in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ebm_prior.data.image_files import Shape
from ebm_prior.errors import DataError


def require_unit_interval(name: str, pixels: Tensor) -> None:
    """Raise DataError unless all images (N, C, H, W) of the source `name` hold finite values in [0, 1]."""
    low, high = pixels.flatten(1).amin(1), pixels.flatten(1).amax(1)  # NaN spreads to both
    bad = ~((low >= 0) & (high <= 1))
    if bad.any():
        first = int(bad.nonzero()[0])
        finite = bool(pixels[first].isfinite().all())
        problem = f"values from {low[first]:g} to {high[first]:g}" if finite else "NaN or infinite values"
        raise DataError(
            f"{name}: expected float images in [0, 1], found {problem} in image {first} (the first of {int(bad.sum())}"
            f" such); {'rescale them, or store uint8 in 0..255' if finite else 'repair or remove them'}"
        )


def channels_first(array: NDArray[Any], name: str, image_shape: Shape | None) -> NDArray[Any]:
    """(N, H, W), (N, C, H, W) or (N, H, W, C) as (N, C, H, W); `image_shape` decides where both readings fit.

    Raises DataError, with the source's `name`, for another shape.
    """
    readings = []
    if array.ndim == 3:
        readings = [array[:, None]]
    elif array.ndim == 4:
        readings += [array] if array.shape[1] in (1, 3) else []
        readings += [array.transpose(0, 3, 1, 2)] if array.shape[3] in (1, 3) else []
    if len(readings) == 2 and image_shape is not None:
        readings = [reading for reading in readings if reading.shape[1:] == tuple(image_shape)] or readings
    if len(readings) != 1:
        raise DataError(
            f"{name}: expected an array (N, H, W), (N, C, H, W) or (N, H, W, C) with C = 1 or 3, found {array.shape}"
            f"{', which can be read in two ways' if readings else ''}"
        )
    return readings[0]


def checked_labels(labels: ArrayLike | None, count: int, name: str) -> Tensor | None:
    """Labels as int64 (count,), None for none. Raises DataError, with the source's `name`, where they do not fit."""
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
