"""Files of our own: written beside, flushed and renamed, so that nothing written before is lost; JSON without NaN."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebm_prior.errors import OutputError


def user_cache() -> Path:
    """The user's cache directory for ebm-prior: in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ebm-prior"


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, flush it to disk, and rename it to `path`.

    Raises OutputError where the place cannot be written or the disk is full; what stood at `path` is then untouched.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # temporary files are private; results are not
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another --out "
            "(a file that was there before is unchanged)"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def without_nan(value: Any) -> Any:
    """Plain values for JSON, which knows no NaN and no infinity: they become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    return [without_nan(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def with_nan(value: Any) -> Any:
    """The inverse of `without_nan` for results in which only numbers that are not finite became None."""
    if isinstance(value, dict):
        return {key: with_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [with_nan(entry) for entry in value]
    return math.nan if value is None else value


def append_line(path: Path, line: str) -> None:
    """Append one line of text. Raises OutputError where that fails."""
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; free some space and use --resume"
        ) from error
