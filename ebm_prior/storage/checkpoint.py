"""The two files of the project: a backbone in the own form, and a prior, which names its backbone by fingerprint."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import ebm_prior
from ebm_prior.errors import BackboneMismatchError, CheckpointError, ConfigurationError
from ebm_prior.model.arguments import described, require_backbone, usable_device
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig
from ebm_prior.model.passes import Passes
from ebm_prior.model.prior import EBMPrior, Regime, Target
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.storage.own_energies import own_energy_record, stored_energy
from ebm_prior.storage.registry import adapter, adapter_name
from ebm_prior.storage.weights import (
    count_parameters,
    fingerprint,
    load_strictly,
    read_tensors,
    require_finite,
    write_tensors,
)

BACKBONE_KEY = "ebm_prior_backbone"
PRIOR_KEY = "ebm_prior"


def _require_format(path: Path, record: Mapping[str, Any]) -> None:
    if record.get("format") != 1:
        raise CheckpointError(
            f"{path} has format {record.get('format')!r}, written by ebm-prior {record.get('library')}; this version, "
            f"{ebm_prior.__version__}, reads format 1: update ebm-prior"
        )


def save_backbone(
    backbone: Backbone, path: str | Path, *, dtype: torch.dtype | None = None, record: Mapping[str, Any] | None = None
) -> None:
    """Write a backbone in our own form: weights, architecture and adapter name, plus `record` (where it comes from).

    Args:
        backbone: of an adapter that is registered, or the file cannot be read before it is.
        path: the .safetensors file to write.
        dtype: of the weights in the file: torch.float16 halves it, and the fingerprint is that of the rounded weights.
        record: plain values to keep with it.

    Raises:
        CheckpointError: where weights are not finite in this precision.
        OutputError: where the file cannot be written.

    >>> save_backbone(backbone, "mine.safetensors")
    >>> load_backbone(None, "mine.safetensors").groups == backbone.groups
    True
    """
    require_backbone(backbone)
    _require_place("path", path)
    state = {
        name: t.to(dtype) if dtype is not None and t.is_floating_point() else t
        for name, t in backbone.state_dict().items()
    }
    advice = "nothing was written: use float32, or if that is not enough train it again"
    require_finite(state, f"the backbone as {dtype}" if dtype else "the backbone", advice)
    described = {
        "format": 1,
        "library": ebm_prior.__version__,
        "adapter": adapter_name(backbone),
        "architecture": dict(backbone.architecture),
        "record": dict(record or {}),
    }
    write_tensors(path, state, BACKBONE_KEY, described)


def load_backbone(
    name: str | None, path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Backbone:
    """A pretrained backbone, frozen and in eval mode, from its official or own form.

    Args:
        name: the registered adapter; None takes the one that an own-form file names.
        path: the file or folder, or the name of a bundled backbone (`bundled()` lists them).
        device: where its weights are.
        dtype: of weights and computation; torch.bfloat16: float32 with the cells in bfloat16.

    Raises:
        UnknownBackboneError: where no adapter has this name.
        CheckpointError: for files that are missing, damaged, or of another kind.
        ConfigurationError: for arguments that make no sense, and where there are no such cells.

    >>> vae = load_backbone(None, "hvae_fashion_mnist")
    >>> vae.image_shape, len(vae.groups)
    ((1, 28, 28), 3)
    """
    _require_place("path", path)
    if not isinstance(name, (str, type(None))):
        raise ConfigurationError(f"name: expected an adapter's name, or None for our own form; found {described(name)}")
    if name is not None:
        adapter(name)  # an unknown name is the error to report first
    place = usable_device(device)
    where = str(path) if str(path) in bundled() else os.path.abspath(path)
    path = bundled().get(str(path), Path(path))
    if not os.path.exists(path):  # Path's own raises where a name is too long for the system
        raise CheckpointError(
            f"no backbone at {path}; expected a file or folder, or a bundled one: {', '.join(bundled())}"
        )
    if path.suffix == ".safetensors":
        backbone = _load_own(name, path)
    elif name is None:
        raise CheckpointError(f"{path} is not in ebm-prior's own form: say which adapter reads it (--backbone NAME)")
    else:
        backbone = adapter(name).load_official(path)
        require_finite(backbone.state_dict(), path)
    passes = Passes(place, dtype)
    backbone = passes.apply(passes.place(backbone).eval().requires_grad_(False))
    backbone.checkpoint = where
    return backbone


def _load_own(name: str | None, path: Path) -> Backbone:
    tensors, record = read_tensors(path, BACKBONE_KEY, "a backbone in ebm-prior's own form")
    _require_format(path, record)
    stored = str(record.get("adapter"))
    kind = adapter(stored)
    if name is not None and adapter(name) is not kind:
        raise CheckpointError(f"{path} is a backbone of adapter {stored!r}, not {name!r}; use --backbone {stored}")
    try:
        backbone = kind(**record["architecture"])
    except Exception as error:  # an adapter can raise nearly anything over a foreign architecture
        raise CheckpointError(f"{path} describes an architecture that {stored!r} cannot build: {error}") from error
    _load_widened(backbone, tensors, path)
    return backbone


def backbone_record(path: str | Path) -> dict[str, Any]:
    """The metadata of an own-form file: adapter, architecture, record."""
    return read_tensors(bundled().get(str(path), Path(path)), BACKBONE_KEY, "a backbone in ebm-prior's own form")[1]


def bundled() -> dict[str, Path]:
    """Name -> file of the trained backbones that come with the package (checkpoints/README.md)."""
    folder = Path(str(resources.files("ebm_prior.checkpoints")))
    others = ("_classifier", "_prior")
    return {path.stem: path for path in sorted(folder.glob("*.safetensors")) if not path.stem.endswith(others)}


def save_prior(prior: EBMPrior, path: str | Path, *, checkpoint: str | Path | None = None) -> None:
    """Write a prior as one safetensors file: the heads, and what is needed to use them again.

    Args:
        prior: from `fit` or `load_prior`.
        path: the .safetensors file to write.
        checkpoint: where the backbone is (a path, or the name of a bundled one), for `load_prior`. A path without a
            folder means that it lies beside the prior. None: where `load_backbone` has read it.

    Raises:
        ConfigurationError: for a prior that `load_prior` could not read: its backbone is in no file, or its energy is
            of a class that is not registered.
        OutputError: where the file cannot be written.

    >>> save_prior(prior, "prior.safetensors")
    >>> load_prior("prior.safetensors").sampler == prior.sampler
    True
    """
    _require_place("path", path)
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
        "energy": asdict(prior.energy.config),
        **own_energy_record(prior.energy),
        "tau": prior.tau,
        "ceiling": None if prior.ceiling == math.inf else prior.ceiling,
        "regime": prior.regime,
        "target": prior.target,
        "sampler": asdict(prior.sampler),
        "record": prior.record,
    }
    write_tensors(path, prior.energy.state_dict(), PRIOR_KEY, record)


def prior_record(path: str | Path) -> dict[str, Any]:
    """The record in a prior file. Raises CheckpointError for another kind of file or a newer format."""
    return _read_prior(prior_file(path))[1]


def _read_prior(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, record = read_tensors(path, PRIOR_KEY, "an ebm-prior file")
    _require_format(path, record)
    backbone = record.get("backbone")
    lacking = [
        key for key in ("backbone", "energy", "tau", "regime", "target", "sampler", "record") if key not in record
    ]
    if isinstance(backbone, dict):
        parts = ("adapter", "checkpoint", "fingerprint", "groups", "parameters")
        lacking += [f"backbone.{key}" for key in parts if key not in backbone]
    elif "backbone" in record:
        lacking += ["backbone"]
    if lacking:
        raise CheckpointError(f"{path} lacks {', '.join(lacking)} in its record: it is damaged, fit it again")
    return tensors, record


def load_prior(
    path: str | Path,
    backbone: Backbone | None = None,
    *,
    checkpoint: str | Path | None = None,
    force: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> EBMPrior:
    """A prior with its backbone: the given one, or the one at `checkpoint`, or the one that the file remembers.

    Args:
        path: the file, or the folder of a run or of an export that it is in.
        backbone: the backbone, where it is loaded already.
        checkpoint: where the backbone is, if it has moved.
        force: allow a backbone with other weights (not with other latent groups).
        device: of the backbone, where it is loaded here; dtype: as `load_backbone` has it.

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
    trained_on, tau, regime, target = (record[key] for key in ("backbone", "tau", "regime", "target"))
    ceiling = math.inf if record.get("ceiling") is None else record["ceiling"]  # older files have none
    config, sampler = _settings_of(path, record, ceiling)
    if backbone is None:
        backbone = _backbone_of(path, trained_on, checkpoint, Passes(usable_device(device), dtype))
    if _groups(backbone) != trained_on["groups"]:
        raise BackboneMismatchError(
            f"{path} is for a backbone with the latent groups {trained_on['groups']}, found {_groups(backbone)}"
        )
    found = fingerprint(backbone)
    if found != trained_on["fingerprint"] and not force:
        raise BackboneMismatchError(
            f"{path} was trained on the {trained_on['adapter']} backbone with fingerprint "
            f"{trained_on['fingerprint'][:12]}…, found {found[:12]}…: the weights differ. Give the right one "
            "(--ckpt), or use --force if you know better"
        )
    try:
        energy = stored_energy(backbone.groups, config, record.get("own_energy"))
    except (RuntimeError, ConfigurationError) as error:  # sizes that no memory holds
        raise CheckpointError(f"{path} describes heads that cannot be built: {error}") from error
    _load_widened(energy, tensors, path)
    return EBMPrior(
        backbone,
        energy,
        tau=tau,
        ceiling=ceiling,
        regime=regime,
        target=target,
        sampler=sampler,
        record=record["record"],
    )


