"""Features of a user's own for FD and KID: a function named on the command line as MODULE:FUNCTION."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ebm_prior.errors import ConfigurationError, DataError


class OwnFeatures:
    """A user's function from images (B, C, H, W) in [0, 1] to features (B, D), under the name it was given."""

    def __init__(self, function: Callable[[Tensor], Any], name: str) -> None:
        self._function, self.name = function, name

    @property
    def distance_name(self) -> str:
        """The name under which a Fréchet distance on these features is printed: it is never FID."""
        return f"FD({self.name})"

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, D), float32; `images` are float32 for the function.

        Raises DataError where the function fails, or returns something else.
        """
        try:
            found = torch.as_tensor(self._function(images.float())).detach()
        except Exception as error:  # somebody else's code can raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"{self.name} failed on images {tuple(images.shape)} ({reason})") from error
        if found.dim() != 2 or len(found) != len(images) or found.shape[1] < 1 or found.is_complex():
            raise DataError(
                f"{self.name}: expected features (B, D) with B = {len(images)}, found {found.dtype} of shape "
                f"{tuple(found.shape)}"
            )
        return found.float()


def own_features(spec: str, device: torch.device) -> OwnFeatures:
    """The features that MODULE:FUNCTION names; the module is looked for in the current folder, too.

    An nn.Module is put on `device`, in eval mode. Raises ConfigurationError where there is no such function.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ConfigurationError(
            f"--features {spec}: expected MODULE:FUNCTION, a function from images (B, C, H, W) in [0, 1] to (B, D)"
        )
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        function: Any = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:  # a foreign module can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigurationError(
            f"--features {spec}: cannot be imported ({reason}); expected MODULE:FUNCTION, with MODULE installed or in "
            "the current folder"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(function) or isinstance(function, type):
        raise ConfigurationError(f"--features {spec}: expected a function, found {type(function).__name__} {name}")
    return OwnFeatures(function.eval().to(device) if isinstance(function, nn.Module) else function, spec)
