"""Adapters are found through the entry-point group `ebm_prior.backbones`; the built-in ones register like anybody's."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from ebm_prior.backbone import Backbone
from ebm_prior.errors import UnknownBackboneError

GROUP = "ebm_prior.backbones"


def registered() -> dict[str, EntryPoint]:
    """Name -> entry point of every installed adapter, sorted by name."""
    return {point.name: point for point in sorted(entry_points(group=GROUP))}


def adapter(name: str) -> type[Backbone]:
    """The adapter class registered as `name`. Raises UnknownBackboneError."""
    points = registered()
    if name not in points:
        raise UnknownBackboneError(
            f"no backbone adapter is registered as {name!r}; found: {', '.join(points) or 'none'}. Install the package "
            f"that provides it, or register your class under the entry-point group {GROUP!r} (README: Your own VAE)"
        )
    try:
        found = points[name].load()
    except Exception as error:
        raise UnknownBackboneError(f"adapter {name!r} ({points[name].value}) cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Backbone)):
        raise UnknownBackboneError(f"{points[name].value} must be a subclass of ebm_prior.Backbone, found {found!r}")
    return found


def adapter_name(backbone: Backbone) -> str:
    """The name under which the backbone's class is registered; its qualified class name if it is not."""
    kind = f"{type(backbone).__module__}:{type(backbone).__qualname__}"
    return next((name for name, point in registered().items() if point.value == kind), kind)
