"""From one image to another through the codes between theirs, which are as typical of the prior as theirs are."""

from __future__ import annotations

import torch
from torch import Tensor

from ebm_prior.compute.isolation import isolated
from ebm_prior.compute.randomness import BlockGenerator, Purpose, derived_seed
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.arguments import require_backbone, require_count, require_images
from ebm_prior.model.backbone import Backbone


@isolated(grad=False)
def interpolate(backbone: Backbone, a: Tensor, b: Tensor, *, steps: int = 8, seed: int = 0) -> Tensor:
    """Images on the way from each image in `a` to its partner in `b`, decoded from codes on great circles in ε-space.

    Both images are encoded, and each group's ε = T_β⁻¹(z) goes along a great circle from one code to the other; T_β and
    the likelihood's mean make images of it. On a straight line ε would leave the shell on which N(0, I) lies.

    Args:
        backbone: a pretrained one, as `prior.backbone`.
        a: images (B, C, H, W) in [0, 1].
        b: as many others, of the same shape.
        steps: number of images on the way, 2 or more; the first and the last are reconstructions of a and b.
        seed: chooses the posterior draws.

    Returns:
        Images (B, steps, C, H, W) in [0, 1].

    Raises:
        ConfigurationError: for images of another shape or range, or unequally many.

    >>> pairs = images.batch([0, 1]), images.batch([2, 3])
    >>> interpolate(backbone, *pairs, steps=5).shape
    torch.Size([2, 5, 1, 8, 8])
    """
    require_backbone(backbone)
    for batch in (a, b):
        require_images(batch, backbone.image_shape)
    if len(a) != len(b):
        raise ConfigurationError(f"expected as many images in a as in b, found {len(a)} and {len(b)}: leave some out")
    steps, like = require_count("steps", steps, least=2), next(backbone.parameters())
    generator = BlockGenerator(
        derived_seed(require_count("seed", seed), Purpose.PICTURE_POSTERIOR), 0, 2 * len(a), like.device
    )
    observed = backbone.observe(torch.cat([a, b]).to(like.device, like.dtype), generator=generator)
    codes = backbone.infer(observed, generator=generator).eps
    frames = []
    for step in range(steps):
        trace = backbone.transform([great_circle(eps[: len(a)], eps[len(a) :], step / (steps - 1)) for eps in codes])
        frames.append(backbone.likelihood(trace.features).mean)
    return torch.stack(frames, dim=1)


def great_circle(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Between a and b (B, *shape): at `share` of the angle, norms interpolated likewise; straight where parallel."""
    x, y = a.flatten(1), b.flatten(1)
    norms = x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
    cosine = ((x * y).sum(1, keepdim=True) / (norms[0] * norms[1]).clamp(min=1e-12)).clamp(-1, 1)
    angle = cosine.acos()
    sine = angle.sin()
    round_, straight = sine > 1e-4, torch.ones_like(sine)
    left = torch.where(round_, ((1 - share) * angle).sin() / torch.where(round_, sine, straight), 1 - share * straight)
    right = torch.where(round_, (share * angle).sin() / torch.where(round_, sine, straight), share * straight)
    unit = left * x / norms[0].clamp(min=1e-12) + right * y / norms[1].clamp(min=1e-12)
    between: Tensor = unit * ((1 - share) * norms[0] + share * norms[1])
    return between.view_as(a)
