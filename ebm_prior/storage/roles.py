"""The roles in a prior file: the prior itself and, where there is one, the refiner that draws its samples.

Each role has heads, settings, a sampler and a record of its training. Those of the refiner are in the entry `refiner`
of the file's record, and the names of its tensors begin with `PREFIX`. A file without refiner has neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.model.backbone import Backbone, LatentGroup
from ebm_prior.model.energy import EnergyConfig, JointEnergy, shapes_seen, shared_shapes
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.settings import of_plain, recorded
from ebm_prior.storage.own_energies import own_energy_record, stored_energy
from ebm_prior.storage.weights import build_strictly, load_strictly

PREFIX = "refiner/"


def role_record(prior: EBMPrior) -> dict[str, Any]:
    """What a file says of a role: all but its weights and its backbone."""
    return {
        "energy": recorded(prior.energy.config),
        **own_energy_record(prior.energy),
        "tau": prior.tau,
        "ceiling": None if prior.ceiling == math.inf else prior.ceiling,
        "regime": prior.regime,
        "target": prior.target,
        "sampler": recorded(prior.sampler),
        "record": prior.record,
    }


def role_tensors(prior: EBMPrior) -> dict[str, Tensor]:
    """The weights of the heads of a prior and of its refiner, by their names in a file."""
    refining = prior.refiner.energy.state_dict() if prior.refiner else {}
    return {**prior.energy.state_dict(), **{PREFIX + name: tensor for name, tensor in refining.items()}}


def stored_energies(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> list[JointEnergy]:
    """The energy of the prior in a file and, where there is one, that of its refiner, with their weights.

    Raises CheckpointError.
    """
    groups = [LatentGroup(name, tuple(shape)) for name, shape in record["backbone"]["groups"]]
    if "refiner" not in record:
        return [_energy_of(path, tensors, record, groups)]
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    others = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return [_energy_of(path, own, record, groups), _energy_of(path, others, record["refiner"], groups)]


def built_prior(backbone: Backbone, energies: Sequence[JointEnergy], record: Mapping[str, Any]) -> EBMPrior:
    """The prior that a file's record describes, with its refiner where it has one. Raises RegimeError."""
    energy, *others = energies
    refiner = built_prior(backbone, others, record["refiner"]) if others else None
    ceiling = record.get("ceiling")
    return EBMPrior(
        refiner.backbone if refiner else backbone,  # made faster once for both roles
        energy,
        tau=record["tau"],
        ceiling=math.inf if ceiling is None else ceiling,
        regime=record["regime"],
        target=record["target"],
        sampler=of_plain(SamplerConfig, record["sampler"]),
        record=record["record"],
        refiner=refiner,
    )


def _energy_of(
    path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any], groups: Sequence[LatentGroup]
) -> JointEnergy:
    """The energy of the role that `record` describes, with its weights.

    Nothing is allocated before the names are compared.
    """
    config = of_plain(EnergyConfig, record["energy"])
    own = record.get("own_energy")
    if own is not None:
        try:
            energy = stored_energy(groups, config, own)
        except (RuntimeError, ConfigurationError) as error:
            raise CheckpointError(f"{path} has an energy that cannot be built: {error}") from error
        load_widened(energy, tensors, path)
        return energy
    _require_as_many(groups, config, len(tensors), path)
    return build_strictly(lambda: JointEnergy(groups, config), tensors, path)


def load_widened(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a new module without rounding: for a float64 file it is widened from float32 first."""
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        module.double()
    load_strictly(module, tensors, path)


def _require_as_many(groups: Sequence[LatentGroup], config: EnergyConfig, tensors: int, path: Path) -> None:
    """Refuse a record of heads with far more parts than the file has tensors, before any part is made."""
    shapes = shapes_seen(groups, config)
    spared = sum(count - 1 for shape, count in shared_shapes(shapes, config).items() if len(shape) < 3)
    layers = config.vector_layers * (sum(len(shape) < 3 for shape in shapes) - spared)
    if 4 * len(groups) + 2 * layers > tensors + 1_000:
        raise CheckpointError(
            f"{path} describes {len(groups):,} heads with {layers:,} layers, but has only {tensors:,} tensors: it is "
            "damaged, copy it again, or fit it again"
        )
