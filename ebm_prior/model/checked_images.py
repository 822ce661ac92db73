"""Checks of images that come from a user's own class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior.errors import DataError
from ebm_prior.interfaces import Images


def checked(images: Images, *, first: int = 64) -> Images:
    """The same images with a check of every batch that is read: finite, in [0, 1], float32, of one shape.

    Images that say `looks_itself`, as an `ImageSource` does, are returned unchanged. Of other images the `first` ones
    are read at once, so that most mistakes show at the start; the rest is checked when it is read. Raises DataError
    with the number of the image.

        images = checked(MyImages())
        images.batch([3, 5])  # DataError: … found NaN or infinite values in image 5 …
    """
    if getattr(images, "looks_itself", False):
        return images
    wrapped = Checked(images)
    if first:
        wrapped.batch(range(min(first, len(wrapped))))
    return wrapped


class Checked:
    """The result of `checked`. Other attributes (labels, a fingerprint) are those of the wrapped images."""

    looks_itself = True

    def __init__(self, images: Images) -> None:
        self._images = images
        self.name: str = getattr(images, "name", type(images).__name__)
        self._shape: tuple[int, ...] | None = None
        if not len(images):
            raise DataError(f"{self.name}: no images, their number (len) is 0")

    def __len__(self) -> int:
        return len(self._images)

    def __getattr__(self, name: str) -> Any:
        if name == "_images":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self._images, name)

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Images (B, C, H, W), float32 in [0, 1]. Raises DataError with the number of the first that is not so."""
        found = self._images.batch(indices)
        if not isinstance(found, Tensor) or found.dtype != torch.float32 or found.ndim != 4:
            what = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise DataError(
                f"{self.name}: expected batches as float32 tensors (B, C, H, W) in [0, 1], found {what}; convert them"
                " in its method batch"
            )
        if len(found) != len(indices):
            raise DataError(f"{self.name}: expected {len(indices)} images for as many indices, found {len(found)}")
        self._shape = self._shape or tuple(found.shape[1:])
        if tuple(found.shape[1:]) != self._shape:
            raise DataError(
                f"{self.name}: expected images of shape {self._shape} as in its first batch, found"
                f" {tuple(found.shape[1:])} (channels, height, width); make them equal first"
            )
        if len(found):
            require_unit_interval(self.name, found, indices)
        return found


def require_unit_interval(name: str, pixels: Tensor, indices: Sequence[int] | Tensor | None = None) -> None:
    """Raise DataError unless all of `pixels` (N, …) are finite and in [0, 1]. `indices`: the numbers of the images."""
    bad = unfit(pixels)
    if bad is not None:
        number = bad.number if indices is None else int(indices[bad.number])
        raise DataError(
            f"{name}: expected float images in [0, 1], found {bad.values} in image {number} (the first of {bad.such}"
            f" such); {'rescale them, or store uint8 in 0..255' if bad.finite else 'repair or remove them'}"
        )


class Unfit(NamedTuple):
    """The first of some images that are not finite or not in [0, 1]."""

    number: int  # its row
    such: int  # the number of such images
    finite: bool
    low: float  # its smallest value
    high: float

    @property
    def values(self) -> str:
        """Its values in words."""
        return f"values from {self.low:g} to {self.high:g}" if self.finite else "NaN or infinite values"


def unfit(pixels: Tensor) -> Unfit | None:
    """The first of the images (N, …) that has a value that is not finite or not in [0, 1]; None where all are fit."""
    low, high = pixels.flatten(1).amin(1), pixels.flatten(1).amax(1)  # NaN spreads to both
    bad = ~((low >= 0) & (high <= 1))
    if not bad.any():
        return None
    first = int(bad.nonzero()[0])
    finite = bool(pixels[first].isfinite().all())
    return Unfit(first, int(bad.sum()), finite, float(low[first]), float(high[first]))
