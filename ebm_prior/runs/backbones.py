"""Backbones for the commands: new or changed ones, and the records and data sets that a checkpoint names."""

from __future__ import annotations

import hashlib
import inspect
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.data.images import DATA_SET_NAMES, known_data_set
from ebm_prior.errors import ConfigurationError, few
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.batch_norm import readjust_batch_norm
from ebm_prior.plain import NotPlainError, parse_json, read_json
from ebm_prior.storage.checkpoint import backbone_record, bundled, load_backbone, save_backbone
from ebm_prior.storage.registry import adapter, build


def own_data(checkpoint: str, backbone: Backbone) -> str:
    """The known data set that a checkpoint names as its training data. Raises ConfigurationError if it names none."""
    return named_data(own_record(checkpoint, backbone), checkpoint)


def named_data(record: Mapping[str, Any], what: str, *, option: str = "--data") -> str:
    """The known data set that a training record names. Paths are not accepted: they may lack a split, or have moved.

    `what` (the owner of the record) and `option` (by which a user can name the data) are for the message. Raises
    ConfigurationError.
    """
    data = record.get("data")
    recorded = data.get("name") if isinstance(data, Mapping) else None
    name, _, split = str(recorded).partition("/")
    if name in DATA_SET_NAMES and split in ("train", "test"):
        return name
    known = ", ".join(DATA_SET_NAMES)
    said = (
        f"does not say what it was trained on: pass {option} with one of the known data sets ({known}), or"
        if recorded is None
        else f"was trained on {recorded}, a path or the name of none of the known data sets ({known}): pass {option} "
        "with"
    )
    raise ConfigurationError(f"{what} {said} a folder of images, an .npz, an .npy or an idx file")


def source_record(checkpoint: str, backbone: Backbone) -> dict[str, Any]:
    """The origin of a backbone: the record in its checkpoint, with the checkpoint's name and SHA-256."""
    path = bundled().get(checkpoint, Path(checkpoint))
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as content:
                while piece := content.read(2**20):
                    digest.update(piece)
    return {**own_record(checkpoint, backbone), "source": path.name, "source_sha256": digest.hexdigest()}


def own_record(checkpoint: str, backbone: Backbone) -> dict[str, Any]:
    """The record in a checkpoint of our own form; for an official one its data set, if it names one."""
    path = bundled().get(checkpoint, Path(checkpoint))
    if path.suffix == ".safetensors":
        return dict(backbone_record(path)["record"])
    if backbone.data_name is None:
        return {}
    known = known_data_set(backbone.data_name)
    return {"data": {"name": f"{known}/train" if known else backbone.data_name}}


def readjusted(
    backbone: Backbone,
    path: Path,
    checkpoint: str,
    settings: Mapping[str, Any],
    *,
    resume: bool = False,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> Backbone:
    """Re-adjust a backbone's batch norms, write it to `path` in our own form, and return it as read from there.

    settings: keyword arguments of `readjust_batch_norm`, which changes `backbone` in place.  checkpoint: where the
    backbone comes from, for the record.  resume: take the file at `path` if there is one.  progress: gets remarks.
    The first of the `processes` does that, and sends the file's content to the others.
    """
    like = next(backbone.parameters())
    placed: dict[str, Any] = {"device": like.device, "dtype": like.dtype}

    def made() -> bytes:
        if not resume:
            path.unlink(missing_ok=True)  # of an earlier run; a kill while this one works must not leave it to a resume
        if not path.exists():
            progress.remark(
                "re-adjusting batch norms to {iterations} batches of {batch_size} samples".format(**settings)
            )
            readjust_batch_norm(backbone, **settings, progress=progress)
            record = {**source_record(checkpoint, backbone), "stage": "bn-readjust", "bn_readjust": dict(settings)}
            save_backbone(backbone, path, record=record)
        return path.read_bytes() if processes.count > 1 else b""

    content = processes.of_first(made)
    if processes.first:
        return load_backbone(None, path, **placed)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, path.name).write_bytes(content)
        return load_backbone(None, Path(folder, path.name), **placed)


_BARE_TEXT = re.compile("[a-z0-9][a-z0-9_.,:-]*")  # no capitals: Python's True, False and None are refused


