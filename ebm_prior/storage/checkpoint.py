"""The two kinds of files: a backbone in ebm-prior's own form, and a prior, which names its backbone by fingerprint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ebm_prior
from ebm_prior.compute.isolation import isolated, require_precision
from ebm_prior.errors import (
    BackboneMismatchError,
    CheckpointError,
    ConfigurationError,
    RegimeError,
    described,
    few,
    shown,
)
from ebm_prior.model.arguments import require_backbone, usable_device
from ebm_prior.model.backbone import Backbone, require_groups
from ebm_prior.model.passes import Passes
from ebm_prior.model.prior import EBMPrior
from ebm_prior.storage.records import BACKBONE_RECORD, PRIOR_RECORD, checked
from ebm_prior.storage.registry import adapter, adapter_name
from ebm_prior.storage.roles import built_prior, load_widened, role_record, role_tensors, stored_energies
from ebm_prior.storage.skeleton import build_described
from ebm_prior.storage.weights import (
    count_parameters,
    fingerprint,
    read_tensors,
    require_finite,
    require_path,
    write_tensors,
)

BACKBONE_KEY = "ebm_prior_backbone"
PRIOR_KEY = "ebm_prior"


def _require_format(path: Path, record: Mapping[str, Any]) -> None:
    if record.get("format") != 1:
        raise CheckpointError(
            f"{path} has format {shown(record.get('format'))}, written by ebm-prior {record.get('library')}; this "
            f"version, {ebm_prior.__version__}, reads format 1: update ebm-prior"
        )


@isolated()
def save_backbone(
    backbone: Backbone, path: str | Path, *, dtype: torch.dtype | None = None, record: Mapping[str, Any] | None = None
) -> None:
    """Write a backbone in our own form: weights, architecture and adapter name, plus `record` (where it comes from).

    Args:
        backbone: the backbone; its adapter class must be registered before the file can be read.
        path: the .safetensors file to write.
        dtype: type of the weights in the file. torch.float16 halves its size, and also changes the fingerprint.
        record: plain values to store with the weights.

    Raises:
        CheckpointError: where weights are not finite in `dtype`.
        OutputError: where the file cannot be written.

    >>> save_backbone(backbone, "mine.safetensors")
    >>> load_backbone(None, "mine.safetensors").groups == backbone.groups
    True
    """
    require_backbone(backbone)
    require_path("path", path)
    state = {
        name: t.to(dtype) if dtype is not None and t.is_floating_point() else t
        for name, t in backbone.state_dict().items()
    }
    advice = "nothing was written: use float32, or if that is not enough train it again"
    require_finite(state, f"the backbone as {dtype}" if dtype else "the backbone", advice)
    layout: dict[str, Any] = {"format": 1, "library": ebm_prior.__version__, "adapter": adapter_name(backbone)}
    layout |= {"architecture": dict(backbone.architecture), "record": dict(record or {})}
    write_tensors(path, state, BACKBONE_KEY, layout)


@isolated()
def load_backbone(
    name: str | None,
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """A pretrained backbone, frozen and in eval mode, from its official or own form.

    Args:
        name: the registered adapter; None takes the one that an own-form file names.
        path: the file or folder, or the name of a bundled backbone (`bundled()` lists them).
        device: the device for the weights.
        dtype: type of weights and computation; torch.bfloat16 means float32 with the cells in bfloat16.
        options: values that an official file does not hold, under the names in the adapter's `official_options`.

    Raises:
        UnknownBackboneError: where no adapter has this name.
        CheckpointError: for files that are missing, damaged, or of another kind.
        ConfigurationError: for arguments out of range, and where the adapter has no cells for bfloat16.

    >>> vae = load_backbone(None, "hvae_fashion_mnist")
    >>> vae.image_shape, len(vae.groups)
    ((1, 28, 28), 3)
    """
    require_path("path", path)
    half = dtype == torch.bfloat16
    require_precision(torch.float32 if half else dtype)
    if not isinstance(name, (str, type(None))):
        raise ConfigurationError(f"name: expected an adapter's name, or None for our own form; found {described(name)}")
    if name is not None:
        adapter(name)  # an unknown name is the error to report first
    place = usable_device(device)
    where = str(path) if str(path) in bundled() else os.path.abspath(path)
    path = bundled().get(str(path), Path(path))
    if not os.path.exists(path):  # Path's own raises where a name is too long for the system
        raise CheckpointError(f"no backbone at {path}; expected a file or folder, or a bundled one: {few(bundled())}")
    if path.suffix == ".safetensors":
        backbone = _load_own(name, path)
    elif name is None:
        raise CheckpointError(f"{path} is not in ebm-prior's own form: say which adapter reads it (--backbone NAME)")
    else:
        backbone = _load_official(adapter(name), path, options or {})
        require_finite(backbone.state_dict(), path)
    require_groups(backbone)
    passes = Passes(place, dtype)
    backbone = passes.apply(passes.place(backbone).eval().requires_grad_(False))
    backbone.checkpoint = where
    return backbone


def _load_official(kind: type[Backbone], path: Path, options: Mapping[str, Any]) -> Backbone:
    if unknown := sorted(options.keys() - set(kind.official_options)):
        known = few(kind.official_options) or "none"
        raise ConfigurationError(f"{few(unknown)}: {kind.__name__} reads official files with the options {known}")
    load: Callable[..., Backbone] = kind.load_official  # an adapter's own takes what it names
    return load(path, **options)


def _load_own(name: str | None, path: Path) -> Backbone:
    tensors, record = read_tensors(path, BACKBONE_KEY, "a backbone in ebm-prior's own form")
    _require_format(path, record)
    record = checked(BACKBONE_RECORD, record, path, "it is damaged: copy or make it again")
    stored = record["adapter"]
    kind = adapter(stored)
    if name is not None and adapter(name) is not kind:
        raise CheckpointError(f"{path} is a backbone of adapter {stored!r}, not {name!r}; use --backbone {stored}")
    architecture = record.get("architecture")
    if not isinstance(architecture, dict):
        raise CheckpointError(
            f"{path} does not describe its architecture: expected options of the adapter {stored!r} by name, found "
            f"{shown(architecture)}. Copy or make it again"
        )
    backbone = build_described(kind, architecture, tensors, path)
    load_widened(backbone, tensors, path)
    return backbone


def backbone_record(path: str | Path) -> dict[str, Any]:
    """The metadata of an own-form file: adapter, architecture, record."""
    path = bundled().get(str(path), Path(path))
    record = read_tensors(path, BACKBONE_KEY, "a backbone in ebm-prior's own form")[1]
    _require_format(path, record)
    typed: dict[str, Any] = checked(BACKBONE_RECORD, record, path, "it is damaged: copy or make it again")
    return typed


def bundled() -> dict[str, Path]:
    """Name -> file of the trained backbones that come with the package (checkpoints/README.md)."""
    folder = Path(str(resources.files("ebm_prior.checkpoints")))
    others = ("_classifier", "_prior")
    return {path.stem: path for path in sorted(folder.glob("*.safetensors")) if not path.stem.endswith(others)}


def bundled_priors() -> dict[str, Path]:
    """Name -> file of the energy-based priors that come with the package, on bundled backbones."""
    folder = Path(str(resources.files("ebm_prior.checkpoints")))
    return {path.stem: path for path in sorted(folder.glob("*_prior.safetensors"))}


@isolated()
def save_prior(prior: EBMPrior, path: str | Path, *, checkpoint: str | Path | None = None) -> None:
    """Write a prior as one safetensors file: the heads, and what is needed to use them again.

    Args:
        prior: from `fit` or `load_prior`.
        path: the .safetensors file to write.
        checkpoint: the place of the backbone, for `load_prior`: a path, or the name of a bundled backbone. A path
            without a folder means beside the prior. None takes the place where `load_backbone` found it.

    Raises:
        ConfigurationError: where the backbone was not loaded from a file, or the class of the energy is not registered,
            so that `load_prior` could not read the prior.
        CheckpointError: for any other prior that `load_prior` would refuse; nothing is then written.
        OutputError: where the file cannot be written.

    >>> save_prior(prior, "prior.safetensors")
    >>> load_prior("prior.safetensors").sampler == prior.sampler
    True
    """
    require_path("path", path)
    if not isinstance(prior, EBMPrior):
        raise ConfigurationError(f"expected a prior to save, found {described(prior)}: fit makes one")
    checkpoint = checkpoint or prior.checkpoint
    if checkpoint is None:
        raise ConfigurationError(
            "expected a prior whose backbone was loaded from a file, found a backbone made in memory: write it with "
            "save_backbone(prior.backbone, FILE), and say checkpoint=FILE here"
        )
    record = {
        "format": 1,
        "library": ebm_prior.__version__,
        "backbone": {
            "adapter": adapter_name(prior.backbone),
            "checkpoint": str(checkpoint),
            "fingerprint": fingerprint(prior.backbone),
            "groups": _groups(prior.backbone),
            "parameters": count_parameters(prior.backbone),
        },
        **role_record(prior),
    }
    if prior.refiner:
        record["refiner"] = role_record(prior.refiner)
    checked(PRIOR_RECORD, record, path, "nothing was written: give the prior values within their ranges")
    tensors = role_tensors(prior)
    require_finite(tensors, "the heads", "nothing was written: the training that gave them failed")
    write_tensors(path, tensors, PRIOR_KEY, record)


def prior_record(path: str | Path) -> dict[str, Any]:
    """The record in a prior file. Raises CheckpointError for another kind of file or a newer format."""
    return _read_prior(prior_file(path))[1]


def _read_prior(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, record = read_tensors(path, PRIOR_KEY, "an ebm-prior file")
    _require_format(path, record)
    typed: dict[str, Any] = checked(PRIOR_RECORD, record, path, "it is damaged: copy it again, or fit it again")
    return tensors, typed


@isolated()
def load_prior(
    path: str | Path,
    backbone: Backbone | None = None,
    *,
    checkpoint: str | Path | None = None,
    force: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> EBMPrior:
    """A prior with its backbone: the given one, or the one at `checkpoint`, or the one recorded in the file.

    Args:
        path: the prior file, the folder of a run or of an export that holds it, or the name of a bundled prior.
        backbone: the backbone, if it is loaded already.
        checkpoint: the place of the backbone, if it has moved.
        force: allow a backbone with other weights (not with other latent groups).
        device: the device for a backbone that is loaded here; dtype: as in `load_backbone`.

    Raises:
        CheckpointError: for a damaged file, or a backbone that is not there.
        BackboneMismatchError: where the backbone's weights are not those that the prior was trained on.

    >>> prior.save("prior.safetensors")
    >>> again = load_prior("prior.safetensors", backbone)
    >>> torch.equal(again.sample(2).images, prior.sample(2).images)
    True
    """
    path = prior_file(path)
    tensors, record = _read_prior(path)
    trained_on = record["backbone"]
    energies = stored_energies(path, tensors, record)
    if backbone is None:
        backbone = _backbone_of(path, trained_on, checkpoint, Passes(usable_device(device), dtype))
    if _groups(backbone) != trained_on["groups"]:
        raise BackboneMismatchError(
            f"{path} is for a backbone with the latent groups {_listed(trained_on['groups'])}; found "
            f"{_listed(_groups(backbone))}. Give the backbone that it was trained on (--ckpt)"
        )
    found = fingerprint(backbone)
    if found != trained_on["fingerprint"] and not force:
        raise BackboneMismatchError(
            f"{path} was trained on the {trained_on['adapter']} backbone with fingerprint "
            f"{trained_on['fingerprint'][:12]}…, found {found[:12]}…: the weights differ. Give the right one "
            "(--ckpt), or use --force if you know better"
        )
    try:
        return built_prior(backbone, energies, record)
    except RegimeError as error:
        raise CheckpointError(f"{path} describes no prior that this version can build: {error}") from error


def _backbone_of(path: Path, trained_on: Mapping[str, Any], given: str | Path | None, passes: Passes) -> Backbone:
    """The backbone of the prior at `path`: read from `given`, or else from the place recorded in `trained_on`."""
    where = str(given) if given else _backbone_path(path, str(trained_on["checkpoint"]))
    if where not in bundled() and not os.path.exists(where):
        raise CheckpointError(
            f"{path} was trained on the backbone at {where}, where there is nothing: say where it is now (--ckpt)"
        )
    return load_backbone(trained_on["adapter"], where, device=passes.device, dtype=passes.dtype)


def prior_file(path: str | Path) -> Path:
    """The prior file that `path` means: a bundled prior's name, the file itself, or the folder that holds it."""
    require_path("path", path)
    if str(path) in bundled_priors():
        return bundled_priors()[str(path)]
    inside = Path(path) / "prior.safetensors"
    return inside if os.path.isfile(inside) else Path(path)


def _backbone_path(prior: Path, recorded: str) -> str:
    """Where the backbone of a prior file is: the path recorded in it, or beside the file.

    The folder of the prior is tried first if the record names no folder, and else if nothing is at the recorded path.
    """
    beside = prior.parent / Path(recorded).name
    moved = Path(recorded).name == recorded or not os.path.exists(recorded)
    return str(beside) if moved and os.path.exists(beside) else recorded


def _groups(backbone: Backbone) -> list[list[Any]]:
    require_backbone(backbone)
    return [[group.name, list(group.shape)] for group in backbone.groups]


def _listed(groups: Any) -> str:
    """Some latent groups in words, as a record has them."""
    return few([f"{group}" for group in groups]) if isinstance(groups, list) else shown(groups)


# EBMPrior's methods for files are set here, because the package `model` must not depend on files.
EBMPrior.save = save_prior  # type: ignore[method-assign,assignment]
EBMPrior.load = staticmethod(load_prior)  # type: ignore[method-assign]
