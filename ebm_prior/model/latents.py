"""Lists of latents, one tensor per group: held to the shapes of the groups before anything is computed of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ebm_prior.errors import ConfigurationError, described, few


class Group(Protocol):
    """What of a latent group is asked for here."""

    @property
    def name(self) -> str:
        """As messages call it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one draw."""


def batch_of(shape: Sequence[int]) -> str:
    """The shape of a batch of tensors of this shape, as messages write it: (B, 1, 28, 28)."""
    return f"({', '.join(['B', *map(str, shape)])})"


def require_latents(name: str, latents: object, groups: Sequence[Group], like: Tensor | None = None) -> None:
    """Raise ConfigurationError unless `latents` is a list of (B, *group.shape), one per group, of `like`'s type if any.

    Only shapes, types and devices are read, no values: this runs in every step of a chain.
    """
    if isinstance(latents, Sequence) and len(latents) == len(groups):
        shapes = [tuple(z.shape) if isinstance(z, Tensor) else () for z in latents]
        if (
            all(shape[1:] == tuple(group.shape) and shape for shape, group in zip(shapes, groups, strict=True))
            and len({shape[0] for shape in shapes}) == 1
            and (like is None or all(z.dtype == like.dtype and z.device == like.device for z in latents))
        ):
            return
    raise ConfigurationError(f"{name}: {_latent_problem(latents, groups, like)}")


def require_upper(name: str, latents: object, groups: Sequence[Group], like: Tensor) -> None:
    """Raise ConfigurationError unless `latents` are as `require_latents` has them for the first groups, one or more.

    All groups are too many, because then none is left to draw.
    """
    found = len(latents) if isinstance(latents, (list, tuple)) else 0
    if not 1 <= found < len(groups):
        raise ConfigurationError(
            f"{name}: expected a list of z of the first groups, from 1 to {len(groups) - 1} tensors, as the backbone "
            f"has {len(groups)} groups; found {found or described(latents)}: z[:k] takes those of k groups"
        )
    require_latents(name, latents, groups[:found], like)


def _latent_problem(latents: object, groups: Sequence[Group], like: Tensor | None = None) -> str:
    wanted = few(f"{group.name} {batch_of(group.shape)}" for group in groups)
    expected = f"expected a list of one tensor per latent group, the top one first: {wanted}"
    if not isinstance(latents, Sequence) or isinstance(latents, (str, bytes)):
        return f"{expected}; found {described(latents)}"
    strange = [f"number {index} is {described(z)}" for index, z in enumerate(latents) if not isinstance(z, Tensor)]
    if strange:
        return f"{expected}; {strange[0]}"
    found = [tuple(z.shape) for z in latents]
    if len(found) != len(groups):
        return f"{expected}; found {len(found)} tensors: {few(found)}"
    shapes = [tuple(group.shape) for group in groups]
    wrong = [
        f"{group.name} has {shape}"
        for group, shape in zip(groups, found, strict=True)
        if not shape or shape[1:] != tuple(group.shape)
    ]
    if wrong:
        turned = all(found) and [shape[1:] for shape in reversed(found)] == shapes
        return f"{expected}; found that {few(wrong)}" + (
            ": they are in reverse order, list(reversed(z)) turns them" if turned else ""
        )
    if len({shape[0] for shape in found}) > 1:
        return f"{expected} with one B; found B = {few(str(shape[0]) for shape in found)}"
    assert like is not None
    other = next(z for z in latents if z.dtype != like.dtype or z.device != like.device)
    return (
        f"expected {like.dtype} on {like.device} as the backbone is, found {other.dtype} on {other.device}: convert "
        "the latents, or move the prior with .to(device)"
    )
