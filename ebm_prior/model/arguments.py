"""Checks of callers' arguments before any work; each error says what was expected, what was found, and what to do."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ebm_prior.compute.isolation import require_numbers
from ebm_prior.errors import ConfigurationError, RegimeError, described
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.checked_images import unfit
from ebm_prior.model.latents import batch_of


def require_backbone(backbone: object) -> None:
    """Raise ConfigurationError unless this is a Backbone; a name, a class or another network is refused with advice."""
    if isinstance(backbone, Backbone):
        return
    todo = "load one with load_backbone(NAME, FILE)"
    if isinstance(backbone, str):
        todo = f"load it first: load_backbone(None, {backbone[:80]!r}), or load_backbone(NAME, FILE)"
    elif isinstance(backbone, type) and issubclass(backbone, Backbone):
        todo = f"load trained weights with load_backbone; {backbone.__name__}(…) makes an untrained instance"
    elif isinstance(backbone, nn.Module):
        todo = "put the network behind a subclass of ebm_prior.Backbone (README: Adapter for your own architecture)"
    elif isinstance(getattr(backbone, "backbone", None), Backbone):
        todo = "pass its .backbone"
    raise ConfigurationError(f"expected a backbone, found {described(backbone)}: {todo}")


def require_count(name: str, value: object, *, least: int = 0) -> int:
    """The argument called `name` as an int. Raises ConfigurationError unless it is whole and `least` or more."""
    try:
        count = least - 1 if isinstance(value, (bool, Tensor)) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = least - 1
    if count < least:
        shown = value if isinstance(value, (int, float)) else described(value)
        raise ConfigurationError(f"{name}: expected a whole number of {least} or more, found {shown}")
    return count


def usable_device(device: torch.device | str) -> torch.device:
    """The torch device called `device`. Raises ConfigurationError where this machine cannot use it."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"device: expected one that torch can use here, as cpu or cuda:0, found {device!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    require_numbers(found)
    return found


def require_images(images: object, shape: Sequence[int]) -> None:
    """Raise ConfigurationError unless `images` is a tensor (B, *shape) of finite floats in [0, 1].

    shape: (C, H, W) of the backbone's images.
    """
    expected = f"images: expected a float tensor {batch_of(shape)} in [0, 1], found {described(images)}"
    if not isinstance(images, Tensor):
        advice = "torch.from_numpy makes a tensor of it" if isinstance(images, np.ndarray) else "stack them in a tensor"
        raise ConfigurationError(f"{expected}: {advice}")
    if tuple(images.shape[1:]) != tuple(shape) or images.dim() != 4:
        advice = "images are never resized or recoloured silently: convert them beforehand"
        if tuple(images.shape) == tuple(shape):
            advice = "the batch axis is missing, images[None] adds it"
        elif images.dim() == 4 and (images.shape[3], *images.shape[1:3]) == tuple(shape):
            advice = "channels come first, images.permute(0, 3, 1, 2) moves them"
        raise ConfigurationError(f"{expected}: {advice}")
    if not images.is_floating_point():
        raise ConfigurationError(f"{expected}: (images.float() / 255) scales 8-bit pixels")
    bad = unfit(images)
    if bad is not None:
        advice = "rescale them to [0, 1]"
        if not bad.finite:
            advice = "repair or remove the image"
        elif bad.low >= 0:
            advice = "images / 255 scales those of 8 bits"
        elif bad.low >= -1 and bad.high <= 1:
            advice = "(images + 1) / 2 scales those in [-1, 1]"
        raise ConfigurationError(f"{expected} with {bad.values} in image {bad.number}: {advice}")


def require_calibrated(regime: str, what: str) -> None:
    """Raise RegimeError, which names `what`, for the `regime` of a refiner."""
    if regime != "calibrated":
        raise RegimeError(
            f"{what} needs a calibrated prior, found a refiner: its f is shaped by short-run dynamics and is no "
            "log density ratio. Fit with --objective nce, or use "
            "this prior for samples only"
        )
