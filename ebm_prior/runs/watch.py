"""Options for watching a training: more pictures, and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ebm_prior.errors import ConfigurationError
from ebm_prior.runs.folder import BOARD, Run


@dataclass(frozen=True)
class Watch:
    """What a user wants to watch during a training. No result depends on it."""

    preview: bool = False  # a picture at each evaluation of a fit, not at every fifth
    tensorboard: bool = False  # scalars and pictures for TensorBoard, in the run's folder

    def require(self) -> None:
        """Raise ConfigurationError, before any work, where a package that this needs is not installed."""
        if self.tensorboard:
            _writer_type()

    def board(self, run: Run) -> Board | None:
        """The TensorBoard writer of this run, or None if it is not wanted."""
        return Board(run) if self.tensorboard else None


UNWATCHED = Watch()


class Board:
    """A Recorder that stores everything in its run, and also writes scalars and pictures for TensorBoard.

    Scalars of evaluations have their own names, those of single steps begin with "step/". After a resume TensorBoard
    leaves out what an earlier process wrote beyond the state.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._folder = run, run.directory / BOARD
        self._writer: Any = None

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append metrics, with the key "iteration"."""
        self._run.log(metrics)
        self._scalars(metrics, "")

    def note(self, shown: Mapping[str, Any]) -> None:
        """Append numbers of a step, with the key "iteration"."""
        self._run.note(shown)
        self._scalars(shown, "step/")

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace the resume state."""
        self._run.save_state(state)

    def load_state(self) -> dict[str, Any] | None:
        """The resume state, or None at the start. The board goes on from there."""
        state = self._run.load_state()
        purge = state["iteration"] + 1 if state else None
        self._writer = _writer_type()(str(self._folder), purge_step=purge)
        return state

    def picture(self, path: Path, iteration: int) -> None:
        """Show the picture at `path`."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image("samples", pixels, iteration, dataformats="HWC")
        self._writer.flush()

    def _scalars(self, numbers: Mapping[str, Any], prefix: str) -> None:
        for name, value in numbers.items():
            if isinstance(value, (int, float)) and name != "iteration":
                self._writer.add_scalar(prefix + name, value, numbers["iteration"])
            elif isinstance(value, list):  # one number per latent group, the top one first
                for index, each in enumerate(value):
                    self._writer.add_scalar(f"{prefix}{name}/{index}", each, numbers["iteration"])
        self._writer.flush()


def _writer_type() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # imported here, because it is optional and slow to import
    except ImportError as error:
        raise ConfigurationError("--tensorboard needs tensorboard; pip install tensorboard") from error
    return SummaryWriter
