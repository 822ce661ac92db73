"""What training needs of the rest of the world, the order in which it sees the images, and how it goes on after a fall.

Randomness of iteration t comes from (seed, t) alone, so a resume state holds no generators, and a resumed run repeats
the very numbers of an uninterrupted one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.parallel import ALONE, Processes
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
    """Exponential moving average of the parameters; a young one forgets faster, so as not to remember its start.

    Buffers are copied.
    """
    decay = min(decay, (1 + step) / (10 + step))
    fused = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    fused(list(average.parameters()), list(network.parameters()), step)
    for held, found in zip(average.buffers(), network.buffers(), strict=True):
        held.copy_(found)


def batch_indices(n: int, batch_size: int, iteration: int, seed: int) -> Tensor:
    """The images of iteration t: entries [t·B, (t+1)·B) of an endless row of shuffled epochs, (batch_size,) int64."""
    first, last = iteration * batch_size, (iteration + 1) * batch_size
    epochs = range(first // n, -(-last // n))
    order = torch.cat([_order(n, seed, epoch) for epoch in epochs])
    return order[first - epochs[0] * n : last - epochs[0] * n]


@lru_cache(maxsize=2)  # the epoch is the same for many iterations
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=derived_generator(seed, 0xE90C4, epoch))


class Training(ABC):
    """A training under way, which can be killed, resumed, and rolled back: whatever changes is in `state`."""

    iteration = 0
    rate = 1.0  # factor on every learning rate; falls by half at a roll-back
    rollbacks = 0

    @property
    @abstractmethod
    def iterations(self) -> int:
        """How many there are to be."""

    @property
    @abstractmethod
    def every(self) -> int:
        """Iterations between evaluations, after which the state is good."""

    @abstractmethod
    def step(self) -> dict[str, Any]:
        """One gradient step, which adds 1 to `iteration`; numbers to show. Raises DivergenceError."""

    @abstractmethod
    def evaluate(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics of the state reached, `shown` among them. Raises DivergenceError."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """A copy of everything that changes: tensors and plain values, with "iteration", "rate", "rollbacks"."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""

    @abstractmethod
    def given_up(self, reason: DivergenceError) -> DivergenceError:
        """What to raise at the second divergence, with advice; what changes is as in the last good state."""

    def finished(self) -> bool:
        """Whether to stop."""
        return self.iteration >= self.iterations

    @abstractmethod
    def evaluated(self) -> None:
        """After the metrics of an evaluation have been recorded."""

    def run(self, recorder: Recorder | None, on_step: Callback | None, processes: Processes = ALONE) -> None:
        """Step until `finished`; state and metrics `every` so often. Goes on from the recorder's last state.

        At a DivergenceError training returns to the last good state at half the rate; the second one is raised, as
        `given_up` has it. `on_step` gets "iterations" beside what a step and an evaluation show.
        """
        saved = processes.of_first(lambda: recorder.load_state() if recorder else None)
        if saved is not None:
            self.restore(saved)
        good = self.state()
        while not self.finished():
            try:
                shown = self.step()
                if self.iteration % self.every == 0 or self.iteration == self.iterations:
                    shown = self.evaluate(shown)
                    good = self.state()
                    if recorder:
                        recorder.log(shown)
                    self.evaluated()  # before the state, which once written is not evaluated again
                    if recorder:
                        recorder.save_state(good)
            except DivergenceError as reason:
                if self.rollbacks:
                    self.restore(good)
                    raise self.given_up(reason) from reason
                self.restore(good | {"rate": self.rate * 0.5, "rollbacks": self.rollbacks + 1})
                good = self.state()
                if recorder:
                    recorder.save_state(good)
                    recorder.log({"iteration": self.iteration, "rolled_back": str(reason), "rate": self.rate})
                continue
            if on_step:
                on_step({"iterations": self.iterations, **shown})
