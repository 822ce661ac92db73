"""Places for results: the next free folder or file, the newest prior, and refusals before work is done."""

from __future__ import annotations

import os
import tempfile
from itertools import count
from pathlib import Path

from ebm_prior.errors import ConfigurationError, OutputError
from ebm_prior.storage.atomic import remove_leftovers, temporary_affixes
from ebm_prior.storage.checkpoint import bundled_priors, prior_record


def run_directory(out: Path | None, command: str, *, resume: bool) -> Path:
    """The folder of a run: `out`, or else the next free runs/COMMAND-NNN. Raises ConfigurationError for a resume
    without `out`.
    """
    if out is not None:
        return out
    if resume:
        raise ConfigurationError("--resume needs --out: pass the folder of the run to continue")
    return next_free(Path("runs"), command)


def newest_prior() -> Path:
    """The prior under ./runs that was written last. Raises ConfigurationError where there is none."""
    priors = [path for path in Path("runs").glob("*/prior.safetensors") if path.is_file()]
    if not priors:
        raise ConfigurationError(
            f"there is no prior in {Path('runs').resolve()} (*/prior.safetensors): say which file it is, or make one "
            "with ebm-prior fit"
        )
    return max(priors, key=lambda path: (path.stat().st_mtime_ns, path))


def beside(prior: Path) -> Path:
    """The folder for results of a prior: the folder of its file, or the current folder for a bundled prior."""
    return Path() if prior in bundled_priors().values() else prior.parent


def next_drawing(prior: Path) -> Path:
    """The next free drawn-NNN.png beside a prior. Raises CheckpointError where there is no prior."""
    prior_record(prior)  # first: for a mistyped name a folder would be made
    return next_free(beside(prior), "drawn", ".png")


def next_free(folder: Path, stem: str, suffix: str = "") -> Path:
    """The first of folder/stem-001, folder/stem-002, … that is not there."""
    return next(path for k in count(1) if not os.path.lexists(path := folder / f"{stem}-{k:03d}{suffix}"))


def require_writable(out: Path) -> None:
    """Make the parent folder of `out`, and refuse a place where nothing can be written, before work is done.

    Raises OutputError.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        prefix, suffix = temporary_affixes("probe")
        with tempfile.NamedTemporaryFile(dir=out if out.is_dir() else out.parent, prefix=prefix, suffix=suffix):
            pass  # tried for real: permission bits do not tell of read-only disks, and mean nothing to root
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}; choose another --out") from error


def require_free(out: Path, overwrite: bool) -> None:
    """Refuse to write a file over another or over a folder, or where nothing can be written, before work is done.

    Raises OutputError.
    """
    require_writable(out)
    remove_leftovers(out.parent, of=out.name)
    if out.is_dir():
        raise OutputError(f"{out} is a folder; expected the name of a file: choose another --out")
    require_absent(out, overwrite)


def require_absent(out: Path, overwrite: bool) -> None:
    """Refuse to replace what lies at `out` unless `overwrite` says so. Raises OutputError."""
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists: pass --overwrite to replace it, or another --out")
