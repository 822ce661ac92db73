"""What both training stages need of the rest of the world, and the order in which they see the images.

Randomness of iteration t comes from (seed, t) alone, so a resume state holds no generators, and a resumed run repeats
the very numbers of an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ebm_prior.errors import ConfigurationError
from ebm_prior.randomness import derived_generator

Callback = Callable[[Mapping[str, Any]], None]
"""Called with what there is to show; in training loops at least "iteration" and "iterations"."""


class Images(Protocol):
    """A random-access source of images (`ebm_prior.data.ImageSource` is one)."""

    name: str

    def __len__(self) -> int:
        """Number of images."""

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Images (B, C, H, W), float32 in [0, 1]."""


class Recorder(Protocol):
    """Where a training loop keeps its state and metrics (`ebm_prior.runs.Run` is one)."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append metrics, with the key "iteration"."""

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace the resume state: tensors and plain values, with the key "iteration"."""

    def load_state(self) -> dict[str, Any] | None:
        """The resume state, or None at the start."""


def require_positive(config: Any, *names: str) -> None:
    """Raise ConfigurationError where one of these fields is not a positive finite number."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigurationError(f"{name} must be positive, found {getattr(config, name)}")


def require_seed(config: Any) -> None:
    """Raise ConfigurationError where the seed of a configuration is one that `derived_seed` does not take."""
    if config.seed < 0:
        raise ConfigurationError(f"seed must not be negative, found {config.seed}")


def require_choices(config: Any) -> None:
    """Raise ConfigurationError where a Literal field of a configuration dataclass has another value."""
    hints = get_type_hints(type(config))
    for name in (entry.name for entry in fields(config)):
        value, allowed = getattr(config, name), get_args(hints[name])
        if get_origin(hints[name]) is Literal and value not in allowed:
            raise ConfigurationError(f"{name} must be {' or '.join(allowed)}, found {value!r}")


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the parameters; a young one forgets faster, so as not to remember its start."""
    decay = min(decay, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def batch_indices(n: int, batch_size: int, iteration: int, seed: int) -> Tensor:
    """The images of iteration t: entries [t·B, (t+1)·B) of an endless row of shuffled epochs, (batch_size,) int64."""
    first, last = iteration * batch_size, (iteration + 1) * batch_size
    epochs = range(first // n, -(-last // n))
    order = torch.cat([torch.randperm(n, generator=derived_generator(seed, 0xE90C4, epoch)) for epoch in epochs])
    return order[first - epochs[0] * n : last - epochs[0] * n]