def _settings_of(path: Path, record: Mapping[str, Any], ceiling: float) -> tuple[EnergyConfig, SamplerConfig]:
    tau, regime, target = (record[key] for key in ("tau", "regime", "target"))
    try:
        if not (
            math.isfinite(tau) and ceiling > -math.inf and regime in get_args(Regime) and target in get_args(Target)
        ):
            raise ValueError(f"tau {tau}, ceiling {ceiling}, regime {regime!r}, target {target!r}")
        return EnergyConfig(**record["energy"]), SamplerConfig(**record["sampler"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes no prior that this version can build: {error}") from error


def _backbone_of(path: Path, trained_on: Mapping[str, Any], given: str | Path | None, passes: Passes) -> Backbone:
    """The backbone of the prior at `path`, which says what it was `trained_on`: at `given`, or where the file says."""
    where = str(given) if given else _backbone_path(path, str(trained_on["checkpoint"]))
    if where not in bundled() and not os.path.exists(where):
        raise CheckpointError(
            f"{path} was trained on the backbone at {where}, where there is nothing: say where it is now (--ckpt)"
        )
    return load_backbone(trained_on["adapter"], where, device=passes.device, dtype=passes.dtype)


def prior_file(path: str | Path) -> Path:
    """The file of a prior at `path`, which may be the folder that it lies in."""
    _require_place("path", path)
    inside = Path(path) / "prior.safetensors"
    return inside if os.path.isfile(inside) else Path(path)


def _require_place(name: str, path: object) -> None:
    """Raise ConfigurationError unless this can be a path."""
    if not isinstance(path, (str, os.PathLike)) or not str(path).strip():
        raise ConfigurationError(f"{name}: expected the path of a file, found {described(path)}")


def _backbone_path(prior: Path, recorded: str) -> str:
    """Where the backbone of a prior file is: the path recorded in it, or beside the file.

    Beside the file is looked at first if the record names no folder, and else where nothing is at the recorded path.
    """
    beside = prior.parent / Path(recorded).name
    moved = Path(recorded).name == recorded or not os.path.exists(recorded)
    return str(beside) if moved and os.path.exists(beside) else recorded


def _load_widened(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load weights that a new module, which is float32, would round: a float64 file must come back as it was."""
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        module.double()
    load_strictly(module, tensors, path)


def _groups(backbone: Backbone) -> list[list[Any]]:
    require_backbone(backbone)
    return [[group.name, list(group.shape)] for group in backbone.groups]


# The prior's own way to its files: the mathematics knows none, so the methods are set here.
EBMPrior.save = save_prior  # type: ignore[method-assign,assignment]
EBMPrior.load = staticmethod(load_prior)  # type: ignore[method-assign]
