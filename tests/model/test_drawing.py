"""Chains that leave the typical set begin anew, and draw i still depends on (seed, i) alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toys import ToyConv

from ebm_prior.compute.randomness import BlockGenerator, Rows, derived_generator, standard_normal
from ebm_prior.errors import DivergenceError
from ebm_prior.model import drawing
from ebm_prior.model.drawing import RESTARTS, draw
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import Potential, SamplerConfig
from ebm_prior.model.samples import refusals

D, LIMIT = 50, 1.3
CHAIN = SamplerConfig(proposals=1, kernel="langevin", steps=12, step_size=0.05)
GUARDED = replace(CHAIN, norm_limit=LIMIT)


def outward(eps: Sequence[Tensor]) -> Tensor:
    """A potential whose chains run away, but stay finite, once the first coordinate is above 2."""
    return 2 * (eps[0][:, 0] > 2) * eps[0].square().sum(1)


def drawn(potential: Potential, config: SamplerConfig, n: int, chunk: int = 64) -> drawing.Sampled:
    """n chains in chunks."""
    parts = []
    for first in range(0, n, chunk):
        count = min(chunk, n - first)
        generator = BlockGenerator(4, first, count)
        parts.append(draw(potential, proposals(generator, count), config, generator))
    eps = [torch.cat([part.eps[0] for part in parts])]
    return drawing.Sampled(eps, *(torch.cat(column) for column in zip(*(part[1:] for part in parts), strict=True)))


def proposals(generator: BlockGenerator, count: int) -> Callable[[], list[Tensor]]:
    return lambda: [standard_normal((count, D), generator, dtype=torch.float64, device=torch.device("cpu"))]


def test_chains_that_leave_begin_anew_and_others_stay_as_they_are() -> None:
    free, kept = drawn(outward, replace(CHAIN, norm_limit=1e300), 256), drawn(outward, GUARDED, 256)
    left = ~(free.norm <= LIMIT)
    assert 0.05 < left.double().mean() < 0.4
    assert torch.equal(kept.restarts > 0, left)
    assert bool((kept.norm <= LIMIT).all())
    assert torch.equal(kept.eps[0][~left], free.eps[0][~left])
    assert len(kept.eps[0].unique(dim=0)) == 256  # no two chains share their noise
    assert refusals(kept.norm, kept.restarts, LIMIT) == {"restarted": int(left.sum()), "beyond_limit": 0}


@pytest.mark.parametrize("chunk", [128, 192, 256])
def test_what_is_begun_anew_depends_on_seed_and_index_alone(chunk: int) -> None:
    for one, other in zip(drawn(outward, GUARDED, 230), drawn(outward, GUARDED, 230, chunk), strict=True):
        for a, b in zip(*((x if isinstance(x, list) else [x]) for x in (one, other)), strict=True):
            assert torch.equal(a, b)


def test_rows_are_those_of_the_whole_draw() -> None:
    rows = torch.tensor([5, 70, 5])
    shape, how = (3, 4), {"dtype": torch.float32, "device": torch.device("cpu")}
    whole = standard_normal((100, 4), BlockGenerator(1, 0, 100), **how)
    assert torch.equal(standard_normal(shape, Rows(BlockGenerator(1, 0, 100), 100, rows), **how), whole[rows])


def test_the_nearest_of_hopeless_chains_is_kept_and_counted() -> None:
    def away(eps: Sequence[Tensor]) -> Tensor:
        return 0.6 * eps[0].square().sum(1)

    kept = drawn(away, replace(GUARDED, norm_limit=0.5), 64)
    assert refusals(kept.norm, kept.restarts, 0.5) == {"restarted": 64, "beyond_limit": 64}
    assert torch.equal(kept.restarts, torch.full((64,), float(RESTARTS), dtype=torch.float64))
    free = drawn(away, replace(CHAIN, norm_limit=1e300), 64)
    assert bool((kept.norm <= free.norm).all())
    assert bool((kept.norm < free.norm).any())


def test_a_chain_that_is_never_finite_ends_the_draw() -> None:
    def nowhere(eps: Sequence[Tensor]) -> Tensor:
        return math.inf * eps[0].sum(1)

    with pytest.raises(DivergenceError, match="64 of 64 chains left the finite numbers within 12 steps"):
        drawn(nowhere, GUARDED, 64)


def test_a_prior_samples_alike_in_any_chunks_and_says_what_it_refused() -> None:
    backbone = ToyConv().eval().requires_grad_(False)
    energy = JointEnergy(backbone.groups, EnergyConfig(channels=4, hidden=8, joint=8))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in energy.parameters():
            parameter.data += torch.randn_like(parameter)
    prior = EBMPrior(backbone, energy, regime="refiner", sampler=replace(CHAIN, norm_limit=1.1))
    one, other = prior.sample(200, chunk=64), prior.sample(200, chunk=200)
    assert torch.equal(one.images, other.images)
    assert 0 < refusals(one.norm, one.restarts, 1.1)["restarted"] < 200
    assert torch.equal(one.restarts, other.restarts)
    lower = prior.complete([z[:64] for z in one.z[:1]])
    assert bool((lower.norm[lower.restarts > 0] < 2).all())


def test_generators_of_torch_do_as_well() -> None:
    generator = derived_generator(7)
    found = draw(outward, lambda: [torch.randn(200, D, generator=generator, dtype=torch.float64)], GUARDED, generator)
    assert bool((found.norm <= LIMIT).all())
    assert int((found.restarts > 0).sum()) > 5
