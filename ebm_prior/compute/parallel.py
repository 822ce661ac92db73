"""One run in several processes: each computes a share of the work, and then all processes have all results.

    torchrun --nproc-per-node N -m ebm_prior fit|pretrain|sample|eval …

Every process runs the same program with the same settings. The work is shared by `Processes.map` over items, and the
result of an item never depends on the process that computes it. Items are chunks of samples, parts of a batch, or
batches of held-out images. So a run gives the same bits with any number of processes on machines of one kind. Results
(gradients, moved chains, samples) are exchanged through the hosts (gloo), even on GPUs: most of them are small.

A share may take as long as it takes. That the other processes are alive is known from their signs of life
(`ebm_prior.compute.heartbeat`). The processes need no disk in common: the first one alone reads and writes a run's
folder.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ebm_prior.compute.heartbeat import Heartbeat, State
from ebm_prior.errors import EbmPriorError, ProcessError, Stopped

Item = TypeVar("Item")
Result = TypeVar("Result")
LONG = timedelta(days=1000)  # time-out of an exchange: that a process works slowly is no reason to end


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count`. Only the first one writes files and prints."""

    rank: int = 0
    count: int = 1
    heartbeat: Heartbeat | None = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def lost(self) -> str | None:
        """What has happened to a process that is lost, in one line; None as long as all others work."""
        return self.heartbeat.lost if self.heartbeat else None

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function` of every item, in order: each process computes a contiguous share, and all get all results.

        All processes must call it with the same items. An EbmPriorError in one process is raised in all. Tensors on a
        GPU arrive on the current GPU of each process. Raises ProcessError where another process has ended.
        """
        if self.count == 1:
            return [function(item) for item in items]
        results, failure = self._computed(function, items)
        shares = self._exchange((results, failure))
        _raise_first(failure for _, failure in shares)
        return [result for found, _ in shares for result in found]

    def gather(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`map` for the first process, which alone gets the results, one after another; the others get an empty list.

        For results that are large, or that only the first process needs.
        """
        if self.count == 1:
            return [function(item) for item in items]
        results, failure = self._computed(function, items)
        _raise_first(self._exchange(failure))
        if not self.first:
            for result in results:
                with self._connected():
                    dist.send_object_list([_packed(result)], dst=0)
            return []
        for rank in range(1, self.count):
            for _ in range(*self._share(len(items), rank)):
                sent: list[Any] = [None]
                with self._connected():
                    dist.recv_object_list(sent, src=rank)
                results.append(_unpacked(sent[0]))
        return results

    def total(self, function: Callable[[Item], list[Any]], items: Sequence[Item]) -> list[Any]:
        """The sum over all items of the lists of tensors that `function` returns, tensor by tensor.

        It is taken in the order of the items, so its bits do not depend on the number of processes. A single process
        holds one result beside the sum. Some tensors may be None in all lists.
        """
        return reduce(_plus, map(function, items) if self.count == 1 else self.map(function, items))

    def of_first(self, make: Callable[[], Result]) -> Result:
        """The result of `make`, which only the first process calls; all processes get it."""
        return self.map(lambda _: make(), range(1))[0]

    def _share(self, items: int, rank: int) -> tuple[int, int]:
        """The first item of a process's share, and the one after its last."""
        return -(-items * rank // self.count), -(-items * (rank + 1) // self.count)

    def _computed(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> tuple[list[Result], EbmPriorError | None]:
        """The results of this process's share, or the error that ended it."""
        begin, end = self._share(len(items), self.rank)
        try:
            return [function(item) for item in items[begin:end]], None
        except EbmPriorError as error:
            return [], error

    def _exchange(self, own: Any) -> list[Any]:
        """Hand `own` to every process; returns the values of all processes, by rank."""
        found: list[Any] = [None] * self.count
        with self._connected():
            dist.all_gather_object(found, _packed(own))
        return [own if rank == self.rank else _unpacked(sent) for rank, sent in enumerate(found)]

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Turn a broken connection inside the block into a ProcessError that says why it has broken."""
        try:
            yield
        except RuntimeError as error:  # gloo's
            raise self._broken(str(error).splitlines()[0]) from error

    def _broken(self, reason: str) -> ProcessError:
        """The error for a broken connection."""
        found = self.heartbeat.found() if self.heartbeat else None
        speaks = self.heartbeat is None or self.heartbeat.speaks
        return ProcessError(
            found or f"one of the {self.count} processes of this run no longer answers, so all end ({reason})",
            repeated=not speaks,
        )


ALONE = Processes()
"""The processes of a run that has only one."""
_launched: list[Processes] = []  # the processes that `launched` has connected, if it has


def _raise_first(failures: Iterable[EbmPriorError | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise failure


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(sent: bytes) -> Any:
    return torch.load(io.BytesIO(sent), map_location=_here, weights_only=False)


def _plus(total: list[Tensor | None], other: list[Tensor | None]) -> list[Tensor | None]:
    """`other` added to `total`, tensor by tensor, in place."""
    torch._foreach_add_(*([tensor for tensor in each if tensor is not None] for each in (total, other)))
    return total


@contextlib.contextmanager
def launched() -> Iterator[Processes]:
    """The processes that torchrun has started, connected if they were not yet; without torchrun, this process alone.

    Raises ProcessError where they cannot be connected, and in place of Stopped where one of them was killed: torchrun
    then stops the others.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE
        return
    if dist.is_initialized():  # by an outer block, or by the program, whose own time-out then holds
        yield _launched[0] if _launched else Processes(dist.get_rank(), dist.get_world_size())
        return
    try:
        dist.init_process_group("gloo", timeout=LONG)
        rank, count = dist.get_rank(), dist.get_world_size()
        heartbeat = Heartbeat(rank, count)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"the processes that torchrun started cannot reach one another: {str(error).splitlines()[0]}"
        ) from error
    _launched.append(Processes(rank, count, heartbeat))
    try:
        with _leaving(heartbeat):
            yield _launched[0]
    finally:
        _launched.clear()
        dist.destroy_process_group()


@contextlib.contextmanager
def _leaving(heartbeat: Heartbeat) -> Iterator[None]:
    """Tell the other processes how the block has ended."""
    try:
        yield
    except Stopped as stopped:
        heartbeat.leave(State.STOPPED)
        if heartbeat.killed:
            raise ProcessError(str(heartbeat.lost), repeated=not heartbeat.speaks) from stopped
        raise
    except BaseException as error:
        done = isinstance(error, SystemExit) and not error.code
        heartbeat.leave(State.DONE if done else State.FAILED)
        raise
    heartbeat.leave(State.DONE)


def own_device(name: str) -> str:
    """The device of this process for the user's device `name`: each of several processes has a GPU of its own."""
    if name != "cuda" or not (dist.is_available() and dist.is_initialized()):
        return name
    torch.cuda.set_device(dist.get_node_local_rank())
    return f"cuda:{dist.get_node_local_rank()}"


def _here(storage: Any, location: str) -> Any:
    """Put a tensor that another process sent from its GPU on this process's current GPU (`map_location`)."""
    return storage.cuda() if location.startswith("cuda") else storage
