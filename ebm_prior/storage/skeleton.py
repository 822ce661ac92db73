"""Networks without memory, to compare the network that a file describes with the tensors that it holds.

The network is built on the device "meta", where tensors have names and shapes only. A record from an unknown source
may describe an enormous network, so building stops as soon as it goes far beyond the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from ebm_prior.compute.isolation import isolated
from ebm_prior.errors import CheckpointError, ConfigurationError, EbmPriorError
from ebm_prior.model.backbone import Backbone
from ebm_prior.storage.weights import check_state

Kind = TypeVar("Kind", bound=Backbone)

FILLS = {"normal_", "uniform_", "trunc_normal_", "fill_", "zero_", "copy_", "add_", "sub_", "mul_", "div_"} | {
    name for name in dir(torch.nn.init) if name.endswith("_") and not name.startswith("_")
}
"""In-place operations that write numbers and change no shape. On the device meta they can be skipped."""

SPARE_TENSORS, SPARE_NUMBERS = 1_000, 1_000_000
"""What a network may hold beyond four times its file: masks, constants, and tensors registered twice."""


class _Unfilled(TorchFunctionMode):
    """Skips filling of tensors on meta, for which torch would import modules for seconds, to no effect."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FILLS:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_larger_than(tensors: Mapping[str, Tensor], path: Path, *, allocates: bool = True) -> Iterator[None]:
    """Inside the block, building a network far larger than the `tensors` of the file at `path` raises CheckpointError.

    `allocates`: whether to limit the count of numbers too, and not only the count of tensors.
    """
    numbers = 4 * sum(tensor.numel() for tensor in tensors.values()) + SPARE_NUMBERS
    count = 4 * len(tensors) + SPARE_TENSORS

    def seen(module: Any, name: str, tensor: Tensor | None) -> None:
        nonlocal numbers, count
        numbers, count = numbers - (tensor.numel() if tensor is not None and allocates else 0), count - 1
        if numbers < 0 or count < 0:
            raise CheckpointError(
                f"{path} describes a network far larger than the {len(tensors)} tensors that it holds "
                f"({type(module).__name__}.{name} goes beyond it): the file is broken, copy or make it again"
            )

    hooks = [register_module_parameter_registration_hook(seen), register_module_buffer_registration_hook(seen)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@isolated()
def skeleton(kind: type[Kind], architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Kind:
    """The network `kind(**architecture)` on the device "meta". `tensors`: those of the file at `path`, by any name.

    Raises ConfigurationError for an architecture that `kind` refuses, and CheckpointError for one that it cannot build,
    or that is far larger than the file.
    """
    try:
        with no_larger_than(tensors, path, allocates=False), torch.device("meta"), _Unfilled():
            return kind(**architecture)
    except EbmPriorError:
        raise
    except Exception as error:  # an adapter can raise nearly anything over a foreign architecture
        if reads_numbers(error):
            raise
        raise unbuildable(kind, path, error) from error


def reads_numbers(error: Exception) -> bool:
    """Whether a constructor looked into its own tensors, which on meta have no numbers."""
    return not isinstance(error, EbmPriorError) and isinstance(error, RuntimeError) and "meta" in str(error)


def unbuildable(kind: type[Backbone], path: Path, error: Exception) -> CheckpointError:
    """The error for a file with an architecture that cannot be built."""
    found = str(error) if isinstance(error, EbmPriorError) else f"{type(error).__name__}: {str(error)[:300]}"
    return CheckpointError(f"{path} describes an architecture that {kind.__name__} cannot build: {found}")


@isolated()
def build_described(
    kind: type[Kind], architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> Kind:
    """The network `kind(**architecture)` with initial weights, after its names and shapes were compared with `tensors`.

    Raises CheckpointError where they differ. A constructor that reads its own numbers cannot be compared beforehand.
    """
    try:
        check_state(tensors, skeleton(kind, architecture, tensors, path).state_dict(), path)
    except ConfigurationError as error:
        raise unbuildable(kind, path, error) from error
    except RuntimeError as error:
        if not reads_numbers(error):
            raise
    try:
        with no_larger_than(tensors, path):
            return kind(**architecture)
    except CheckpointError:
        raise
    except Exception as error:
        raise unbuildable(kind, path, error) from error
