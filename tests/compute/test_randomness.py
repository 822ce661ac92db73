"""Sample i of a run depends on (seed, i) alone; derived seeds are distinct; epochs are complete."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebm_prior.compute.randomness import (
    BLOCK,
    BlockGenerator,
    Purpose,
    derived_generator,
    derived_seed,
    standard_normal,
    uniform,
)
from ebm_prior.training.steps import batch_indices

CPU = torch.device("cpu")


def draws(generator: BlockGenerator, count: int) -> list[Tensor]:
    """A row of draws of all kinds, as a sampler makes them one after another."""
    normal = {"dtype": torch.float32, "device": CPU}
    return [
        standard_normal((count, 3), generator, **normal),
        uniform((count,), generator, **normal),
        standard_normal((count, 2, 1, 5), generator, dtype=torch.float64, device=CPU),
        standard_normal((count, 3), generator, **normal),
    ]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=st.integers(1, 400), blocks=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_rows_depend_on_seed_and_index_alone(n: int, blocks: int, seed: int) -> None:
    """Bitwise: chunks of any number of blocks, joined, are the whole; the whole is the start of a longer run."""
    whole = draws(BlockGenerator(seed, 0, n), n)
    size = blocks * BLOCK
    counts = [min(size, n - first) for first in range(0, n, size)]
    chunks = [draws(BlockGenerator(seed, k * size, count), count) for k, count in enumerate(counts)]
    for joined, expected in zip(zip(*chunks, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(joined), expected)
    longer = draws(BlockGenerator(seed, 0, n + 70), n + 70)
    assert all(torch.equal(long[:n], short) for long, short in zip(longer, whole, strict=True))


def test_blocks_seeds_and_successive_draws_differ() -> None:
    first, _, _, again = draws(BlockGenerator(0, 0, 4 * BLOCK), 4 * BLOCK)
    other = draws(BlockGenerator(1, 0, 4 * BLOCK), 4 * BLOCK)[0]
    rows = torch.cat([first, again, other])
    assert len(rows.unique(dim=0)) == len(rows)


def test_draws_have_their_laws() -> None:
    """100,000 draws: mean and variance within 4.5 standard errors, uniforms in [0, 1)."""
    n = 100_000
    normal = standard_normal((n, 1), BlockGenerator(2, 0, n), dtype=torch.float64, device=CPU)
    flat = uniform((n, 1), BlockGenerator(3, 0, n), dtype=torch.float64, device=CPU)
    assert abs(float(normal.mean())) < 4.5 / n**0.5
    assert abs(float(normal.var()) - 1) < 4.5 * (2 / n) ** 0.5
    assert abs(float(flat.mean()) - 0.5) < 4.5 * (1 / 12 / n) ** 0.5
    assert 0 <= float(flat.min()) < float(flat.max()) < 1


def test_dtypes_and_plain_generators() -> None:
    for dtype in (torch.float32, torch.float64):
        assert standard_normal((5, 2), BlockGenerator(0, 0, 5), dtype=dtype, device=CPU).dtype == dtype
        expected = torch.randn(5, 2, generator=derived_generator(4), dtype=dtype)
        assert torch.equal(standard_normal((5, 2), derived_generator(4), dtype=dtype, device=CPU), expected)
    torch.manual_seed(5)
    expected = torch.rand(5, 2)
    torch.manual_seed(5)
    assert torch.equal(uniform((5, 2), None, dtype=torch.float32, device=CPU), expected)


def test_a_chunk_starts_at_a_block() -> None:
    with pytest.raises(ValueError, match="multiple of 64 samples, found 32"):
        BlockGenerator(0, 32, 10)


def test_derived_seeds_are_distinct_and_fit_a_generator() -> None:
    tuples = [(seed, purpose, number) for seed in range(20) for purpose in range(1, 20) for number in range(20)]
    seeds = {derived_seed(*words) for words in tuples}
    assert len(seeds) == len(tuples)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(3, 1, 4) == derived_seed(3, 1, 4)
    assert derived_seed(3, 1, 4) != derived_seed(1, 3, 4)
    bits = torch.tensor(sorted(seeds))[:, None] >> torch.arange(63) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 4.5 * 0.5 / len(seeds) ** 0.5).all()  # every bit is a fair coin


def test_blocks_of_samples_share_no_stream_with_training() -> None:
    """Block b of seed s is not the generator of (s, b) or (s, b, 0), which training uses for its iterations."""
    blocks = standard_normal((32 * BLOCK, 4), BlockGenerator(7, 0, 32 * BLOCK), dtype=torch.float32, device=CPU)
    for number in range(32):
        for words in [(7, number), (7, number, 0)]:
            other = torch.randn(BLOCK, 4, generator=derived_generator(*words))
            assert not (blocks.view(32, BLOCK, 4) == other).all(2).any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(1, 60), batch_size=st.integers(1, 130), seed=st.integers(0, 100))
def test_each_epoch_has_every_image_exactly_once(n: int, batch_size: int, seed: int) -> None:
    """The batches, end to end, are whole shuffles of the n images; also where a batch is larger than an epoch."""
    epochs = 4
    batches = [batch_indices(n, batch_size, t, seed) for t in range(-(-epochs * n // batch_size))]
    assert {len(batch) for batch in batches} == {batch_size}
    row = torch.cat(batches)[: epochs * n].view(epochs, n)
    assert torch.equal(row.sort(dim=1).values, torch.arange(n).expand(epochs, n))


def test_epochs_are_shuffled_anew_and_by_the_seed() -> None:
    rows = [batch_indices(200, 200, t, seed) for t in range(2) for seed in range(2)]
    assert len(torch.stack([*rows, torch.arange(200)]).unique(dim=0)) == 5
    assert torch.equal(batch_indices(200, 200, 1, 0), rows[2])


def test_a_purpose_has_a_number_of_its_own() -> None:
    """Two streams of one seed are the same where their numbers are: only what no run does both of may share one."""
    shared: dict[int, set[str]] = {}
    for name, purpose in Purpose.__members__.items():
        shared.setdefault(int(purpose), set()).add(name)
    assert [names for names in shared.values() if len(names) > 1] == [
        {"INITIAL_WEIGHTS", "CLASSIFIER_WEIGHTS", "GAUGE_FOLDS"},
        {"PRETRAIN_INITIALISATION", "CLASSIFIER_SHIFT"},
        {"PRETRAIN_DROPOUT", "CLASSIFIER_MIRROR", "GAUGE_WEIGHTS"},
        {"PRETRAIN_BATCH", "GAUGE_SUBSETS"},
        {"STAGE_ANNEALING", "EVALUATION_CHOICE"},
        {"OUTLIER_CHOICE", "ANOMALY_SPLIT"},
        {"DOCTOR_CHOICE", "LATENTS_2D"},
        {"KERNEL_ROWS", "PICTURE_CHAIN"},
    ]
