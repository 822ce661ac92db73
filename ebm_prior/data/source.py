"""The image source: random access to N images of one shape, wherever their pixels are, and where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ebm_prior.errors import ConfigurationError, DataError

Split = Literal["train", "test"]
Mode = Literal["rgb", "grey"]
Shape = tuple[int, int, int]

CHANNELS: dict[Mode, int] = {"rgb": 3, "grey": 1}
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's convert("L")


class Store(Protocol):
    """Storage of the pixels of an image source. `rows`: int64 (B,), already checked."""

    @property
    def shape(self) -> Shape:
        """(C, H, W) of every image."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, rows: Tensor) -> Tensor:
        """Images (B, C, H, W), float32 in [0, 1]; memory of their own."""

    def content(self, rows: Tensor) -> Iterator[bytes]:
        """The bytes over which the fingerprint is computed, piece by piece."""


@dataclass(frozen=True)
class Origin:
    """The origin of the images of a source, as plain values, from which `reopen` finds them again.

    spec: the name of a data set, or an absolute path.  given: the same as the user wrote it, perhaps a relative path.
    split: the name of the split.  shape: (C, H, W).  root: absolute folder of named data sets; None for a path.
    array, mode: of `open_images`.
    """

    spec: str
    given: str
    split: Split
    shape: Shape
    root: str | None = None
    array: str | None = None
    mode: Mode | None = None


class ImageSource:
    """Random access to N images of one shape. Made by `open_images`, `from_array` or `from_dataset`.

    name: name of the images in messages and records.  shape: (C, H, W).  labels: int64 (N,), or None.
    remarks: sentences for the user about the reading, e.g. on files left out or pictures rotated.
    origin: how `reopen` finds these images again; None for images from memory and for a subset.
    """

    looks_itself = True  # at what it reads: `checked` leaves it as it is
    fixed = True  # every read of an image gives the same pixels, so that they can be kept

    def __init__(
        self,
        name: str,
        store: Store,
        labels: Tensor | None = None,
        rows: Tensor | None = None,
        *,
        remarks: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.shape = store.shape
        self.labels = labels
        self.remarks = tuple(remarks)
        self.origin: Origin | None = None
        self._store = store
        self._digest: str | None = None
        self._rows = torch.arange(len(store)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<ImageSource {self.name}: {len(self)} images {self.shape}, {'no ' * (self.labels is None)}labels>"

    @property
    def in_memory(self) -> bool:
        """Whether the pixels are in memory already."""
        return isinstance(self._store, Arrays)

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images at `indices` (B,) as float32 (B, C, H, W) in [0, 1]: 8-bit pixels / 255, 16-bit ones / 65535.

        Raises DataError, naming the file, if an image of a folder cannot be decoded.
        """
        return self._store.read(self._rows[self._checked(indices)])

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSource:
        """A source of the images at `indices`, in this order; the pixels are shared, not copied."""
        chosen = self._checked(indices)
        labels = None if self.labels is None else self.labels[chosen]
        return ImageSource(self.name, self._store, labels, self._rows[chosen], remarks=self.remarks)

    def recoloured(self, mode: Mode) -> ImageSource:
        """The same images as colour ("rgb") or grey images ("grey"), converted when they are read.

        Raises DataError for images that are neither.
        """
        if self.shape[0] == CHANNELS[mode]:
            return self
        if self.shape[0] not in CHANNELS.values():
            raise DataError(
                f"{self.name}: expected images of 1 or 3 channels, of which the colours can be converted, found"
                f" {self.shape}; leave out --data-mode (mode=)"
            )
        return ImageSource(self.name, Recoloured(self._store, mode), self.labels, self._rows, remarks=self.remarks)

    def fingerprint(self) -> str:
        """SHA-256 over shape and pixels, in order; for a folder, over the files as they are, whatever their names.

        Taken at the first call, and kept.
        """
        if self._digest is not None:
            return self._digest
        digest = hashlib.sha256(f"{len(self)} {self.shape}".encode())
        for chunk in self._store.content(self._rows):
            digest.update(chunk)
        self._digest = digest.hexdigest()
        return self._digest

    def _checked(self, indices: Tensor | Sequence[int]) -> Tensor:
        found = torch.as_tensor(indices)
        if found.shape == (0,):  # an empty list has no integer type of its own
            return torch.empty(0, dtype=torch.int64)
        if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool:
            raise ConfigurationError(
                f"{self.name}: expected a list of integer indices, found {found.dtype} of shape {tuple(found.shape)}"
                " (for a mask, pass mask.nonzero()[:, 0])"
            )
        if found.min() < 0 or found.max() >= len(self):
            raise ConfigurationError(
                f"{self.name}: indices go from 0 to {len(self) - 1}, found {int(found.min())} to {int(found.max())}"
            )
        return found.to("cpu", torch.int64)


def recolour(images: Tensor, channels: int) -> Tensor:
    """Images (…, C, H, W) of 1 or 3 channels as images of `channels`, which is 1 or 3.

    Grey becomes three equal channels; colour becomes its luma, 0.299 R + 0.587 G + 0.114 B.
    """
    if images.shape[-3] == channels:
        return images
    if channels == 3:
        return images.repeat_interleave(3, dim=-3)
    weights = torch.tensor(_LUMA, dtype=images.dtype)[:, None, None]
    return (images * weights).sum(-3, keepdim=True).clamp_(0, 1)


@dataclass(frozen=True, eq=False)
class Recoloured:
    """The images of another store in other colours."""

    store: Store
    mode: Mode

    @property
    def shape(self) -> Shape:
        """(C, H, W), with the channels of `mode`."""
        return (CHANNELS[self.mode], *self.store.shape[1:])

    def __len__(self) -> int:
        return len(self.store)

    def read(self, rows: Tensor) -> Tensor:
        """The images of the other store, converted."""
        return recolour(self.store.read(rows), CHANNELS[self.mode])

    def content(self, rows: Tensor) -> Iterator[bytes]:
        """The content of the wrapped store. Fingerprints still differ, because they include the shape."""
        return self.store.content(rows)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Pixels in memory, (N, C, H, W): uint8 is kept as such and scaled batch by batch; float32 is in [0, 1]."""

    pixels: Tensor
    shape: Shape

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, rows: Tensor) -> Tensor:
        """Rows of the array, scaled."""
        pixels = self.pixels[rows]
        return pixels if pixels.dtype == torch.float32 else pixels.float().div_(255)

    def content(self, rows: Tensor) -> Iterator[bytes]:
        """The pixels as they are kept."""
        for start in range(0, len(rows), 1024):
            yield self.pixels[rows[start : start + 1024]].numpy().tobytes()
