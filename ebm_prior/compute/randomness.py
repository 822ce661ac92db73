"""Reproducible randomness: generators derived from (seed, purpose), and work cut into blocks of samples.

Image i of a run must not depend on batching, chunking or the number of processes. So samples are drawn in fixed blocks
of `BLOCK`. Each block has a torch.Generator of its own, derived from (seed, block number), and chunks are whole blocks.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

BLOCK = 64


class Purpose(IntEnum):
    """The purpose of a stream of random numbers: the word after the seed in `derived_seed`.

    The numbers must never change, because then the same seed would give other priors. Two purposes share a number only
    if no run uses both (`tests/compute/test_randomness.py` lists these pairs).
    """

    INITIAL_WEIGHTS = 0
    PRETRAIN_INITIALISATION = 1  # the first batch, where the network's initial weights depend on the data
    PRETRAIN_DROPOUT = 2
    PRETRAIN_BATCH = 3
    CLASSIFIER_WEIGHTS = 0
    CLASSIFIER_SHIFT = 1
    CLASSIFIER_MIRROR = 2
    GAUGE_FOLDS = 0  # for the first set of latents; + 1 for the second
    GAUGE_WEIGHTS = 2
    GAUGE_SUBSETS = 3
    HEADS = 10
    FIT_BATCH = 11
    FIT_DROPOUT = 12
    HELD_OUT_POSTERIOR = 13
    HELD_OUT_SPLIT = 14
    MOMENTS = 15
    HELD_OUT_PRIOR = 16
    TYPICAL_NORM = 17
    STAGE_START = 18
    STAGE_SETTLING = 19
    STAGE_ANNEALING = 20
    EVALUATION_CHOICE = 20
    EVALUATION_POSTERIOR = 21
    GROUP_NORMALISERS = 22
    SAMPLER_IMAGES = 23
    SAMPLER_DRAWS = 24
    JOINT_HEADS = 30
    JOINT_INITIALISATION = 31
    JOINT_FIRST_POSTERIOR = 32
    JOINT_DROPOUT = 33
    JOINT_BATCH = 34
    VALIDATION_POSTERIOR = 35
    VALIDATION_PRIOR = 36
    OUTLIER_CHOICE = 40
    ANOMALY_SPLIT = 40
    DOCTOR_CHOICE = 50
    DOCTOR_POSTERIOR = 51
    DOCTOR_PRIOR = 52
    DOCTOR_NULL = 53
    LATENTS_2D = 50
    KERNEL_ROWS = 60
    PICTURE_CHAIN = 60
    PICTURE_CHOICE = 61
    PICTURE_POSTERIOR = 62
    PICTURE_LOWER = 63
    COMPLETION = 64
    ANNEALING_PILOT = 70
    ANNEALING = 71
    ANNEALING_POSTERIOR = 72
    DIAGNOSIS = 73
    LIKELIHOOD_CHOICE = 74
    BLOCK = 0xB10C
    BATCH_NORM = 0xBA7C
    ELBO = 0xE1B0
    SCORES = 0x5C03E
    EPOCH = 0xE90C4


class Source(ABC):
    """A source of random numbers that can take the place of a torch.Generator."""

    @abstractmethod
    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal of `shape`."""

    @abstractmethod
    def uniform(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uniform on [0, 1) of `shape`."""


def chunks(n: int, size: int) -> list[tuple[int, int]]:
    """Number of the first sample and count of samples of each chunk of n: `size` rounded down to whole blocks.

    A chunk has at least one block; the last one ends at n.
    """
    whole = max(BLOCK, size // BLOCK * BLOCK)
    return [(first, min(whole, n - first)) for first in range(0, n, whole)]


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
            derived_generator(seed, Purpose.BLOCK, block, device=device)
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


class Rows(Source):
    """The `rows` of the draws of another source, which draws for all of its `count` samples each time.

    So what a sample gets depends neither on the other rows nor on their number.
    """

    def __init__(self, generator: Generator, count: int, rows: Tensor) -> None:
        self._generator, self._count, self._rows = generator, count, rows

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal (rows, *shape[1:])."""
        return standard_normal((self._count, *shape[1:]), self._generator, dtype=dtype, device=device)[self._rows]

    def uniform(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uniform on [0, 1), (rows, *shape[1:])."""
        return uniform((self._count, *shape[1:]), self._generator, dtype=dtype, device=device)[self._rows]


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
    """A 63-bit seed from a tuple of non-negative integers; nearby tuples give unrelated seeds.

    Trailing zeros do not count: (7,) and (7, 0) give the same seed. So tuples of different lengths must differ in an
    earlier number.
    """
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def derived_generator(*words: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch.Generator seeded from a tuple of integers, e.g. (seed, iteration): nothing to save for a resume."""
    return torch.Generator(device=device).manual_seed(derived_seed(*words))
