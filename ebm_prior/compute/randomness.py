"""Reproducible randomness: generators derived from (seed, purpose), and work cut into blocks of samples.

Image i of a run must be the same for any batching, chunking or number of processes. So samples are drawn in fixed
blocks of `BLOCK`, each with its own torch.Generator derived from (seed, block number), and chunks are whole blocks.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
_PURPOSE = 0xB10C  # keeps blocks apart from every other (seed, small number): see `derived_seed`


class Source(ABC):
    """What stands where a torch.Generator does."""

    @abstractmethod
    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal of `shape`."""

    @abstractmethod
    def uniform(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uniform on [0, 1) of `shape`."""


class BlockGenerator(Source):
    """The source of a chunk of samples made of several blocks.

    Block b's rows come from b's own generator, derived from (seed, b): `first` is the index of the chunk's first
    sample in the run, a multiple of `BLOCK`; `count` its number of samples.
    """

    def __init__(self, seed: int, first: int, count: int, device: torch.device | str = "cpu") -> None:
        if first % BLOCK:
            raise ValueError(f"a chunk starts at a multiple of {BLOCK} samples, found {first}")
        self._count = count
        self._generators = [
            derived_generator(seed, _PURPOSE, block, device=device)
            for block in range(first // BLOCK, -(-(first + count) // BLOCK))
        ]

    def rows(self, draw: Sequence[Tensor]) -> Tensor:
        """Join the blocks' rows and drop those past the chunk's end (the last block may be partly used)."""
        return torch.cat(list(draw))[: self._count]

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal (count, *shape[1:])."""
        block = (BLOCK, *shape[1:])
        return self.rows([torch.randn(block, generator=g, dtype=dtype, device=device) for g in self._generators])

    def uniform(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uniform on [0, 1), (count, *shape[1:])."""
        block = (BLOCK, *shape[1:])
        return self.rows([torch.rand(block, generator=g, dtype=dtype, device=device) for g in self._generators])


Generator = torch.Generator | Source | None
"""Where randomness comes from: one generator, another source, or torch's global generator (None)."""


def standard_normal(shape: Sequence[int], generator: Generator, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """N(0, 1) of `shape`; axis 0 is the batch."""
    if isinstance(generator, Source):
        return generator.normal(shape, dtype, device)
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device)


def uniform(shape: Sequence[int], generator: Generator, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """U[0, 1) of `shape`; axis 0 is the batch."""
    if isinstance(generator, Source):
        return generator.uniform(shape, dtype, device)
    return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=device)


@contextlib.contextmanager
def seeded(device: torch.device, *words: int) -> Iterator[None]:
    """Seed torch's global generators inside the block (initial weights, dropout), and put them back after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(*words))
        yield


def derived_seed(*words: int) -> int:
    """A 63-bit seed from a tuple of non-negative integers, well mixed: nearby tuples give unrelated seeds.

    Trailing zeros do not count, (7,) and (7, 0) are one: tuples of different lengths must differ in a word before.
    """
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def derived_generator(*words: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch.Generator seeded from a tuple of integers, e.g. (seed, iteration): nothing to save for a resume."""
    return torch.Generator(device=device).manual_seed(derived_seed(*words))
