"""Images to tell apart: synthetic sets, data sets fitted to a network's size and colours, labelled sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_prior.data.images import ImageSource, from_array, open_images
from ebm_prior.errors import DataError, few
from ebm_prior.interfaces import Images

SYNTHETIC = ("noise", "constant")


def open_set(
    spec: str | ImageSource,
    shape: tuple[int, int, int],
    n: int,
    *,
    seed: int,
    open_with: Callable[..., ImageSource] = open_images,
    **where: Any,
) -> Images:
    """The test images of `spec` in the `shape` (C, H, W) of the backbone's images, if that is possible without loss.

    Grey images become colour images with three equal channels, and smaller ones get a black frame; the source's name
    says so. The spec `noise` means n images of independent uniform pixels, `constant` n images of one colour each.
    Images that are open already can stand in place of a spec. `where`: further arguments of `open_images`, or of the
    function `open_with` in its place. Raises DataError for images that do not fit.
    """
    if isinstance(spec, str) and spec in SYNTHETIC:
        random = np.random.default_rng([seed, SYNTHETIC.index(spec)])
        pixels = random.integers(0, 256, (n, *(shape if spec == "noise" else (shape[0], 1, 1))), dtype=np.uint8)
        return from_array(np.ascontiguousarray(np.broadcast_to(pixels, (n, *shape))), name=spec)
    source = open_with(spec, split="test", **where) if isinstance(spec, str) else spec
    return source if source.shape == shape else Adapted(source, shape)


class Adapted:
    """The images of a source converted to another shape, by equal colour channels or a black frame."""

    def __init__(self, source: ImageSource, shape: tuple[int, int, int]) -> None:
        self._source, self._shape = source, shape
        (channels, height, width), (wanted, *sides) = source.shape, shape
        self._frame = [(side - own) for side, own in zip(sides, (height, width), strict=True)]
        if channels not in (1, wanted) or min(self._frame) < 0:
            raise DataError(
                f"{source.name}: expected images of shape {shape}, or grey or smaller ones that can be made so without "
                f"a loss; found {source.shape}. Resize them first"
            )
        colours = "as RGB" if wanted == 3 else f"in {wanted} channels"
        done = [colours] * (channels != wanted) + [f"padded to {sides[0]}×{sides[1]}"] * (max(self._frame) > 0)
        self.name = f"{source.name} ({few(done)})"

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Images (B, C, H, W) in [0, 1]."""
        down, across = self._frame
        sides = (across // 2, across - across // 2, down // 2, down - down // 2)
        images = torch.nn.functional.pad(self._source.batch(indices), sides)
        return images.expand(-1, self._shape[0], -1, -1).contiguous()


def labelled(source: ImageSource, labels: Sequence[int], *, among: bool) -> ImageSource:
    """The images with a label in `labels`, or (`among` False) the others. Without any `labels`, all images.

    Raises DataError where the source has no labels, or no such image is there.
    """
    if not labels:
        return source
    if source.labels is None:
        raise DataError(f"{source.name} has no labels to choose images by: give labelled images")
    chosen = torch.isin(source.labels, torch.tensor(labels)) == among
    if not chosen.any():
        found = few(map(str, sorted(set(source.labels.tolist()))))
        which = "among" if among else "other than"
        raise DataError(f"{source.name} has no image with a label {which} {list(labels)}; its labels are {found}")
    return source.subset(chosen.nonzero()[:, 0])
