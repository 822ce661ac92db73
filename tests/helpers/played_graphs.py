"""A CUDA graph where there is no GPU: its replay is played by the function itself."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ebm_prior.compute.cuda_graphs import Function, Graph, Place, Tape


class Played(Graph):
    """A graph whose replay calls the function on the memory that a GPU's would read, and writes where it would."""

    recorded = 0

    def __init__(self, function: Function, inputs: Any, tape: Tape, where: Place) -> None:
        self._tape, self._inputs, self._function = tape, tree_map(torch.clone, inputs), function
        self._graph: Any = self
        tape.rewind()
        self._results = tree_map(torch.clone, function(self._inputs, tape))
        Played.recorded += 1

    def replay(self) -> None:
        self._tape.rewind()
        for memory, new in zip(
            tree_leaves(self._results), tree_leaves(self._function(self._inputs, self._tape)), strict=True
        ):
            memory.copy_(new)
