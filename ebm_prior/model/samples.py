"""The draws of a prior: latents, images, and the diagnostics of the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_prior.model.backbone import Backbone, Trace
from ebm_prior.model.drawing import Sampled


class Samples(NamedTuple):
    """Draws of the prior, with per-draw diagnostics (n,)."""

    z: list[Tensor]  # (n, *group.shape) each
    eps: list[Tensor]
    images: Tensor  # (n, C, H, W) in [0, 1]: the means of p(x | z)
    acceptance: Tensor
    norm: Tensor  # ‖ε‖/√D
    ess_fraction: Tensor
    restarts: Tensor  # times that the chain began anew, after it had left the typical set


def refusals(norm: Tensor, restarts: Tensor, limit: float) -> dict[str, int]:
    """The numbers of draws whose chain began anew, and of those that end beyond the `limit` of ‖ε‖/√D all the same.

    norm and restarts (n,) are those of `Samples`; the limit is 0 where the sampler has none.
    """
    return {"restarted": int((restarts > 0).sum()), "beyond_limit": int((norm > limit).sum()) if limit else 0}


def decoded(backbone: Backbone, trace: Trace, eps: list[Tensor], found: Sampled) -> Samples:
    """What a sampler `found`, as samples with the images at the end of the `trace`."""
    images = backbone.likelihood(trace.features).mean
    return Samples(trace.z, eps, images, found.acceptance, found.norm, found.ess_fraction, found.restarts)


def joined(backbone: Backbone, parts: Sequence[Samples]) -> Samples:
    """The samples of several chunks as one; without chunks, empty tensors."""
    if not parts:
        like = next(backbone.parameters())
        nothing = [like.new_empty(0, *group.shape) for group in backbone.groups]
        return Samples(nothing, list(nothing), like.new_empty(0, *backbone.image_shape), *[like.new_empty(0)] * 4)
    return Samples(
        [torch.cat(group) for group in zip(*(part.z for part in parts), strict=True)],
        [torch.cat(group) for group in zip(*(part.eps for part in parts), strict=True)],
        *(torch.cat(column) for column in zip(*(part[2:] for part in parts), strict=True)),
    )
