"""Resuming from a saved state, after checking that it fits the training; one error names everything that does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from ebm_prior.errors import CheckpointError, few, shown


class Resumable(Protocol):
    """The methods of a training that a resume needs."""

    optimizer: Optimizer

    @property
    def iterations(self) -> int:
        """The number of iterations after which training ends."""

    def state(self) -> Mapping[str, Any]:
        """A copy of everything that changes."""

    def translated(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state of an earlier version with the names of this one."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""


def resume(training: Resumable, state: Mapping[str, Any]) -> None:
    """Restore a saved `state` in `training`.

    Raises CheckpointError where the state has other entries or shapes than the training's own state, an iteration
    beyond its end, or numbers out of range, as a state of another version may.
    """
    state = training.translated(state)
    wrong = [*_unlike(state, training.state(), ""), *_beyond(training, state)]
    if not wrong:
        wrong += _unfit_moments(training, state)
    failure: Exception | None = None
    if not wrong:
        try:
            training.restore(state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            failure, wrong = error, [f"{type(error).__name__}: {error}".splitlines()[0][:300]]
    if wrong:
        raise CheckpointError(
            f"the resume state (state.pt) is of another run or of another version of ebm-prior: {few(wrong)}; "
            "copy it again, go on with the version that wrote it, or start anew with --overwrite"
        ) from failure


def _unlike(found: Any, own: Any, where: str) -> Iterator[str]:
    """Entries of `found` that differ in kind from the training's `own` state; empty entries match any kind."""
    if own is None or (isinstance(own, (dict, list)) and not own):
        return
    if isinstance(own, Tensor):
        if not isinstance(found, Tensor):
            yield f"{where} expected a tensor, found {shown(found)}"
        elif found.shape != own.shape or found.is_floating_point() != own.is_floating_point():
            expected = f"{own.dtype} {tuple(own.shape)}"
            yield f"{where} expected {expected}, found {found.dtype} {tuple(found.shape)}"
    elif isinstance(own, Mapping):
        if not isinstance(found, Mapping):
            yield f"{where} expected its parts, found {shown(found)}"
            return
        for key in own:
            if key not in found:
                yield f"{where}{key} is missing"
            else:
                yield from _unlike(found[key], own[key], f"{where}{key}.")
        if not where:
            yield from (f"{shown(key)} is unknown" for key in found if key not in own)
    elif isinstance(own, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(own):
            yield f"{where} expected {len(own)} entries, found {shown(found)}"
            return
        for index, (theirs, ours) in enumerate(zip(found, own, strict=True)):
            yield from _unlike(theirs, ours, f"{where}{index}.")
    elif isinstance(own, (bool, str)):
        if type(found) is not type(own):
            yield f"{where} expected {type(own).__name__}, found {shown(found)}"
    elif isinstance(own, (int, float)) and (isinstance(found, bool) or not isinstance(found, (int, float))):
        yield f"{where} expected a number, found {shown(found)}"


def _beyond(training: Resumable, state: Mapping[str, Any]) -> Iterator[str]:
    """Descriptions of the numbers in a state that are out of their range."""
    for key, most in (("iteration", training.iterations), ("rollbacks", 10**6)):
        value = state.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            yield f"{key} expected a whole number from 0 to {most:,}, found {shown(value)}"
    rate = state.get("rate")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (0 < rate <= 1 and math.isfinite(rate)):
        yield f"rate expected a number above 0 and at most 1, found {shown(rate)}"


def _unfit_moments(training: Resumable, state: Mapping[str, Any]) -> Iterator[str]:
    """Optimizer moments with another shape than their parameter, which torch would notice only at the next step."""
    saved = state.get("optimizer")
    if not isinstance(saved, Mapping):
        return
    shapes = [tuple(parameter.shape) for group in training.optimizer.param_groups for parameter in group["params"]]
    moments = saved.get("state")
    if not isinstance(moments, Mapping) or any(key not in range(len(shapes)) for key in moments):
        yield f"optimizer.state expected entries 0 to {len(shapes) - 1}, found {shown(moments)}"
        return
    for key, entry in moments.items():
        if not isinstance(entry, Mapping):
            yield f"optimizer.state.{key} expected moments, found {shown(entry)}"
            continue
        for name, value in entry.items():
            if isinstance(value, Tensor) and tuple(value.shape) not in ((), shapes[key]):
                yield f"optimizer.state.{key}.{name} expected {shapes[key]}, found {tuple(value.shape)}"


def require_shapes(what: str, found: Sequence[Tensor], expected: Sequence[Sequence[int]]) -> None:
    """Tensors of a state must have the `expected` shapes, or ValueError names them."""
    shapes, wanted = ([tuple(each) for each in some] for some in ([t.shape for t in found], expected))
    if shapes != wanted:
        raise ValueError(f"{what} expected the shapes {few(wanted)}, found {few(shapes)}")
