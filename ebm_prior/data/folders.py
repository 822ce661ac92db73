"""Folders of pictures: which files are read, each real file once, and which classes and splits they make."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_prior.data.image_files import open_regular, reading, special_kind
from ebm_prior.data.pictures import decode_as, survey
from ebm_prior.data.source import ImageSource, Mode, Shape, Split
from ebm_prior.errors import DataError, few

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}


@dataclass(frozen=True, eq=False)
class Pictures:
    """Image files, decoded when they are read."""

    paths: list[Path]
    shape: Shape
    mode: Mode | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: Tensor) -> Tensor:
        """The pictures, decoded and scaled."""
        images = torch.empty(len(rows), *self.shape)
        for index, path in enumerate(self.paths[row] for row in rows.tolist()):
            with reading(path, "an image"), open_regular(path) as file:
                images[index] = decode_as(file, str(path), self.shape, self.mode)
        return images

    def content(self, rows: Tensor) -> Iterator[bytes]:
        """A digest of each file as it is."""
        for path in (self.paths[row] for row in rows.tolist()):
            with reading(path, "an image"), open_regular(path) as file:
                yield hashlib.sha256(file.read()).digest()


def open_folder(root: Path, split: Split, image_shape: Shape | None, mode: Mode | None) -> ImageSource:
    """The pictures below `root` or its folder for `split`; labelled by subfolder if all of them lie in subfolders."""
    folder, beside = split_folder(root, split)
    found = find_pictures(folder)
    names = [str(path) for path in found.paths]
    if not names:
        raise DataError(
            f"{folder}: no images in this folder (looked for {', '.join(sorted(_SUFFIXES))})"
            + f"; left out: {few(found.left_out, separator='; ')}" * bool(found.left_out)
        )
    shape, remarks = survey(str(folder), names, lambda index: open_regular(found.paths[index]), image_shape, mode)
    train = root / "train"
    training = find_pictures(train) if folder not in (root, train) and train.is_dir() else None
    labels = None
    if classes := picture_classes(folder, found.paths):
        # A class must have the same number in every split, also where a split lacks one.
        known = classes if training is None else picture_classes(train, training.paths) or classes
        if strange := sorted(set(classes) - set(known)):
            raise DataError(
                f"{folder}: holds classes that {train} lacks: {few(strange)}. Add images of them there, or take "
                "these away"
            )
        number = {name: index for index, name in enumerate(sorted(set(known)))}
        labels = torch.tensor([number[name] for name in classes])
    left_out = [*found.left_out, *beside]
    remarks = [f"left out: {few(left_out, separator='; ')}"] * bool(left_out) + remarks
    if training is not None and (shared := len(training.files & found.files)):
        remarks.append(f"not held out: {shared} of {len(names)} images are the same files as in {train}")
    return ImageSource(str(folder), Pictures(found.paths, shape, mode), labels, remarks=remarks)


class Found(NamedTuple):
    """The pictures of a folder in order, a description of the entries left out, and the identities of the files."""

    paths: list[Path]
    left_out: list[str]
    files: Set[tuple[object, ...]]


def find_pictures(folder: Path) -> Found:
    """The image files below `folder`, sorted, each real file once.

    Links are followed. A file is identified by device and inode, so that hard links, and disks mounted at two places,
    give each file once; an image that counts twice could be trained on and held out at the same time. Of several names
    a real path is preferred to a link, then the first in order. Each folder is entered once, so circular links end.
    Names that start with a dot are skipped (thumbnails, notebook checkpoints, files of macOS). Raises DataError for a
    folder that cannot be listed.
    """
    walk = _Walk(folder)
    walk.run()
    paths = sorted(walk.kept(), key=lambda path: path.relative_to(folder).parts)
    return Found(paths, walk.left_out(), walk.files.keys())


class _Walk:
    """The state of `find_pictures`: real folders first, then those that links lead to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[tuple[object, ...], tuple[bool, tuple[str, ...], Path]] = {}  # rank and path of each real file
        self.entered: set[tuple[object, ...]] = set()
        self.linked: set[Path] = set()  # links to folders, to be entered later
        self.counts: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.special: Counter[str] = Counter()

    def run(self) -> None:
        """Enter every folder once."""
        self._enter(self.folder, linked=False)
        while self.linked:
            path = min(self.linked)
            self.linked.remove(path)
            if not self._enter(path, linked=True):
                self.counts["links to folders that are read already"] += 1

    def kept(self) -> list[Path]:
        """One path per real file."""
        return [path for _, _, path in self.files.values()]

    def left_out(self) -> list[str]:
        """What was not read, with its numbers."""
        said = [f"{count} {what}" for what, count in sorted(self.counts.items()) if count]
        if self.special:
            said.append(f"{self.special.total()} that are no regular files ({few(sorted(self.special))})")
        if self.endings:
            common = few(ending or "without one" for ending, _ in self.endings.most_common(3))
            said.append(f"{self.endings.total()} files of other endings ({common})")
        return said

    def _enter(self, start: Path, *, linked: bool) -> bool:
        """Take what lies below `start` up to the next links; False if it was entered before."""
        waiting = [start]
        while waiting:
            place = waiting.pop()
            key = _identity(place, place.stat())
            if key in self.entered:
                if place == start:
                    return False
                continue  # reached by another mount
            self.entered.add(key)
            try:
                names = sorted(os.listdir(place))
            except OSError as error:
                raise DataError(
                    f"{place}: this folder cannot be listed ({error.strerror}); make it readable, or take it away"
                ) from error
            waiting += [path for name in names if self._take(path := place / name, linked)]
        return True

    def _take(self, path: Path, linked: bool) -> bool:
        """Keep or count one entry; True for a real folder, which is entered next."""
        picture = path.suffix.lower() in _SUFFIXES
        is_link = os.path.islink(path)  # unlike Path's own, it raises nothing
        try:
            status = path.stat()
        except OSError as error:
            if not is_link:
                raise DataError(
                    f"{path}: cannot be looked at ({error.strerror}); make its folder readable, or take it away"
                ) from error
            self.counts["links that lead nowhere"] += not path.name.startswith(".")
            return False
        is_folder = stat.S_ISDIR(status.st_mode)
        if path.name.startswith("."):
            self.counts["hidden (names that start with a dot)"] += picture or is_folder
        elif is_folder and is_link:
            self.linked.add(path)
        elif is_folder:
            return True
        elif not picture:
            self.endings[path.suffix.lower()] += 1
        elif kind := special_kind(status.st_mode):
            self.special[kind] += 1
        else:
            key = _identity(path, status)
            rank = (linked or is_link, path.relative_to(self.folder).parts, path)
            if key in self.files:
                self.counts["further names of the same files (links)"] += 1
            self.files[key] = min(rank, self.files.get(key, rank))
        return False


