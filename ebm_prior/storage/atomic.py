"""Files of our own: written beside, flushed and renamed, so that nothing written before is lost; JSON without NaN."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebm_prior.errors import OutputError
from ebm_prior.storage.owner import Owner, this_process

PART = re.compile(
    r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,10})-(?P<start>\d{1,20})-[a-z0-9_]{8}\.part", re.DOTALL
)
ABANDONED = 3600.0  # seconds: no write takes so long, also not one on another machine
_ADVICE: dict[str, str] = {}  # folder -> what to do where it cannot be written; else choose another place


def user_cache() -> Path:
    """The user's cache directory for ebm-prior: in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ebm-prior"


def write_atomically(path: str | Path, data: bytes | memoryview) -> None:
    """Write `data` to a temporary file beside `path`, flush it to disk, and rename it to `path`.

    Raises OutputError where the place cannot be written or the disk is full; what stood at `path` is then untouched.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix, suffix = temporary_affixes(path.name)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, suffix=suffix, delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # temporary files are private; results are not
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; {advice_for(path, error)} "
            "(a file that was there before is unchanged)"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def temporary_affixes(name: str) -> tuple[str, str]:
    """Prefix and suffix of a temporary name, which says which process writes what: `remove_leftovers` knows it."""
    owner = this_process()
    short = os.fsencode(name)[:100].decode(errors="ignore")  # a name has at most 255 bytes
    return f".{short}.{owner.machine}-{owner.pid}-{owner.start}-", ".part"


def remove_leftovers(folder: Path, *, of: str | None = None) -> None:
    """Remove temporary files (of the file called `of`, or all) of processes that were killed while they wrote.

    What a living process writes, and what another machine has written within the last hour, stays. Nothing is raised:
    what cannot be removed stays, too.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = PART.fullmatch(entry.name)
            if found is None or (of is not None and found["name"] != os.fsencode(of)[:100].decode(errors="ignore")):
                continue
            owner = Owner(found["machine"], int(found["pid"]), int(found["start"]))
            with contextlib.suppress(OSError):
                if not (owner.alive if owner.local else time.time() - entry.stat().st_mtime < ABANDONED):
                    remove = shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.unlink
                    remove(entry.path)


def advise(folder: Path, advice: str | None) -> None:
    """Say what to do where a file in `folder` cannot be written; None: what holds for any other folder."""
    key = os.path.realpath(folder)
    if advice is None:
        _ADVICE.pop(key, None)
    else:
        _ADVICE[key] = advice


def advice_for(path: Path, error: OSError) -> str:
    """What to do where `path` cannot be written, as part of a message."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    special = _ADVICE.get(os.path.realpath(path.parent))
    if special is not None:
        return f"{'free some space' if full else 'make the place writable'} and {special}"
    return "free some space or choose another --out" if full else "choose another --out"


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
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; free some space and use --resume"
        ) from error
