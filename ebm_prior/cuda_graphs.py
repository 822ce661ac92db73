"""CUDA graphs: what a GPU does for one step of its chains, recorded once and replayed without the host in between.

A step is thousands of small kernels, which a host launches more slowly than a GPU runs them unless batches are large. A
function is recorded at the second call with inputs of the same shapes: the first one warms the libraries up, and the
noise that it draws is kept, as the memory into which later calls draw theirs. Weights are read where they are, so that
a replay follows changes in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ebm_prior.randomness import Generator, Source, standard_normal, uniform

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
    """A function recorded for inputs of one form, with the noise of a tape."""

    def __init__(self, function: Function, inputs: Any, tape: Tape, pool: Any) -> None:
        """`pool`: of memory, which graphs share that are replayed one after another."""
        self._tape, self._inputs = tape, tree_map(torch.clone, inputs)
        tape.rewind()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._results = function(self._inputs, tape)

    def __call__(self, inputs: Any, generator: Generator) -> Any:
        """What the function makes of other inputs and noise."""
        for memory, tensor in zip(tree_leaves(self._inputs), tree_leaves(inputs), strict=True):
            memory.copy_(tensor)
        self._tape.refill(generator)
        self._graph.replay()
        return tree_map(torch.clone, self._results)  # before the next replay overwrites them


class Graphs:
    """The graphs of functions of one owner, by name and shapes. Where one cannot be recorded all run without."""

    def __init__(self) -> None:
        self._met: dict[Hashable, Tape | Graph] = {}  # a tape: met once
        self._pool: Any = None
        self._broken = False

    def run(self, name: Hashable, function: Function, inputs: Any, generator: Generator = None) -> Any:
        """`function(inputs, generator)`, by replay from the second call of this name with these shapes on."""
        if self._broken:
            return function(inputs, generator)
        key = name, tuple(tensor.shape for tensor in tree_leaves(inputs))
        met = self._met.get(key)
        if met is None:
            met = self._met[key] = Tape(generator)
            return function(inputs, met)
        if isinstance(met, Tape):
            try:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                met = self._met[key] = Graph(function, inputs, met, self._pool)
            except RuntimeError as error:
                self._broken = True
                warnings.warn(f"runs without CUDA graphs, slower: {str(error).splitlines()[0]}", stacklevel=2)
                return function(inputs, generator)
        return met(inputs, generator)