def _identity(path: Path, status: os.stat_result) -> tuple[object, ...]:
    """The identity of a file: device and inode, or the resolved path on network disks without inodes."""
    return (status.st_dev, status.st_ino) if status.st_ino else (os.path.realpath(path),)


def picture_classes(folder: Path, paths: Sequence[Path]) -> list[str] | None:
    """For each file the subfolder of `folder` that holds it; None if any file lies in no subfolder."""
    parts = [path.relative_to(folder).parts for path in paths]
    return [part[0] for part in parts] if all(len(part) > 1 for part in parts) else None


def split_folder(folder: Path, split: Split) -> tuple[Path, list[str]]:
    """The subfolder that holds `split`, or `folder` itself if it has no subfolders named after splits.

    The second result lists, with counts, the entries beside the splits that belong to none of them.
    """
    names = [name for names in _SPLIT_FOLDERS.values() for name in names]
    present = [name for name in names if (folder / name).is_dir()]
    if not present:
        return folder, []
    for name in _SPLIT_FOLDERS[split]:
        if name in present:
            try:
                entries = os.listdir(folder)
            except OSError:  # one may enter it, but not list it
                entries = []
            beside = sorted(n for n in entries if n not in names and not n.startswith("."))
            return folder / name, [f"{len(beside)} beside {name}/ ({few(beside, most=3)})"] * bool(beside)
    raise DataError(
        f"{folder}: has {few(present)} but no folder for the {split} split"
        f" ({' or '.join(_SPLIT_FOLDERS[split])}); add it, or pass the folder of images itself"
    )
