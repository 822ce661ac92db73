"""The result that a training keeps after a second divergence, and the error message that tells where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ebm_prior.errors import CheckpointError, ConfigurationError, DivergenceError, OutputError


def diverged(error: DivergenceError, write: Callable[[], object], path: Path) -> DivergenceError:
    """The error to raise in place of `error`, after `write` has tried to write the kept result to `path`.

    Where it cannot be written, or no command could load it, the message says so and nothing is written.
    """
    try:
        write()
    except (CheckpointError, ConfigurationError, OutputError) as reason:
        earlier = f" The file at {path} is from an earlier run." if path.exists() else ""
        return DivergenceError(f"{error} It was not written: {reason}.{earlier}")
    return DivergenceError(f"{error} It was written to {path}", kept=error.kept)
