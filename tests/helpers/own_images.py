"""Images of a class of one's own, as a user might write it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ebm_prior.interfaces import Images


class Own:
    """Images in memory, which nobody has looked at."""

    name = "my own"
    labels = torch.arange(200)

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.asked: list[int] = []

    @classmethod
    def of(cls, images: Images, broken: int) -> Own:
        """100 images of a source, repeated where it has fewer, of which number `broken` has a NaN."""
        pixels = images.batch([index % len(images) for index in range(100)]).clone()
        pixels[broken, 0, 1, 1] = math.nan
        return cls(pixels)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        self.asked += rows.tolist()
        return self.images[rows]
