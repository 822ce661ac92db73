"""Moving pictures of a prior at work, as GIF (`ebm-prior show transitions --out x.gif`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.prior import EBMPrior
from ebm_prior.pictures.grids import grid
from ebm_prior.pictures.sheets import page, save_arrays
from ebm_prior.pictures.show import chain, chain_steps, decoded, kernel_words
from ebm_prior.storage.atomic import write_atomically

MOVING = ("transitions",)
"""The pictures of `show.PICTURES` that can move."""
_MOST_FRAMES = 60
_SIDE = 120  # pixels: smaller images are enlarged to at least this
_FIRST, _BETWEEN, _LAST = 1000, 120, 2500  # milliseconds that frames stay


class Film(NamedTuple):
    """Frames of one size, the milliseconds that each stays, and the arrays that they show."""

    frames: Sequence[Image.Image]
    milliseconds: Sequence[int]
    arrays: Mapping[str, NDArray[Any]]


def transitions_film(prior: EBMPrior, n: int, *, seed: int = 0, progress: Progress = SILENT) -> Film:
    """The chains of `show.transitions`, all n in a frame: one frame per step, or `_MOST_FRAMES` evenly spaced steps."""
    steps = chain_steps(prior)
    count = min(steps, _MOST_FRAMES - 1)
    at = [round(steps * index / count) for index in range(count + 1)]
    kept = chain(prior, n, steps, at, seed=seed, progress=progress).eps
    images = [decoded(prior, kept[step]) for step in at]
    caption = (
        f"{n} chains of {kernel_words(prior)}, from draws of the backbone's prior (step 0) to the energy-based prior; "
        "the images are the means of p(x|z)."
    )
    columns, scale = math.ceil(math.sqrt(2 * n)), max(1, math.ceil(_SIDE / max(prior.backbone.image_shape[1:])))
    frames = [
        page(f"Step {step} of {steps}", [[grid(shown, columns=columns, scale=scale)]], caption)
        for step, shown in zip(at, images, strict=True)
    ]
    milliseconds = [_FIRST, *[_BETWEEN] * (len(frames) - 2), _LAST]
    arrays = np.stack([shown.numpy() for shown in images], axis=1)
    return Film(frames, milliseconds, {"images": arrays, "steps": np.array(at)})


def save_film(film: Film, out: Path) -> list[Path]:
    """Write a film as a GIF that begins again at its end and, beside it as .npz, its arrays; returns both paths."""
    beside = save_arrays(film.arrays, out)
    buffer = BytesIO()
    first, *others = film.frames
    times = list(film.milliseconds)
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=times, loop=0)
    write_atomically(out, buffer.getvalue())
    return [out, beside]
