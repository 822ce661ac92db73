"""CUDA graphs: what a GPU does for one step of its chains, recorded once and replayed without the host in between.

A step is thousands of small kernels, which a host launches more slowly than a GPU runs them unless batches are large. A
function is recorded at the second call with inputs of one kind: the noise that the first one draws is kept, as the
memory into which later calls draw theirs. Weights are read where they are, so that a replay follows changes in place,
and no others. What a function takes of memory at its peak stays reserved while its graph lives.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ebm_prior.compute.randomness import Generator, Source, standard_normal, uniform

Function = Callable[[Any, Generator], Any]
"""Of a tree of tensors and a source of noise to a tree of tensors: pure, and never waiting for a number."""


class Tape(Source):
    """Stands where a Generator does: keeps what it draws from one and, rewound, hands out the same memory in order."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._kept: list[tuple[Callable[..., Tensor], Tensor]] = []
        self._next: int | None = None  # None: recording

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal of `shape`."""
        return self._take(standard_normal, shape, dtype, device)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uniform on [0, 1) of `shape`."""
        return self._take(uniform, shape, dtype, device)

    def rewind(self) -> None:
        """From now on hand out what was drawn, from the beginning."""
        self._next, self._generator = 0, None

    def refill(self, generator: Generator) -> None:
        """Draw all of it anew, in the order of the recording."""
        for draw, memory in self._kept:
            memory.copy_(draw(memory.shape, generator, dtype=memory.dtype, device=memory.device))

    def _take(
        self, draw: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        if self._next is None:
            self._kept.append((draw, draw(shape, self._generator, dtype=dtype, device=device)))
            return self._kept[-1][1]
        self._next += 1
        return self._kept[self._next - 1][1]


class Graph:
    """A function recorded for inputs of one kind, with the noise of a tape."""

    def __init__(self, function: Function, inputs: Any, tape: Tape, where: Place) -> None:
        """Raises RuntimeError where the function cannot be recorded: it waits for the device, say."""
        self._tape, self._inputs = tape, tree_map(torch.clone, inputs)
        self._graph = torch.cuda.CUDAGraph()
        with where.aside():
            tape.rewind()
            with _refusing_to_wait():  # tried first: a recording that is broken off leaves torch's state in disorder
                function(self._inputs, tape)
            tape.rewind()
            with torch.cuda.graph(self._graph, pool=where.pool, stream=where.stream):
                self._results = function(self._inputs, tape)

    def __call__(self, inputs: Any, generator: Generator) -> Any:
        """What the function makes of other inputs and noise."""
        for memory, tensor in zip(tree_leaves(self._inputs), tree_leaves(inputs), strict=True):
            memory.copy_(tensor)
        self._tape.refill(generator)
        self._graph.replay()
        return tree_map(torch.clone, self._results)  # before the next replay overwrites them


class Place:
    """Where graphs are recorded that are replayed one after another: a stream of a device, and shared memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream, after all that was asked of the device before and before all that is asked after."""
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.set_stream(before)  # which a recording that is broken off does not do
            before.wait_stream(self.stream)


class Graphs:
    """The graphs of one owner's functions, by name and kind of inputs. Where one cannot be recorded all run without."""

    def __init__(self) -> None:
        self._met: dict[Hashable, Tape | Graph] = {}  # a tape: met once
        self._places: dict[torch.device, Place] = {}
        self._broken = False

    def run(self, name: Hashable, function: Function, inputs: Any, generator: Generator = None) -> Any:
        """`function(inputs, generator)`, by replay from the second call of this name with inputs of this kind on."""
        leaves = tree_leaves(inputs)
        key = name, tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in leaves)
        met = self._met.get(key)
        if met is None and not self._broken:
            tape = Tape(generator)
            found = function(inputs, tape)
            self._met[key] = tape
            return found
        if isinstance(met, Tape):
            met = self._recorded(key, function, inputs, met, leaves[0].device)
        return function(inputs, generator) if met is None else met(inputs, generator)

    def _recorded(
        self, key: Hashable, function: Function, inputs: Any, tape: Tape, device: torch.device
    ) -> Graph | None:
        """The graph of what was met once; None where there can be none."""
        try:
            if device not in self._places:
                self._places[device] = Place(device)
            self._met[key] = graph = Graph(function, inputs, tape, self._places[device])
            return graph
        except RuntimeError as error:  # out of memory, too
            reason = str(error).splitlines()[0]
        self._broken = True
        self._met.clear()  # with all the memory that graphs keep
        self._places.clear()
        warnings.warn(f"runs without CUDA graphs, slower: {reason}", stacklevel=3)
        return None


def runner(device: torch.device) -> Callable[[Hashable, Function, Any, Generator], Any]:
    """`Graphs.run` of its own for a GPU; elsewhere what calls a function and is done."""
    if device.type == "cuda":
        return Graphs().run
    return lambda name, function, inputs, generator: function(inputs, generator)


@contextlib.contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Whatever makes the host wait for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
