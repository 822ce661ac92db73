"""Memory of this machine: how much is free, and the peak that a piece of work takes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], object]) -> int:
    """The largest number of bytes that tensors made by `run` take at one time.

    Temporary memory inside a single operation is not counted.
    """
    living = _Living()
    with living:
        run()
    return living.most


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of all living tensor storages, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0  # bytes: the peak so far, and at present
        self._known: dict[int, int] = {}  # bytes by the storage's identity

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, old=True)
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            self._meet(tensor)
        return found

    def _meet(self, tensor: Any, *, old: bool = False) -> None:
        if not isinstance(tensor, Tensor) or id(storage := tensor.untyped_storage()) in self._known:
            return
        self._known[id(storage)] = 0 if old else storage.nbytes()
        self._now += self._known[id(storage)]
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._end, id(storage)).atexit = False

    def _end(self, identity: int) -> None:
        self._now -= self._known.pop(identity)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device, for one of the processes that torchrun has started here; None where it is unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    found = [_available(), _left_in_container()]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min((free // here for free in found if free is not None), default=None)


def _available(path: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that Linux can give to a program without swapping; None where it does not say."""
    try:
        lines = dict(line.split(":") for line in path.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _left_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a container (cgroup v2) may still take; None without a limit. Cached files count as free."""
    try:
        most, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
        return most - used + int(cached)
    except (OSError, ValueError, KeyError):  # "max": no limit
        return None
