"""Atomic writing of files, by a temporary file that is renamed, so that no earlier file is lost; JSON without NaN."""

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
ABANDONED = 3600.0  # seconds after which another machine's temporary file counts as abandoned
_ADVICE: dict[str, str] = {}  # folder -> advice for errors in writing there; the default is to choose another place


def user_cache() -> Path:
    """The user's cache directory for ebm-prior: in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ebm-prior"


def write_atomically(path: str | Path, data: bytes | memoryview) -> None:
    """Write `data` to a temporary file beside `path`, flush it to disk, and rename it to `path`.

    Raises OutputError where the place cannot be written or the disk is full; an earlier file is then unchanged.
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
    """Prefix and suffix of a temporary file name, which tell `remove_leftovers` the process and the file written."""
    owner = this_process()
    short = os.fsencode(name)[:100].decode(errors="ignore")  # a name has at most 255 bytes
    return f".{short}.{owner.machine}-{owner.pid}-{owner.start}-", ".part"


def remove_leftovers(folder: Path, *, of: str | None = None) -> None:
    """Remove temporary files that killed processes left behind: those of the file called `of`, or all.

    Files of living processes stay, and so do files that another machine has written within the last hour. Files that
    cannot be removed are left without an error.
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
    """Set the advice in error messages about writing into `folder`; None restores the default advice."""
    key = os.path.realpath(folder)
    if advice is None:
        _ADVICE.pop(key, None)
    else:
        _ADVICE[key] = advice


def advice_for(path: Path, error: OSError) -> str:
    """The advice, as part of an error message, for a `path` that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    special = _ADVICE.get(os.path.realpath(path.parent))
    if special is not None:
        return f"{'free some space' if full else 'make the place writable'} and {special}"
    return "free some space or choose another --out" if full else "choose another --out"


def without_nan(value: Any) -> Any:
    """Plain values with NaN and infinities replaced by None, since JSON has neither."""
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
