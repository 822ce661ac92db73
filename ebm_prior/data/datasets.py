"""Images from map-style data sets of torch, torchvision or Hugging Face."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ebm_prior.data.arrays import as_pixels, from_array, labels_of, loaded_bytes, require_memory
from ebm_prior.data.pictures import decode, read_pixels, scaled
from ebm_prior.data.source import ImageSource, Shape
from ebm_prior.errors import DataError, described, few
from ebm_prior.model.checked_images import require_unit_interval

_IMAGE_KEYS = ("image", "img", "images", "pixel_values")
_LABEL_KEYS = ("label", "labels")
_READ_TWICE = 8  # items, which must be the same the second time: a random flip passes once in 2^8


class MapStyle(Protocol):
    """The interface of a data set: torch.utils.data.Dataset with a length, or datasets.Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


def from_dataset(
    dataset: MapStyle, *, name: str = "dataset", image_shape: Shape | None = None, lazy: bool = False
) -> ImageSource:
    """Any data set with a length, whose items are images, (image, label, …), or {"image": image, "label": label}.

    An image is a Pillow image, or a tensor or array as in `from_array` without the batch axis. In a tuple, a second
    entry that is an integer is the label; in a dictionary, the image is at "image", "img", "images" or "pixel_values",
    or the only entry that can be one, and the label at "label" or "labels".
    lazy: False reads the items once, now, into memory, which freezes a random augmentation. True reads an item whenever
    it is needed; items must then be the same every time, and labels are those that the data set lists (`targets`,
    `labels`, or a column).  image_shape: (C, H, W) that the images must have.
    Raises DataError, naming the item, as `from_array` and `open_images` do; MemoryLimitError where memory is too small.

    >>> from_dataset([(torch.zeros(1, 8, 8), 3), (torch.ones(1, 8, 8), 5)], name="two")
    <ImageSource two: 2 images (1, 8, 8), labels>
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise DataError(f"{name}: expected a Dataset with a length of 1 or more, found a {type(dataset).__name__}")
    if lazy:
        return _lazily(dataset, name, image_shape)
    first, _ = _item(dataset, 0, name)
    needed = len(dataset) * loaded_bytes((1, *first.shape), first.dtype)
    require_memory(name, needed, instead="; from_dataset(…, lazy=True) reads the items when they are needed")
    images = np.empty((len(dataset), *first.shape), first.dtype)
    labels: list[int] = []
    for index in range(len(dataset)):
        image, label = _item(dataset, index, name)
        if (image.shape, image.dtype) != (first.shape, first.dtype):
            raise DataError(
                f"{name}[{index}]: expected {first.dtype} of shape {first.shape} as in item 0, found {image.dtype} of"
                f" shape {image.shape}; make the images equal first"
            )
        images[index] = image
        labels += [] if label is None else [label]
    return from_array(images, labels if len(labels) == len(images) else None, name=name, image_shape=image_shape)


@dataclass(frozen=True, eq=False)
class Items:
    """A store that reads the items of a data set when they are needed."""

    dataset: MapStyle
    name: str
    shape: Shape

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, rows: Tensor) -> Tensor:
        """The items, checked as those of an array are."""
        images = torch.empty(len(rows), *self.shape)
        for index, row in enumerate(rows.tolist()):
            pixels = self.pixels(row)
            images[index] = pixels if pixels.is_floating_point() else pixels.float().div_(255)
        if len(rows):
            require_unit_interval(self.name, images, rows)
        return images

    def content(self, rows: Tensor) -> Iterator[bytes]:
        """The pixels, as an array of them would be kept."""
        for row in rows.tolist():
            yield self.pixels(row).numpy().tobytes()

    def pixels(self, row: int) -> Tensor:
        """One item as uint8 or float32 (C, H, W)."""
        image, _ = _item(self.dataset, row, self.name)
        return as_pixels(image[None], f"{self.name}[{row}]", self.shape)[0]


def _lazily(dataset: MapStyle, name: str, image_shape: Shape | None) -> ImageSource:
    first = as_pixels(_item(dataset, 0, name)[0][None], f"{name}[0]", image_shape)[0]
    items = Items(dataset, name, (first.shape[0], first.shape[1], first.shape[2]))
    start = torch.arange(min(len(dataset), _READ_TWICE))
    for row, one, other in zip(start.tolist(), items.read(start), items.read(start), strict=True):
        if not torch.equal(one, other):
            raise DataError(
                f"{name}[{row}]: expected the same image at every read, found two; take the random augmentation out of"
                " the data set, or leave out lazy=True, which freezes it"
            )
    listed = _listed_labels(dataset)
    remarks = [] if listed is not None else ["the data set lists no labels (targets, labels), so there are none"]
    return ImageSource(name, items, labels_of(listed, len(dataset), name), remarks=remarks)


def _listed_labels(dataset: MapStyle) -> Any:
    """All labels, read without reading images, if the data set lists them; else None."""
    columns = getattr(dataset, "column_names", None)
    for key in _LABEL_KEYS:
        if isinstance(columns, list) and key in columns:
            return dataset[key][:]  # a column of Hugging Face's, which may itself be read lazily
    return next((found for key in ("targets", "labels") if (found := getattr(dataset, key, None)) is not None), None)


def _item(dataset: MapStyle, index: int, name: str) -> tuple[NDArray[Any], int | None]:
    """The image of an item, (H, W), (C, H, W) or (H, W, C), and its label."""
    item = dataset[index]
    label: Any = None
    if isinstance(item, Mapping):
        image, label = _of_mapping(item, f"{name}[{index}]")
    elif isinstance(item, (tuple, list)):
        image, label = (*item, None, None)[:2]
    else:
        image = item
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):  # Hugging Face's, without decoding
        pixels = decode(io.BytesIO(image["bytes"]), f"{name}[{index}]")
        image = pixels if pixels.dtype == np.uint8 else scaled(pixels).numpy()
    elif isinstance(image, Image.Image):
        pixels = read_pixels(image, f"{name}[{index}]")
        image = pixels if pixels.dtype == np.uint8 else scaled(pixels).numpy()
    elif isinstance(image, Tensor):
        image = (image.float() if image.is_floating_point() else image).detach().cpu()
    return _pixels(image, f"{name}[{index}]"), _number(label)


def _pixels(image: Any, name: str) -> NDArray[Any]:
    with contextlib.suppress(ValueError, TypeError):  # of nested lists of unequal lengths
        array = np.asarray(image)
        if array.ndim > 1 and array.dtype.kind in "buif":
            return array
    raise DataError(
        f"{name}: expected an image, a picture of Pillow's or an array (C, H, W), (H, W, C) or (H, W); found "
        f"{described(image)}; in a tuple, the image comes first"
    )


def _number(label: Any) -> int | None:
    with contextlib.suppress(ValueError, TypeError):
        number = np.asarray(label)
        return int(number) if number.ndim == 0 and number.dtype.kind in "iu" else None
    return None


def _of_mapping(item: Mapping[Any, Any], name: str) -> tuple[Any, Any]:
    """Image and label of a dictionary."""
    label = next((item[key] for key in _LABEL_KEYS if key in item), None)
    for key in _IMAGE_KEYS:
        if key in item:
            return item[key], label
    possible = [value for value in item.values() if isinstance(value, Image.Image) or getattr(value, "ndim", 0) > 1]
    if len(possible) != 1:
        raise DataError(
            f"{name}: expected a dictionary with the image at {', '.join(map(repr, _IMAGE_KEYS))}, found the keys"
            f" {few(map(repr, item))}; rename the one of the image"
        )
    return possible[0], label
