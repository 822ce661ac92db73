"""Training images that stay on the device: every image is read and copied there once, as 8-bit pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ebm_prior.compute.memory import free_bytes
from ebm_prior.interfaces import Images

SHARE = 0.25  # largest share of the device's free memory that images take


def held_bytes(images: Images, shape: Sequence[int], device: torch.device) -> int:
    """Bytes that `on_device` takes for the `images` of this `shape` (C, H, W); 0 where it leaves them as they are."""
    fixed, here = getattr(images, "fixed", False), device.type == "cpu" and getattr(images, "in_memory", False)
    needed, free = len(images) * math.prod(shape), free_bytes(device)
    return needed if fixed and not here and free is not None and needed <= SHARE * free else 0


def on_device(images: Images, shape: Sequence[int], device: torch.device) -> Images:
    """The same images of `shape` (C, H, W), kept on the `device` once they are read, if they fit.

    Images that are not `fixed`, as those of a user's own class, may differ from read to read, so they are left as they
    are. So are arrays in memory that are trained on by the CPU.
    """
    return HeldImages(images, shape, device) if held_bytes(images, shape, device) else images


class HeldImages:
    """The result of `on_device`. Batches are equal to those of the images, bit for bit, and lie on the device."""

    def __init__(self, images: Images, shape: Sequence[int], device: torch.device) -> None:
        self._images, self.name, self._device = images, images.name, device
        self._pixels: Tensor | None = torch.empty(len(images), *shape, dtype=torch.uint8, device=device)
        self._known = torch.zeros(len(images), dtype=torch.bool)
        # A division on a GPU may round differently, so the value of each pixel is looked up.
        self._values = torch.arange(256, dtype=torch.uint8).float().div_(255).to(device)

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Images (B, C, H, W), float32 in [0, 1]."""
        rows = torch.as_tensor(indices)
        new = rows[~self._known[rows]]
        if len(new) and self._pixels is not None:
            self._read(new, self._pixels)
        if self._pixels is None:
            return self._images.batch(indices)
        pixels = self._pixels[rows.to(self._device)]
        return self._values.index_select(0, pixels.flatten().int()).view(pixels.shape)

    def _read(self, rows: Tensor, memory: Tensor) -> None:
        """Store the images at `rows`. If they are not of 8 bits, or of another shape, nothing is stored from now on."""
        found = self._images.batch(rows)
        pixels = (found * 255).round().to(torch.uint8)
        if pixels.shape[1:] != memory.shape[1:] or not torch.equal(pixels.float().div_(255), found):
            self._pixels = None
            return
        memory[rows.to(self._device)] = pixels.to(self._device)
        self._known[rows] = True