def parsed_options(words: Sequence[str]) -> dict[str, Any]:
    """Arguments of an adapter from words KEY=VALUE, each value in JSON. Raises ConfigurationError.

    Texts of small letters, digits and _.,:- need no quotes: data_set=cifar10, dec_blocks=1x1,4m1.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            options[key] = parse_json(value)
        except NotPlainError as error:
            if _BARE_TEXT.fullmatch(value):
                options[key] = value
                continue
            raise ConfigurationError(
                f"--set {word}: expected KEY=VALUE with the value in JSON, e.g. log_std_floor=-2 or skips=false, and "
                f"texts with other characters than a-z 0-9 _.,:- in double quotes ({error})"
            ) from error
    return options


def load_with_options(name: str | None, checkpoint: str, options: Mapping[str, Any]) -> Backbone:
    """A backbone loaded with `options` of its adapter.

    Options that the adapter names in `official_options` are used in reading the official file; the others change the
    architecture, as `with_options` does. Raises the errors of `load_backbone`, and ConfigurationError.
    """
    official = name is not None and checkpoint not in bundled() and Path(checkpoint).suffix != ".safetensors"
    known = adapter(str(name)).official_options if official else ()
    backbone = load_backbone(name, checkpoint, options={key: v for key, v in options.items() if key in known})
    changes = {key: v for key, v in options.items() if key not in known}
    return with_options(backbone, changes) if changes else backbone


def with_options(backbone: Backbone, options: Mapping[str, Any]) -> Backbone:
    """A network with the same weights, in which `options` replace entries of its architecture.

    Raises ConfigurationError for an option that the architecture does not have, or on which its weights depend.
    """
    kind, architecture = type(backbone), dict(backbone.architecture)
    if unknown := sorted(set(options) - set(architecture)):
        known = few(architecture)
        raise ConfigurationError(f"--set {few(unknown)}: {kind.__name__} has only the options {known}")
    named = f"--set {few(options)}"
    try:
        changed = build(kind, architecture | dict(options))
    except ConfigurationError as error:
        raise ConfigurationError(f"{named}: {error}") from error
    ours, theirs = ({key: t.shape for key, t in network.state_dict().items()} for network in (backbone, changed))
    if unfit := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        raise ConfigurationError(
            f"{named}: expected options that change no weights, found {len(unfit)} weights that would change: "
            f"{few(unfit, most=5)}"
        )
    changed.load_state_dict(backbone.state_dict())
    return changed.eval()


def new_backbone(name: str, architecture: str | None, seed: int) -> Backbone:
    """An untrained network of adapter `name`.

    `architecture`: a JSON file of its keyword arguments, or the name of a bundled backbone with the same architecture;
    None gives no arguments. Raises UnknownBackboneError, ConfigurationError.
    """
    kind = adapter(name)
    if architecture is None:
        try:
            return build(kind, {}, seed=seed)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{error}. Pass --architecture with a JSON file of its keyword arguments or a bundled backbone: "
                f"{few(bundled())}"
            ) from error
    if architecture in bundled():
        record = backbone_record(architecture)
        if record["adapter"] != name:
            raise ConfigurationError(
                f"--architecture {architecture} belongs to the adapter {record['adapter']!r}, not to {name!r}: "
                f"use --backbone {record['adapter']}"
            )
        return build(kind, record["architecture"], seed=seed)
    described = read_json(
        architecture,
        "the adapter's arguments for --architecture, as JSON or as the name of a bundled backbone",
        error=ConfigurationError,
        advice=f"give a JSON object, or one of {few(bundled())}",
    )
    if not isinstance(described, dict):
        raise ConfigurationError(f"--architecture {architecture}: expected a JSON object of keyword arguments")
    return build(kind, described, seed=seed)


def new_network(
    name: str, architecture: str | None, changes: Sequence[str], image_shape: Sequence[int], seed: int
) -> Backbone:
    """An untrained network of adapter `name` for images (C, H, W).

    `architecture`: as `new_backbone` takes it; else `changes`, words KEY=VALUE with arguments of the adapter. An
    adapter that takes no `image_shape` is given none: its networks have one of their own.
    """
    if architecture is not None:
        return new_backbone(name, architecture, seed)
    kind, options = adapter(name), parsed_options(changes)
    taken = inspect.signature(kind).parameters.values()
    if any(p.name == "image_shape" or p.kind is p.VAR_KEYWORD for p in taken):
        options = {"image_shape": list(image_shape), **options}
    return build(kind, options, seed=seed)
