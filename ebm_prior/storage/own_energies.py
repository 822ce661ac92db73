"""Users' own energies in prior files: the entry point that names the class, and the arguments that rebuild it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.model.backbone import LatentGroup
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.own_energy import OwnEnergy
from ebm_prior.storage.registry import energy_name, energy_named
from ebm_prior.storage.weights import check_state


def own_energy_record(energy: JointEnergy) -> dict[str, Any]:
    """The record of a user's own energy in a prior file: {"own_energy": {"name", "architecture"}}; {} for the heads.

    Raises ConfigurationError for a class that is not registered or does not rebuild the same module, because the file
    could not be read.
    """
    if not isinstance(energy, OwnEnergy):
        return {}
    name = energy_name(energy.module)
    try:
        architecture = json.loads(json.dumps(dict(energy.module.architecture)))  # type: ignore[arg-type]
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the energy {name!r} must have `architecture`, a dictionary of the plain values that build it again as "
            f"{type(energy.module).__name__}(groups, **architecture): {error}"
        ) from error
    again = energy_named(name, energy.groups, architecture)
    try:
        check_state(energy.module.state_dict(), again.state_dict(), Path(name))
    except CheckpointError as error:
        raise ConfigurationError(
            f"the energy {name!r} is not what {type(energy.module).__name__}(groups, **{architecture}) builds, so that "
            f"its file could not be read: {error}"
        ) from error
    return {"own_energy": {"name": name, "architecture": architecture}}


def stored_energy(groups: Sequence[LatentGroup], config: EnergyConfig, own: Mapping[str, Any] | None) -> JointEnergy:
    """The untrained energy that a prior file describes. own: from `own_energy_record`; None for the built-in heads.

    Raises ConfigurationError.
    """
    if own is None:
        return JointEnergy(groups, config)
    if not isinstance(own, Mapping) or not isinstance(own.get("architecture"), Mapping):
        raise ConfigurationError(f"own_energy must have a name and an architecture, found {own!r}")
    return OwnEnergy(groups, config, energy_named(str(own.get("name")), groups, own["architecture"]))
