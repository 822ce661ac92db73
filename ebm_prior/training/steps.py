"""Pieces of a gradient step that the trainings share: batches, learning rates, the moving average, finite checks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ebm_prior.compute.randomness import Purpose, derived_generator
from ebm_prior.errors import DivergenceError

# Largest E_q[f] − E_p[f] in nats; beyond it the energy explodes. In a fit the gap is KL(q‖p) + KL(p‖q) of the latents.
# In joint training the limit is ten times smaller, because chains lose track of the energy that much earlier.
FIT_GAP_LIMIT, JOINT_GAP_LIMIT = 1e4, 1e3
# Largest ‖ε‖/√D of chains, as a multiple of the posterior's (or of 1, if that is larger; it is 1 ± 1/√(2D) under p_β).
# Chains beyond it have left the region of the data. Joint training needs a wider limit, since its backbone still
# changes.
FIT_NORM_LIMIT, JOINT_NORM_LIMIT = 1.2, 3.0


def batch_indices(n: int, batch_size: int, iteration: int, seed: int) -> Tensor:
    """Indices of the images of iteration t, (B,) int64: entries [t·B, (t+1)·B) of the sequence of shuffled epochs."""
    first, last = iteration * batch_size, (iteration + 1) * batch_size
    epochs = range(first // n, -(-last // n))
    order = torch.cat([_order(n, seed, epoch) for epoch in epochs])
    return order[first - epochs[0] * n : last - epochs[0] * n]


@lru_cache(maxsize=2)  # the epoch is the same for many iterations
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=derived_generator(seed, Purpose.EPOCH, epoch))


def scheduled_rate(peak: float, iteration: int, iterations: int, *, warmup: float, decay: bool) -> float:
    """The learning rate of an iteration (counted from 0): a linear warm-up to `peak` and, with `decay`, a cosine to 0.

    `warmup`: the number of iterations over which the rate rises. Warm-up and cosine multiply.
    """
    rate = peak * min(1.0, (iteration + 1) / max(1.0, warmup))
    if decay:
        rate *= 0.5 * (1 + math.cos(math.pi * iteration / iterations))
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group, multiplied by the group's "peak" where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("peak", 1.0)


def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the parameters after step `step`, counted from 0. Buffers are copied.

    In early steps the decay is smaller than `decay`, so that the initial weights are forgotten soon.
    """
    _average(average.parameters(), network.parameters(), min(decay, (1 + step) / (10 + step)))
    _copy(average.buffers(), network.buffers())


class MovingAverage:
    """The exponential moving average of a network's parameters and buffers; a copy of them until it has settled.

    The tensors are listed once, since listing those of a large network takes longer than averaging them on a GPU.
    """

    def __init__(self, average: nn.Module, network: nn.Module) -> None:
        """`average`: a copy of `network`, which `update` changes in place."""
        kept, found = (chain(module.parameters(), module.buffers()) for module in (average, network))
        self._pairs = _by_kind(kept, found)

    @torch.no_grad()
    def update(self, decay: float, *, settled: bool) -> None:
        """average ← decay · average + (1 − decay) · network, in place; without `settled` a copy."""
        for kept, found in self._pairs:
            if settled:
                _lerp(kept, found, decay)
            else:
                torch._foreach_copy_(kept, found)


@torch.no_grad()
def _average(kept: Iterable[Tensor], found: Iterable[Tensor], decay: float) -> None:
    """kept ← decay · kept + (1 − decay) · found, in place."""
    for pair in _by_kind(kept, found):
        _lerp(*pair, decay)


def _lerp(kept: list[Tensor], found: list[Tensor], decay: float) -> None:
    """The same for tensors that are all of floating point, or none of them."""
    get_ema_multi_avg_fn(decay)(kept, found, None)  # type: ignore[no-untyped-call]


def _by_kind(kept: Iterable[Tensor], found: Iterable[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Tensors of floating point and others apart: numbers of batches, say, are averaged and cut to whole ones."""
    pairs = list(zip(kept, found, strict=True))
    chosen = ([pair for pair in pairs if pair[0].is_floating_point() == floating] for floating in (True, False))
    return [([held for held, _ in kind], [new for _, new in kind]) for kind in chosen if kind]


@torch.no_grad()
def _copy(kept: Iterable[Tensor], found: Iterable[Tensor]) -> None:
    for held, new in zip(kept, found, strict=True):
        held.copy_(new)


def require_finite(what: str, iteration: int, *values: Tensor) -> None:
    """Raise DivergenceError, which names `what`, where one of the scalars `values` is not finite."""
    if not bool(torch.stack([value.to(values[0]) for value in values]).isfinite().all()):
        raise DivergenceError(f"{what} is not finite at iteration {iteration}")


def require_gap(gap: float, limit: float) -> None:
    """Raise DivergenceError where E_q[f] − E_p[f] exceeds `limit` nats: the energy explodes."""
    if abs(gap) > limit:
        raise DivergenceError(
            f"the energy's gap between posterior and prior latents is {gap:.3g} nats, above {limit:g}"
        )


def require_typical(chain_norm: float, limit: float, iteration: int, beside: str) -> None:
    """Raise DivergenceError where ‖ε‖/√D of chains exceeds `limit`; the message gives `beside` for comparison."""
    if not chain_norm <= limit:
        raise DivergenceError(
            f"chains left the typical set at iteration {iteration}: ‖ε‖/√D {chain_norm:.3g}, {beside}"
        )
