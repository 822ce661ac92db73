"""What is written of a training that has diverged for good, and what is said of it: no file that is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ebm_prior.errors import CheckpointError, ConfigurationError, DivergenceError, OutputError


def diverged(error: DivergenceError, write: Callable[[], object], path: Path) -> DivergenceError:
    """The error to raise in place of `error`, after `write` has tried to write what was kept to `path`.

    Where it cannot be written, or no command could load it, that is said, and nothing is written.
    """
    try:
        write()
    except (CheckpointError, ConfigurationError, OutputError) as reason:
        earlier = f" What lies at {path} is of an earlier run." if path.exists() else ""
        return DivergenceError(f"{error} It was not written: {reason}.{earlier}")
    return DivergenceError(f"{error} It was written to {path}", kept=error.kept)
