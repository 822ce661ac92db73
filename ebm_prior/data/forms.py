"""Images in any form that Python users have, converted to a source of images for a backbone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_prior.data.arrays import from_array, shape_problem
from ebm_prior.data.datasets import from_dataset
from ebm_prior.data.source import Shape
from ebm_prior.errors import DataError, described
from ebm_prior.interfaces import Images
from ebm_prior.model.checked_images import checked

FORMS = "a tensor or array (N, C, H, W), a torch or Hugging Face data set, a list of pictures, or open_images(…)"


def as_images(images: Any, image_shape: Shape, *, name: str = "images") -> Images:
    """The images that a caller passes to `fit` or `evaluate`, in any form, as checked images of one shape.

    Args:
        images: a Tensor or NumPy array, uint8 or float in [0, 1], (N, C, H, W), (N, H, W, C) or (N, H, W); a map-style
            data set or a list, with items read when they are needed (`from_dataset`); an `ImageSource`, or any object
            with `name`, `len` and `batch`.
        image_shape: (C, H, W) that the images must have: the backbone's.
        name: the name in messages and records, for images without a name of their own.

    Returns:
        The images, which are checked whenever they are read: finite, in [0, 1], of this shape.

    Raises:
        DataError: for anything else, and for images of another shape.

        source = as_images(torch.rand(100, 1, 28, 28), (1, 28, 28))
    """
    if isinstance(images, (Tensor, np.ndarray)):
        array = _as_array(images, name)
        if array.shape == tuple(image_shape):
            raise DataError(f"{name}: expected many images, found {described(images)}, which is one: images[None]")
        return from_array(array, name=name, image_shape=image_shape)
    if hasattr(images, "batch") and isinstance(getattr(images, "name", None), str):
        found = checked(images)
        shape = getattr(found, "shape", None) or tuple(found.batch([0]).shape[1:])
        if tuple(shape) != tuple(image_shape):
            raise DataError(f"{found.name}: {shape_problem(tuple(shape), image_shape)}")
        return found
    many = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    if not many or isinstance(images, (str, bytes, type, Mapping)):
        raise DataError(f"{name}: expected {FORMS}; found {described(images)}{_advice(images)}")
    if not len(images):
        raise DataError(f"{name}: expected {FORMS}; found an empty {type(images).__name__}")
    return from_dataset(images, name=name, image_shape=image_shape, lazy=True)


def _as_array(images: Tensor | np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """The NumPy array of a tensor on any device; half precision becomes float32."""
    if isinstance(images, np.ndarray):
        return images
    try:
        plain = images.detach().cpu()
        return np.asarray(plain.float() if plain.dtype in (torch.bfloat16, torch.float16) else plain)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, quantised, on the device meta
        raise DataError(f"{name}: expected {FORMS}; found {described(images)} that has no plain values") from error


def _advice(images: object) -> str:
    if isinstance(images, type):
        return ": make an instance of it"
    if isinstance(images, (str, os.PathLike)):
        return f": open_images({str(images)[:80]!r}) reads a folder, a file, or a known data set"
    if isinstance(images, Mapping):
        return f" with the keys {', '.join(map(repr, list(images)[:5]))}: pass one of its values"
    if hasattr(images, "dataset"):
        return ": pass its .dataset, for batches are drawn anew in every step"
    if hasattr(images, "getbands"):  # a Pillow image
        return ", a single picture: pass a list of many"
    if isinstance(images, Iterable):
        return ", which can be read once, in order: list(…) keeps its items, if memory holds them"
    return ""
