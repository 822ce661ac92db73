"""The registry of adapters: the entry-point group `ebm_prior.backbones`, in which built-in adapters register too.

Users' own energies are found through the entry-point group `ebm_prior.energies`, which has no built-in entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import nn

from ebm_prior.compute.isolation import isolated
from ebm_prior.compute.randomness import Purpose, seeded
from ebm_prior.errors import ConfigurationError, UnknownBackboneError, described, few, shown
from ebm_prior.model.backbone import BUILT_IN, Backbone, LatentGroup, require_groups

GROUP = "ebm_prior.backbones"
ENERGIES = "ebm_prior.energies"


def registered() -> dict[str, EntryPoint]:
    """Name -> entry point of every installed adapter, sorted by name."""
    return {point.name: point for point in sorted(entry_points(group=GROUP))}


def adapter(name: str) -> type[Backbone]:
    """The adapter class registered as `name`; `name` may also be module:class of a registered class.

    A file written before its class was registered names module:class. Only registered classes are imported, never other
    names in a file. Raises UnknownBackboneError.
    """
    points = registered()
    if name in points:
        return _load(points[name])
    for point in points.values() if ":" in name else ():
        with suppress(UnknownBackboneError):
            if _qualified(kind := _load(point)) == name:
                return kind
    raise UnknownBackboneError(
        f"no backbone adapter is registered as {name!r}; found: {few(points) or 'none'}. Install the package "
        f"that provides it, or register your class under the entry-point group {GROUP!r} (backbones/README.md)"
    )


def adapter_name(backbone: Backbone) -> str:
    """The name under which the backbone's class is registered; module:class if it is not."""
    kind = type(backbone)
    for name, point in registered().items():
        if kind.__qualname__ in point.value:  # the others need not be imported
            with suppress(UnknownBackboneError):
                if _load(point) is kind:
                    return name
    return _qualified(kind)


def provider(name: str) -> str | None:
    """Where the adapter `name` (or module:class) comes from, in words: a package to install. None: from ebm-prior."""
    point = registered().get(name)
    value = name if point is None else point.value
    if value.startswith(BUILT_IN):
        return None
    package = "" if point is None or point.dist is None else f"the package {point.dist.name}, "
    return f"{package}which has `{value}`" if package else f"the package that has `{value}`"


def _load(point: EntryPoint) -> type[Backbone]:
    try:
        found = point.load()
    except Exception as error:
        raise UnknownBackboneError(f"adapter {point.name!r} ({point.value}) cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Backbone)):
        raise UnknownBackboneError(f"{point.value} must be a subclass of ebm_prior.Backbone, found {found!r}")
    return found


def _qualified(kind: type[Any]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def build(kind: type[Backbone], architecture: Mapping[str, Any], *, seed: int = 0) -> Backbone:
    """An untrained network of the adapter class `kind`; its initial weights depend on `seed` alone."""
    with isolated(), seeded(torch.device("cpu"), seed, Purpose.INITIAL_WEIGHTS):
        try:
            backbone = kind(**architecture)
        except Exception as error:  # an adapter can raise nearly anything over arguments that make no sense
            raise ConfigurationError(f"{kind.__name__} cannot build {shown(dict(architecture))}: {error}") from error
        require_groups(backbone)
        return backbone


def energy_named(name: str, groups: Sequence[LatentGroup], architecture: Mapping[str, Any]) -> nn.Module:
    """An energy of the class registered as `name`, for these latent groups. Raises ConfigurationError."""
    points = {point.name: point for point in sorted(entry_points(group=ENERGIES))}
    if name not in points:
        raise ConfigurationError(
            f"no energy is registered as {name!r}; found: {few(points) or 'none'}. Install the package that "
            f"provides it, or register your class under the entry-point group {ENERGIES!r}"
        )
    try:
        module = points[name].load()(tuple(groups), **architecture)
    except Exception as error:  # somebody else's module and class can raise anything
        raise ConfigurationError(
            f"the energy {name!r} ({points[name].value}) cannot be built with (groups, **{dict(architecture)}): "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"{points[name].value} must make a torch module, found {described(module)}")
    return module


def energy_name(module: nn.Module) -> str:
    """The name under which the class of an energy is registered. Raises ConfigurationError where it is not."""
    kind = type(module)
    for point in sorted(entry_points(group=ENERGIES)):
        if kind.__qualname__ in point.value:  # the others need not be imported
            with suppress(Exception):
                if point.load() is kind:
                    return point.name
    raise ConfigurationError(
        f"the energy {_qualified(kind)} is not registered, so that no file could name it: add `my-energy = "
        f"{_qualified(kind)}` under the entry-point group {ENERGIES!r} of your package and install it"
    )
