"""One run in several processes: each computes a share of the work, and then all processes have all results.

    torchrun --nproc-per-node N -m ebm_prior fit|pretrain|sample|eval …

Every process runs the same program with the same settings. The work is shared by `Processes.map` over items, and the
result of an item never depends on the process that computes it. Items are chunks of samples, parts of a batch, or
batches of held-out images. So a run gives the same bits with any number of processes on machines of one kind. Results
(gradients, moved chains, samples) are exchanged through the hosts (gloo), even on GPUs: most of them are small.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ebm_prior.errors import EbmPriorError, ProcessError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count`. Only the first one writes files and prints."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function` of every item, in order: each process computes a contiguous share, and all get all results.

        All processes must call it with the same items. An EbmPriorError in one process is raised in all. Tensors on a
        GPU arrive on the current GPU of each process. Raises ProcessError where another process has ended.
        """
        if self.count == 1:
            return [function(item) for item in items]
        begin, end = (-(-len(items) * rank // self.count) for rank in (self.rank, self.rank + 1))
        results: list[Result] = []
        failure: EbmPriorError | None = None
        try:
            results = [function(item) for item in items[begin:end]]
        except EbmPriorError as error:
            failure = error
        shares = self._exchange((results, failure))
        failures = [error for _, error in shares if error is not None]
        if failures:
            raise failures[0]
        return [result for found, _ in shares for result in found]

    def total(self, function: Callable[[Item], list[Any]], items: Sequence[Item]) -> list[Any]:
        """The sum over all items of the lists of tensors that `function` returns, tensor by tensor.

        It is taken in the order of the items, so its bits do not depend on the number of processes. A single process
        holds one result beside the sum. Some tensors may be None in all lists.
        """
        return reduce(_plus, map(function, items) if self.count == 1 else self.map(function, items))

    def of_first(self, make: Callable[[], Result]) -> Result:
        """The result of `make`, which only the first process calls; all processes get it."""
        return self.map(lambda _: make(), range(1))[0]

    def _exchange(self, own: Any) -> list[Any]:
        """Hand `own` to every process; returns the values of all processes, by rank."""
        buffer = io.BytesIO()
        torch.save(own, buffer)
        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, buffer.getvalue())
        except RuntimeError as error:  # gloo's connection has broken
            raise ProcessError(
                f"another of the {self.count} processes of this run has ended, so this one (number {self.rank}) ends, "
                "too. See what it said; a fit goes on from its last state with --resume"
            ) from error
        return [
            own if rank == self.rank else torch.load(io.BytesIO(sent), map_location=_here, weights_only=False)
            for rank, sent in enumerate(found)
        ]


ALONE = Processes()
"""The processes of a run that has only one."""


def _plus(total: list[Tensor | None], other: list[Tensor | None]) -> list[Tensor | None]:
    """`other` added to `total`, tensor by tensor, in place."""
    torch._foreach_add_(*([tensor for tensor in each if tensor is not None] for each in (total, other)))
    return total


@contextlib.contextmanager
def launched() -> Iterator[Processes]:
    """The processes that torchrun has started, connected if they were not yet; without torchrun, this process alone.

    Raises ProcessError where they cannot be connected.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE
        return
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"the processes that torchrun started cannot reach one another: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> str:
    """The device of this process for the user's device `name`: each of several processes has a GPU of its own."""
    if name != "cuda" or not (dist.is_available() and dist.is_initialized()):
        return name
    torch.cuda.set_device(dist.get_node_local_rank())
    return f"cuda:{dist.get_node_local_rank()}"


def _here(storage: Any, location: str) -> Any:
    """Put a tensor that another process sent from its GPU on this process's current GPU (`map_location`)."""
    return storage.cuda() if location.startswith("cuda") else storage
