"""Checks of the image side: the likelihood and the observation that it models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ebm_prior.compute.randomness import BlockGenerator, Generator
from ebm_prior.testing.case import Case, close, given_eps, random_state


def likelihood(case: Case) -> Iterator[str]:
    """mean and samples are images in [0, 1], log_prob is (B,) finite nats, and neither draws noise unasked."""
    backbone, images = case.backbone, case.images
    features = given_eps(backbone, case.eps).features
    before = random_state(images.device)
    distribution = backbone.likelihood(features)
    mean, log_prob = distribution.mean, distribution.log_prob(images)
    yield from _image("likelihood.mean", mean, case)
    if log_prob.shape != (len(images),):
        yield f"likelihood.log_prob has shape {tuple(log_prob.shape)}, expected ({len(images)},): sum over pixels"
    elif not log_prob.isfinite().all():
        yield "likelihood.log_prob is not finite for images that observe returned"
    again = backbone.likelihood(features)
    if not torch.equal(before, random_state(images.device)) or not close(again.mean, mean):
        yield "likelihood draws noise for mean or log_prob: only sample may"
        return
    sample = distribution.sample(generator=case.generator(6))
    yield from _image("likelihood.sample", sample, case)
    if not torch.equal(before, random_state(images.device)):
        yield "likelihood.sample ignores its generator and draws from torch's global one"
    elif not close(sample, distribution.sample(generator=case.generator(6))):
        yield "likelihood.sample is not reproducible: equal generators gave different samples"
    else:
        yield from _takes_blocks("likelihood.sample", lambda g: distribution.sample(generator=g), case)


def observation(case: Case) -> Iterator[str]:
    """`observe` keeps shape and range, and all of its randomness comes from its generator."""
    backbone = case.backbone
    images = case.images
    before = random_state(images.device)
    seen = backbone.observe(images, generator=case.generator(6))
    yield from _image("observe", seen, case)
    if not torch.equal(before, random_state(images.device)):
        yield "observe ignores its generator and draws from torch's global one"
    elif not close(seen, backbone.observe(images, generator=case.generator(6))):
        yield "observe is not reproducible: equal generators gave different images"
    else:
        yield from _takes_blocks("observe", lambda g: backbone.observe(images, generator=g), case)


def _takes_blocks(what: str, draw: Callable[[Generator], Tensor], case: Case) -> Iterator[str]:
    """Randomness works with one generator per block of samples, so that image i is the same for any batching."""
    try:
        draw(BlockGenerator(case.seed, 0, len(case.images), case.images.device))
    except (TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        yield (
            f"{what} takes no BlockGenerator, draw through ebm_prior.compute.randomness.uniform or standard_normal: "
            f"{reason}"
        )


def _image(what: str, found: Tensor, case: Case) -> Iterator[str]:
    if found.shape != case.images.shape:
        yield f"{what} has shape {tuple(found.shape)}, expected (B, *image_shape) = {tuple(case.images.shape)}"
    elif not found.isfinite().all():
        yield f"{what} is not finite"
    elif found.min() < 0 or found.max() > 1:
        clip = ", or, where its head has no sigmoid, clip mean and not what log_prob uses (GaussianPixels: clip=True)"
        yield (
            f"{what} lies in [{found.min():.4g}, {found.max():.4g}], outside [0, 1]: rescale it in the likelihood"
            f"{clip if what == 'likelihood.mean' else ''}"
        )
