"""Interfaces of long-running work: the images that it reads, the recorder of its state, and the display of progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

Callback = Callable[[Mapping[str, Any]], None]
"""Called with names and values to show; in training loops at least "iteration" and "iterations"."""


class Progress(Protocol):
    """A display of the progress of a piece of work: the bar of the command line, or `SILENT`."""

    def begin(self, name: str, total: int) -> None:
        """A new piece of work called `name` begins, counted from 0 to `total` steps, stages or items (0: unknown)."""

    def step(self, shown: Mapping[str, Any]) -> None:
        """An iteration is done. `shown`: "iteration", "iterations", and the numbers to display."""

    def stage(self, name: str) -> None:
        """The next part of the work begins; `name` says what it does."""

    def advance(self, count: int) -> None:
        """`count` more items are done."""

    def remark(self, text: str) -> None:
        """A sentence that the user should read."""


class Silent:
    """A `Progress` that shows nothing; also a base class for displays that need only some of the methods."""

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
        """Append numbers of a step, with the key "iteration", for a user who watches the training.

        Steps are noted by the clock, so two equal runs note different iterations. What must be equal goes to `log`.
        """

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace the resume state: tensors and plain values, with the key "iteration"."""

    def load_state(self) -> dict[str, Any] | None:
        """The resume state, or None at the start."""
