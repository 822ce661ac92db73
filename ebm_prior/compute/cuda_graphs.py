"""CUDA graphs: the GPU work of one step of the chains is recorded once and then replayed without the host.

A step consists of thousands of small kernels. Unless batches are large, the host launches them more slowly than the GPU
runs them. The first call of a function runs normally and remembers its noise buffers. The second call with inputs of
the same shapes records the graph. Later calls refill the buffers with new noise and replay. A replay reads the weights
at the addresses they had during the recording, so weights may change only in place. The memory that a function needs at
its peak stays reserved as long as its graph exists.
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
"""(tree of tensors, source of noise) -> tree of tensors. Pure, and never reads a number back from the device."""


class Tape(Source):
    """A source of noise that remembers its buffers. After `rewind` it returns the same buffers again, in order."""

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
        """From now on return the stored buffers, from the first one on, instead of drawing noise."""
        self._next, self._generator = 0, None

    def refill(self, generator: Generator) -> None:
        """Draw new noise into the stored buffers, in the order of the recording."""
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
    """A function recorded for inputs of fixed shapes, types and device, with the noise buffers of a tape."""

    def __init__(self, function: Function, inputs: Any, tape: Tape, where: Place) -> None:
        """Record `function`. Raises RuntimeError where that is impossible, e.g. because it waits for the device."""
        self._tape, self._inputs = tape, tree_map(torch.clone, inputs)
        self._graph = torch.cuda.CUDAGraph()
        with where.aside():
            tape.rewind()
            with _refusing_to_wait():  # a trial run first: an interrupted recording leaves torch in a broken state
                function(self._inputs, tape)
            tape.rewind()
            with torch.cuda.graph(self._graph, pool=where.pool, stream=where.stream):
                self._results = function(self._inputs, tape)

    def __call__(self, inputs: Any, generator: Generator) -> Any:
        """The function's results for other inputs of the same shapes, and other noise."""
        for memory, tensor in zip(tree_leaves(self._inputs), tree_leaves(inputs), strict=True):
            memory.copy_(tensor)
        self._tape.refill(generator)
        self._graph.replay()
        return tree_map(torch.clone, self._results)  # copies, because the next replay overwrites the results


class Place:
    """A stream of a device and a memory pool, shared by graphs that are replayed one after another."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run the block on the stream: after all work queued before it, and before all work queued later."""
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.set_stream(before)  # an interrupted recording does not restore the stream itself
            before.wait_stream(self.stream)


class Graphs:
    """The graphs of an owner's functions, by name and kind of inputs. If one cannot be recorded, no graph is used."""

    def __init__(self) -> None:
        self._met: dict[Hashable, Tape | Graph] = {}  # a tape after the first call, then a graph
        self._places: dict[torch.device, Place] = {}
        self._broken = False

    def run(self, name: Hashable, function: Function, inputs: Any, generator: Generator = None) -> Any:
        """The value of `function(inputs, generator)`; from the second call with such name and inputs on by replay."""
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
        """Record a function that was called once, with the noise of its tape; None where it cannot be recorded."""
        try:
            if device not in self._places:
                self._places[device] = Place(device)
            self._met[key] = graph = Graph(function, inputs, tape, self._places[device])
            return graph
        except RuntimeError as error:  # also when memory runs out
            reason = str(error).splitlines()[0]
        self._broken = True
        self._met.clear()  # frees the memory that the graphs reserve
        self._places.clear()
        warnings.warn(f"runs without CUDA graphs, slower: {reason}", stacklevel=3)
        return None


def runner(device: torch.device) -> Callable[[Hashable, Function, Any, Generator], Any]:
    """A way to call functions on `device`: through CUDA graphs of the caller's own on a GPU, directly elsewhere.

    It takes a name, the function, its inputs and a generator, as `Graphs.run` does.
    """
    if device.type == "cuda":
        return Graphs().run
    return lambda name, function, inputs, generator: function(inputs, generator)


@contextlib.contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Inside the block, an operation that makes the host wait for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
