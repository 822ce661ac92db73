"""What a training needs from the outside: images, a recorder, callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

Callback = Callable[[Mapping[str, Any]], None]
"""Called with what there is to show; in training loops at least "iteration" and "iterations"."""


class Progress(Protocol):
    """Somebody who is told how far a piece of work has come: the command line's bar, or `SILENT`."""

    def step(self, shown: Mapping[str, Any]) -> None:
        """An iteration is done: "iteration", "iterations", and the numbers to show."""

    def stage(self, name: str) -> None:
        """The next part of the work begins; `name` says what it does."""

    def advance(self, count: int) -> None:
        """`count` more items are done."""

    def remark(self, text: str) -> None:
        """A sentence that the user should read."""


class Silent:
    """A `Progress` that nobody watches. Who watches a part of it overrides that part."""

    def step(self, shown: Mapping[str, Any]) -> None: ...

    def stage(self, name: str) -> None: ...

    def advance(self, count: int) -> None: ...

    def remark(self, text: str) -> None: ...


SILENT: Progress = Silent()


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
