"""State dicts in the forms that people store: wrapped names, averaged weights beside plain ones, missing counts.

Where a file leaves something open, the likeliest reading is taken, with an AssumptionWarning.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ebm_prior.backbones.safe_loading import tensors_of
from torch import Tensor

from ebm_prior.errors import AssumptionWarning, CheckpointError, ConfigurationError, few

PLAIN = ("state_dict", "model_state_dict", "model")
AVERAGED = ("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema_params", "averaged")
INSIDE = ("shadow", "params", "module", *PLAIN)
"""The names under which an average stores its tensors, beside its decay and its count of updates."""
UNREAD = ("num_batches_tracked",)
"""Ends of the names of batch-norm entries that are not used after training."""
CHOICES = ("plain", "ema")


def remark(text: str) -> None:
    """Give an AssumptionWarning about a file that leaves something open."""
    warnings.warn(text, AssumptionWarning, stacklevel=3)


def weights_of(content: Any, path: Path, what: str, choice: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file under the names that the network itself has.

    content: the content of the file at `path`, described by `what`: a state dict, or a dict that holds one, perhaps
    with averaged weights beside it. choice: "plain" or "ema"; None takes the plain weights, with a remark if there are
    both. An average of the parameters alone is completed by the plain batch statistics. Raises CheckpointError, and
    ConfigurationError for a choice that the file does not offer.
    """
    if choice not in (None, *CHOICES):
        raise ConfigurationError(f"weights: expected one of {', '.join(CHOICES)}, found {choice!r}: --set weights=ema")
    plain, average = _entry(content, PLAIN), _entry(content, AVERAGED)
    if choice == "ema" and average is None:
        raise ConfigurationError(
            f"weights=ema: {path} holds no averaged weights under any of the names {', '.join(AVERAGED)}; leave the "
            "option out"
        )
    if plain is None and average is not None and choice is None:
        remark(f"{path.name} holds averaged weights alone ({average}), which were taken")
        choice = "ema"
    if choice != "ema":
        if plain is not None and average is not None and choice is None:
            remark(
                f"{path.name} holds plain and averaged weights ({average}): the plain ones ({plain}) were taken; "
                "for the others convert it with --set weights=ema"
            )
        return bare(tensors_of(content if plain is None else content[plain], path, what), path)
    averaged = bare(tensors_of(_average(content[average]), path, f"averaged {what.removeprefix('the ')}"), path)
    averaged.pop("n_averaged", None)
    rest = {} if plain is None else bare(tensors_of(content[plain], path, what), path)
    lacking = [key for key in rest if key not in averaged]
    if lacking and averaged.keys() <= rest.keys():
        remark(f"the averaged weights of {path.name} lack {few(lacking, most=3)}: taken from the plain ones")
        return {key: averaged.get(key, tensor) for key, tensor in rest.items()}
    return averaged


def holds_weights(content: Any) -> bool:
    """Whether a file holds, beside other things, a state dict under one of the usual names."""
    return _entry(content, (*PLAIN, *AVERAGED)) is not None


def _entry(content: Any, names: tuple[str, ...]) -> str | None:
    """The first of `names` under which a dict holds another dict; None if there is none."""
    if not isinstance(content, dict) or any(isinstance(value, Tensor) for value in content.values()):
        return None
    return next((name for name in names if isinstance(content.get(name), dict)), None)


def _average(entry: Mapping[Any, Any]) -> Any:
    """The tensors of an average, which may lie one level deeper."""
    if any(isinstance(value, Tensor) for value in entry.values()):
        # torch's AveragedModel counts its updates beside the tensors of the module
        return {key: value for key, value in entry.items() if key != "n_averaged"}
    return next((entry[name] for name in INSIDE if isinstance(entry.get(name), dict)), entry)


def bare(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors without the prefixes of wrappers: module., _orig_mod., model., also several after another.

    `_orig_mod` is removed anywhere in a name, because torch.compile puts it before the part that it compiled. No
    network here consists of a single part, so a prefix that all names share comes from a wrapper.
    """
    names = {key: [part for part in key.split(".") if part != "_orig_mod"] for key in state}
    wrapped: list[str] = []
    while names and len({parts[0] for parts in names.values()}) == 1 and all(len(p) > 1 for p in names.values()):
        wrapped.append(next(iter(names.values()))[0])
        names = {key: parts[1:] for key, parts in names.items()}
    if len(state) == 1:  # of one tensor nothing can be said
        return dict(state)
    found = {".".join(parts): state[key] for key, parts in names.items()}
    if len(found) < len(state):
        raise CheckpointError(f"expected each tensor once in {path}, found some both with and without _orig_mod")
    if any("_orig_mod" in key.split(".") for key in state):
        wrapped.append("_orig_mod")
    if wrapped:
        listed = few([f"{name}." for name in wrapped], most=5)
        remark(f"the names in {path.name} were taken without the wrappers' {listed}")
    return found


def completed(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, completed by the batch counts that old files lack; they are zeros, since nothing uses them."""
    lacking = {key: t for key, t in expected.items() if key not in state and key.endswith(UNREAD)}
    return {**state, **{key: torch.zeros(t.shape, dtype=t.dtype, device="cpu") for key, t in lacking.items()}}
