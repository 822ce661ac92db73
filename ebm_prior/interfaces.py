"""Interfaces of long work to the outside: images, a recorder, and somebody who is told how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

Callback = Callable[[Mapping[str, Any]], None]
"""Called with names and values to show; in training loops at least "iteration" and "iterations"."""


class Progress(Protocol):
    """Somebody who is told how far a piece of work has come: the command line's bar, or `SILENT`."""

    def begin(self, name: str, total: int) -> None:
        """Another piece of work begins, with a count of its own: of `total` steps, stages or items, 0 where unknown."""

    def step(self, shown: Mapping[str, Any]) -> None:
        """An iteration is done: "iteration", "iterations", and the numbers to show."""

    def stage(self, name: str) -> None:
        """The next part of the work begins; `name` says what it does."""

    def advance(self, count: int) -> None:
        """`count` more items are done."""

    def remark(self, text: str) -> None:
        """A sentence that the user should read."""


class Silent:
    """A `Progress` that nobody watches, and a base for one that is told of some things alone."""

    def begin(self, name: str, total: int) -> None: ...

    def step(self, shown: Mapping[str, Any]) -> None: ...

    def stage(self, name: str) -> None: ...

    def advance(self, count: int) -> None: ...

    def remark(self, text: str) -> None: ...


SILENT: Progress = Silent()


class Images(Protocol):
    """A random-access source of images (`ebm_prior.data.images.ImageSource` is one)."""

    name: str

    def __len__(self) -> int:
        """Number of images."""

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Images (B, C, H, W), float32 in [0, 1]."""


class Recorder(Protocol):
    """Keeper of the state and metrics of a training loop (`ebm_prior.runs.folder.Run` is one)."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append metrics, with the key "iteration"."""

    def note(self, shown: Mapping[str, Any]) -> None:
        """Append numbers of a step, with the key "iteration", for somebody who watches.

        When that is done depends on the clock, and two equal runs note different iterations; `log` has what they share.
        """

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace the resume state: tensors and plain values, with the key "iteration"."""

    def load_state(self) -> dict[str, Any] | None:
        """The resume state, or None at the start."""
