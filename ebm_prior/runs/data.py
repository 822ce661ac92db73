"""The record of a run's images in its folder: their place, and the fingerprint by which they are recognised.

It is a file of its own, data.json, beside the prior, because it depends on where this machine keeps its data, and the
bytes of a prior must not depend on that.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebm_prior.data.reopen import origin_record, recorded_origin, reopen
from ebm_prior.data.source import ImageSource, Origin, Split
from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.storage.atomic import write_atomically
from ebm_prior.storage.checkpoint import bundled, prior_record
from ebm_prior.storage.weights import fingerprint

FILE = "data.json"


@dataclass(frozen=True)
class Remembered:
    """The images of the run in `folder`: their origin, their fingerprint, and their place as seen from the folder."""

    folder: Path
    origin: Origin
    fingerprint: str
    relative: str | None

    def open(
        self, split: Split, *, data_root: str | os.PathLike[str] | None = None, download: bool = False
    ) -> ImageSource:
        """Open a split of the recorded images, in their recorded place or elsewhere (see `reopen`).

        data_root: the folder in which a named data set is looked for first. Raises DataError where no images with the
        recorded fingerprint are found.
        """
        return reopen(
            self.origin,
            self.fingerprint,
            beside=self.folder,
            relative=self.relative,
            data_root=data_root,
            split=split,
            download=download,
        )

    @property
    def roots(self) -> list[str]:
        """Folders in which other named data sets may lie, too: those of the images of the run, if they have a name."""
        if self.origin.root is None:
            return []
        moved = [] if self.relative is None else [os.path.normpath(Path(os.path.realpath(self.folder)) / self.relative)]
        return list(dict.fromkeys([self.origin.root, *moved]))


def remember(folder: Path, images: ImageSource, digest: str) -> None:
    """Write the origin of a run's images into its folder. Images in memory have no origin, so no file is written.

    digest: the fingerprint of `images`. Raises OutputError.
    """
    if images.origin is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    place = images.origin.spec if images.origin.root is None else images.origin.root
    try:
        relative = os.path.relpath(os.path.realpath(place), os.path.realpath(folder))
    except ValueError:  # another drive, on Windows
        relative = None
    record = {"images": digest, "origin": origin_record(images.origin), "relative": relative}
    write_atomically(folder / FILE, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def remembered(folder: Path) -> Remembered | None:
    """The record that `remember` wrote into a folder, or None. Raises CheckpointError for a damaged file."""
    path = folder / FILE
    if not os.path.isfile(path):
        return None
    try:
        stored = dict(json.loads(path.read_text()))
        digest, relative = stored["images"], stored.get("relative")
        if not isinstance(digest, str) or not isinstance(relative, str | None):
            raise TypeError(f"images {digest!r}, relative {relative!r}")
        return Remembered(folder, recorded_origin(stored["origin"]), digest, relative)
    except (OSError, ValueError, KeyError, TypeError, ConfigurationError) as error:
        raise CheckpointError(
            f"{path} does not say where the images of the run are ({error}): pass --data with them, and remove the file"
        ) from error


def of_prior(prior: Path) -> Remembered | None:
    """The images that a prior file was trained on, if the record in its folder has their fingerprint; else None."""
    found = remembered(prior.parent)
    data = prior_record(prior)["record"].get("data") if found else None
    return found if found and isinstance(data, dict) and data.get("fingerprint") == found.fingerprint else None


def of_backbone(checkpoint: str, backbone: Backbone) -> Remembered | None:
    """The images on which a backbone was trained, or on which a prior for it was fitted under ./runs.

    The images of the backbone's own run if it lies in the folder of that run, else those of the latest fit.
    """
    path = Path(checkpoint)
    if checkpoint not in bundled() and path.name == "backbone.safetensors" and (found := remembered(path.parent)):
        return found
    weights = fingerprint(backbone)
    fits = [file.parent for file in Path("runs").glob(f"*/{FILE}") if _inputs(file.parent).get("backbone") == weights]
    return remembered(max(fits, key=lambda fit: ((fit / FILE).stat().st_mtime_ns, fit))) if fits else None


def with_kept_name(folder: Path, images: ImageSource, digest: str) -> ImageSource:
    """The images under the name that the run has recorded, if the run began with the same images in another place.

    So a run that is resumed after its images were moved gives a prior with the same bytes as an uninterrupted run.
    digest: the fingerprint of `images`.
    """
    recorded = _inputs(folder)
    if recorded.get("images") == digest and isinstance(recorded.get("data"), str):
        images = copy.copy(images)
        images.name = recorded["data"]
    return images


def _inputs(folder: Path) -> dict[str, Any]:
    """The inputs in a run's config.json; none where it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text())["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
