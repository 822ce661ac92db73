"""Pieces of a gradient step that the trainings share: batches and the moving average of the weights."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ebm_prior.compute.randomness import Purpose, derived_generator


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the parameters; a young one forgets faster, so as not to remember its start.

    Buffers are copied.
    """
    decay = min(decay, (1 + step) / (10 + step))
    fused = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    fused(list(average.parameters()), list(network.parameters()), step)
    for held, found in zip(average.buffers(), network.buffers(), strict=True):
        held.copy_(found)


def batch_indices(n: int, batch_size: int, iteration: int, seed: int) -> Tensor:
    """The images of iteration t: entries [t·B, (t+1)·B) of an endless row of shuffled epochs, (batch_size,) int64."""
    first, last = iteration * batch_size, (iteration + 1) * batch_size
    epochs = range(first // n, -(-last // n))
    order = torch.cat([_order(n, seed, epoch) for epoch in epochs])
    return order[first - epochs[0] * n : last - epochs[0] * n]


@lru_cache(maxsize=2)  # the epoch is the same for many iterations
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=derived_generator(seed, Purpose.EPOCH, epoch))
