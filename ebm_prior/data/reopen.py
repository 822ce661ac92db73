"""Finding recorded images again: where they were, beside what recorded them, or under the data root."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from ebm_prior.data.images import default_data_root, known_data_set, open_images
from ebm_prior.data.source import ImageSource, Mode, Origin, Split
from ebm_prior.errors import ConfigurationError, DataError, MemoryLimitError


def origin_record(origin: Origin) -> dict[str, Any]:
    """An origin as plain values for JSON; `recorded_origin` is the inverse."""
    return asdict(origin) | {"shape": list(origin.shape)}


def recorded_origin(record: Mapping[str, Any]) -> Origin:
    """The origin in a record; what a later version added is left out. Raises ConfigurationError for nonsense."""
    known = {field.name: record.get(field.name) for field in fields(Origin)}
    shape = known["shape"]
    texts = [known[name] for name in ("spec", "given")]
    optional = [known[name] for name in ("root", "array")]
    if (
        not all(isinstance(text, str) and text for text in texts)
        or not all(text is None or isinstance(text, str) for text in optional)
        or known["split"] not in get_args(Split)
        or known["mode"] not in (None, *get_args(Mode))
        or not isinstance(shape, (list, tuple))
        or len(shape) != 3
        or not all(type(side) is int and side > 0 for side in shape)
    ):
        raise ConfigurationError(
            f"expected the record of where images came from (spec, given, split, shape, root, array, mode), found"
            f" {dict(record)}; pass --data with the images"
        )
    return Origin(**(known | {"shape": tuple(shape)}))


def reopen(
    origin: Origin | Mapping[str, Any],
    fingerprint: str | None = None,
    *,
    beside: str | os.PathLike[str] | None = None,
    relative: str | None = None,
    data_root: str | os.PathLike[str] | None = None,
    split: Split | None = None,
    download: bool = False,
) -> ImageSource:
    """Open recorded images again; they must have the recorded `fingerprint`, if there is one.

    A path is looked for in this order: where it was; at `relative`; by its name in the folder `beside`; as it was
    given, relative to `beside` and, if there is a fingerprint to check, to the three folders above it; by its name
    under the data root. A named data set is looked for under `data_root`, the recorded root, `relative`, `beside`, and
    the default root.

    origin: the origin of an `ImageSource`, or its record.  beside: a folder that may have moved together with the
    images, e.g. that of the run.  relative: path from `beside` to the images, or to the root of a named data set.
    split: another split of the same images; the fingerprint is still that of the recorded split.
    Raises DataError with every place that was tried, and the reason why it was not accepted.

        source = open_images("images.npy")
        again = reopen(source.origin, source.fingerprint(), beside="runs/mine")
    """
    if not isinstance(origin, Origin):
        origin = recorded_origin(origin)
    tried: list[str] = []
    for spec, root in _places(origin, beside, relative, data_root, upwards=3 if fingerprint else 0):
        what = f"{spec} under {root}" if root is not None else spec

        def opened(split: Split, spec: str = spec, root: str | None = root) -> ImageSource:
            return open_images(
                spec if root is not None else Path(spec),  # a path is never a name
                split=split,
                data_root=root,
                image_shape=origin.shape,
                download=download,
                array=origin.array,
                mode=origin.mode,
            )

        try:
            source = opened(origin.split)
            if fingerprint is not None and source.fingerprint() != fingerprint:
                tried.append(f"{what}: other images (their fingerprint differs)")
                continue
        except (DataError, MemoryLimitError) as error:
            text = str(error)
            tried.append(text if text.startswith(spec) else f"{what}: {text}")
            continue
        return source if split is None or split == origin.split else opened(split)
    listed = "; ".join(f"({number}) {line}" for number, line in enumerate(tried, 1))
    raise DataError(
        f"{origin.given}: expected the recorded images, found them in none of {len(tried)} places; pass --data with the"
        f" images, or --data-root with their folder. Tried: {listed}"
    )


def _places(
    origin: Origin,
    beside: str | os.PathLike[str] | None,
    relative: str | None,
    data_root: str | os.PathLike[str] | None,
    *,
    upwards: int,
) -> Iterator[tuple[str, str | None]]:
    """Where to look, each place once: what to open, and the root of a named data set (None: a path)."""
    chosen = None if data_root is None else os.path.abspath(os.path.expanduser(data_root))
    near = None if beside is None else os.path.abspath(beside)
    moved = None if near is None or relative is None else os.path.normpath(Path(os.path.realpath(near)) / relative)
    default = os.path.abspath(default_data_root())
    found: list[tuple[str, str | None]]
    if origin.root is not None and known_data_set(origin.spec):
        found = [(origin.spec, root) for root in (chosen, origin.root, moved, near, default) if root is not None]
    else:
        name = os.path.basename(origin.spec)
        given = os.path.expanduser(origin.given.rpartition(".npz:")[0] + ".npz") if _marked(origin) else origin.given
        paths = [origin.spec, *([moved] if moved is not None else [])]
        if near is not None:
            folders = [Path(near), *list(Path(near).parents)[:upwards]]
            paths += [os.path.join(near, name), *(os.path.normpath(folder / given) for folder in folders)]
        paths += [os.path.join(root, name) for root in (chosen, default) if root is not None]
        found = [(path, None) for path in paths]
    yield from dict.fromkeys(found)


def _marked(origin: Origin) -> bool:
    """Whether the path was given as PATH.npz:KEY."""
    return origin.array is not None and origin.given.endswith(f".npz:{origin.array}")
