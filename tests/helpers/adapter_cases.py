"""What the tests that all adapters share need to know of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ebm_prior.model.backbone import Backbone


class Official(NamedTuple):
    """The format of an adapter's official code."""

    write: Callable[..., Path]
    """`write(folder)` writes a small checkpoint as that code does and gives what --ckpt takes. `state`: its weights."""
    written: Callable[[], Backbone]  # the network that `write` wrote
    state: Callable[[], dict[str, Tensor]]  # its weights as `write` takes them, by their official names
    files: tuple[str, ...]  # what is read in the folder
    references: Mapping[str, Path] = {}  # checkpoints that the official code itself wrote, by name


class AdapterCase(NamedTuple):
    """An adapter with small networks of it."""

    kind: type[Backbone]
    networks: Mapping[str, Callable[[], Backbone]]  # as if trained, in eval mode; the first has everything in it
    wrong: tuple[dict[str, Any], str]  # options that cannot be built, and what is said of them
    official: Official | None = None  # None: it reads no format but the own
