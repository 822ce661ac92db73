"""Isolation from the global settings of torch: default dtype and device, modes, and the global random state.

A caller may have set torch's default dtype to bfloat16 for a language model, or be inside `torch.inference_mode()`. The
content of files and the numbers drawn from a seed must not depend on that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ebm_prior.errors import ConfigurationError

PRECISIONS = (torch.float32, torch.float64)
"""Precisions of parameters. bfloat16 is possible only for the cells of a network (see `load_backbone`)."""


@contextlib.contextmanager
def isolated(*, grad: bool | None = None) -> Iterator[None]:
    """Inside the block, torch has the settings of a fresh process; afterwards those of the caller are restored.

    Default dtype float32, default device cpu, neither inference mode nor autocast; deterministic mode only warns where
    an operation has no such implementation; torch's global random state is restored. `grad`: whether gradients are
    recorded; None keeps the caller's choice, with inference mode counted as no. Can be used as a decorator too. These
    settings belong to the process: one thread at a time may be inside, or the results of both are in doubt.
    """
    with contextlib.ExitStack() as stack:
        _modes(stack, grad)
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
            stack.callback(torch.use_deterministic_algorithms, True)
            torch.use_deterministic_algorithms(True, warn_only=True)
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        yield


def _modes(stack: contextlib.ExitStack, grad: bool | None) -> None:
    inference = torch.is_inference_mode_enabled()
    if inference:  # only then: leaving it also turns gradients on
        stack.enter_context(torch.inference_mode(False))
    if grad is not None or inference:
        stack.enter_context(torch.set_grad_enabled(bool(grad)))
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))


def require_precision(dtype: torch.dtype) -> None:
    """Raise ConfigurationError where parameters of this dtype are not supported."""
    if dtype not in PRECISIONS:
        raise ConfigurationError(
            f"expected parameters in float32 or float64, found {str(dtype).removeprefix('torch.')}: use the backbone's "
            ".float(); for the cells of a network in bfloat16 load it with dtype=torch.bfloat16 (--precision bf16)"
        )


def require_numbers(device: torch.device | str) -> None:
    """Raise ConfigurationError for an unknown device, and for "meta", where tensors have shapes but no numbers."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigurationError(f"expected a device as torch names it, cpu or cuda:0; found {device!r}") from error
    if kind == "meta":
        raise ConfigurationError(
            "the device meta holds shapes and no numbers, so that nothing can be computed on it: expected cpu, or a "
            "GPU as cuda or cuda:0"
        )
