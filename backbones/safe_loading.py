"""Reading other people's checkpoint files: no code runs, and what is wrong is said.

A pickle can name any function of any installed package. `torch.load(weights_only=True)` resolves a fixed list of names
only; what comes out is then held to plain values or to tensors, so that a surprise ends here and not in a network.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_prior.errors import CheckpointError
from ebm_prior.weights import require_finite

PLAIN = (str, int, float, bool, type(None))


def load_file(path: Path, content: str, *, allow: Sequence[Callable[..., Any]] = ()) -> Any:
    """The content of a torch file. `content` says what the file should hold, for the error message.

    `allow`: classes beyond torch's own list that the file may hold; they must do nothing but keep values. Where the
    format admits it the tensors are mapped from the file: what nobody reads takes no memory.
    """
    if not os.path.isfile(path):  # Path's own raises where a name is too long for the system
        raise CheckpointError(f"expected {content} in {path}, found no such file; copy the whole folder of the run")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(allow)):
            # official files are older than torch's present pickle protocol
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        found = (
            f"the name {refused[1]}, refused because loading it could run code; get the file from its source"
            if refused
            else f"a damaged file or another format ({type(error).__name__}); copy it again from its source"
        )
        raise CheckpointError(f"expected {content} in {path}, found {found}") from error


def load_plain(path: Path, content: str) -> Any:
    """Strings, numbers, booleans and None in lists and dicts with string keys; tuples become lists."""
    return _plain(load_file(path, content), path)


def _plain(value: Any, path: Path) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v, path) for v in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(v, path) for key, v in value.items()}
    if isinstance(value, PLAIN):
        return value
    raise CheckpointError(
        f"expected plain values in {path}, found {type(value).__name__}; this is not the file it claims"
    )


def load_tensors(path: Path, content: str) -> dict[str, Tensor]:
    """A state dict: dense tensors by name, the floating-point ones finite."""
    return tensors_of(load_file(path, content), path, content)


def tensors_of(state: Any, path: Path, content: str) -> dict[str, Tensor]:
    """`state`, from the file at `path`, as a state dict: dense tensors by name, the floating-point ones finite."""
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided for k, v in state.items()
    ):
        raise CheckpointError(f"expected {content} in {path}, found something else than a dict of dense tensors")
    require_finite(state, path)
    return dict(state)
