"""Batch-norm re-adjustment: running statistics of the generative path from the backbone's own samples.

The running statistics of a trained VAE come from posterior draws. Samples of p(z), in particular at another
temperature, have other feature statistics, and deep networks then make worse images (NVAE, §5.2). So the generator is
run in train mode on prior samples, and only the updated statistics are kept. No weight changes. With momentum m the old
statistics keep the weight (1 − m)^iterations, which is 7e-12 for NVAE's m = 0.05 and 500 iterations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ebm_prior.compute.randomness import Purpose, derived_generator
from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.backbone import Backbone

ITERATIONS, BATCH_SIZE = 500, 16  # as published


def readjust_batch_norm(
    backbone: Backbone,
    *,
    iterations: int = ITERATIONS,
    batch_size: int = BATCH_SIZE,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[str]:
    """Re-adjust the batch norms of `backbone` in place to `iterations` batches of samples of p_β at `temperature`.

    The backbone runs in float32 or better, and is in eval mode afterwards. progress: gets a remark every 100 batches.
    Returns the names of the re-adjusted layers, which are those on the generative path. Raises ConfigurationError where
    there are none, and DivergenceError where a statistic is not finite; the old statistics are then restored.
    """
    if iterations < 1 or batch_size < 2 or temperature <= 0:
        raise ConfigurationError(
            f"expected iterations >= 1, batch_size >= 2 and a positive temperature, found {iterations}, {batch_size}, "
            f"{temperature}"
        )
    like = next(backbone.parameters())
    dtype, device = like.dtype, like.device
    if torch.finfo(dtype).bits < 32:  # half precision would round away updates of 5 %
        backbone.float()

    def draws() -> Iterator[list[Tensor]]:
        for k in range(iterations):
            if k and k % 100 == 0:
                progress.remark(f"batch norms: {k} of {iterations} batches")
            yield backbone.standard_normal(
                batch_size, generator=derived_generator(seed, Purpose.BATCH_NORM, k, device=device)
            )

    try:
        return readjust_to(backbone, draws(), temperature=temperature)
    finally:
        backbone.to(dtype)


@torch.no_grad()
def readjust_to(backbone: Backbone, draws: Iterable[Sequence[Tensor]], *, temperature: float = 1.0) -> list[str]:
    """`readjust_batch_norm` on batches of ε that the caller draws, lists of (B, *group.shape) in the weights' dtype."""
    layers = adjustable(backbone)
    before = {name: {key: t.clone() for key, t in layer.named_buffers()} for name, layer in layers.items()}
    backbone.eval()  # dropout stays off
    for layer in layers.values():
        layer.train()
    try:
        with torch.autocast(next(backbone.parameters()).device.type, enabled=False):
            for eps in draws:
                backbone.likelihood(backbone.transform(eps, temperature=temperature).features)
        met = [name for name in layers if _count(layers[name]) > int(before[name]["num_batches_tracked"])]
        _require_finite({name: layers[name] for name in met})
    except BaseException:
        for name, layer in layers.items():
            layer.load_state_dict({**layer.state_dict(), **before[name]})
        raise
    finally:
        backbone.eval()
    if not met:
        raise _no_batch_norm(backbone)
    return met


@contextlib.contextmanager
def keeping_statistics(network: nn.Module) -> Iterator[None]:
    """Inside the block, batch norms in train mode use their running statistics and do not update them."""
    moving = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    for module in moving:
        module.eval()
    try:
        yield
    finally:
        for module in moving:
            module.train()


def adjustable(backbone: Backbone) -> dict[str, _BatchNorm]:
    """All batch norms with running statistics, by name. Raises ConfigurationError where the backbone has none."""
    layers = {name: m for name, m in backbone.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    if not layers:
        raise _no_batch_norm(backbone)
    return layers


def _no_batch_norm(backbone: Backbone) -> ConfigurationError:
    return ConfigurationError(
        f"{type(backbone).__name__} has no batch norm on its generative path: there is nothing to re-adjust"
    )


def _count(layer: nn.Module) -> int:
    return int(layer.get_buffer("num_batches_tracked"))


def _require_finite(layers: dict[str, nn.Module]) -> None:
    broken = [name for name, layer in layers.items() if not all(bool(t.isfinite().all()) for t in layer.buffers())]
    if broken:
        raise DivergenceError(
            f"batch-norm statistics are not finite after re-adjustment in {', '.join(broken[:5])}: "
            "nothing was changed; try a lower temperature"
        )
