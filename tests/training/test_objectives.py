"""Objectives and held-out gain as identities; their optima in closed form are in test_exactness.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.training.objectives import Gain, gain, mle_loss, nce_loss, temper

NOTHING = Gain(0.0, 1.0, 0.0)


def values(n: int, mean: float, std: float, seed: int) -> Tensor:
    return mean + std * torch.randn(n, generator=derived_generator(50, seed), dtype=torch.float64)


def test_nce_is_the_cross_entropy_of_telling_posterior_from_prior() -> None:
    f_q, f_p = values(30, 1.0, 2.0, 0), values(30, -1.0, 2.0, 1)
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.cat([f_q, f_p]), torch.cat([torch.ones(30), torch.zeros(30)]).double(), reduction="sum"
    )
    torch.testing.assert_close(nce_loss(f_q, f_p), cross_entropy / 30)
    assert float(nce_loss(torch.zeros(5), torch.zeros(7))) == pytest.approx(2 * math.log(2))
    assert math.isfinite(float(nce_loss(torch.tensor([-1e4]), torch.tensor([1e4]))))


def test_noise_of_weight_3_counts_three_times() -> None:
    """As if each prior draw were there three times, and the classes told apart by f − log 3; M = 1 is equal in bits."""
    f_q, f_p = values(30, 1.0, 2.0, 0), values(30, -1.0, 2.0, 1)
    logits, labels = torch.cat([f_q, f_p.repeat(3)]) - math.log(3), torch.cat([torch.ones(30), torch.zeros(90)])
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double(), reduction="sum")
    torch.testing.assert_close(nce_loss(f_q, f_p, 3.0), cross_entropy / 30)
    pairs = [tensor.clone().requires_grad_() for tensor in (f_q, f_p)]
    plain = torch.nn.functional.softplus(-pairs[0]).mean() + torch.nn.functional.softplus(pairs[1]).mean()
    assert torch.equal(nce_loss(*pairs, 1.0), plain)
    for found, expected in zip(
        torch.autograd.grad(nce_loss(*pairs, 1.0), pairs), torch.autograd.grad(plain, pairs), strict=True
    ):
        assert torch.equal(found, expected)


def test_mle_gradient_is_the_difference_of_mean_gradients() -> None:
    """−∇loss = E_q[∇f] − E_p[∇f] for f = ⟨θ, φ⟩, whatever θ and the batch sizes are; the penalty adds 2c·E[f∇f]."""
    theta = values(3, 0.0, 1.0, 2).requires_grad_()
    phi_q, phi_p = values(60, 0.5, 1.0, 3).view(20, 3), values(90, 0.0, 1.0, 4).view(30, 3)
    (plain,) = torch.autograd.grad(mle_loss(phi_q @ theta, phi_p @ theta), theta)
    torch.testing.assert_close(-plain, phi_q.mean(0) - phi_p.mean(0))
    (penalised,) = torch.autograd.grad(mle_loss(phi_q @ theta, phi_p @ theta, penalty=0.3), theta)
    added = sum(((phi @ theta.detach())[:, None] * phi).mean(0) for phi in (phi_q, phi_p))
    torch.testing.assert_close(penalised - plain, 0.6 * added)


def test_gain_by_hand() -> None:
    f_q, f_p = torch.tensor([1.0, 3.0]), torch.tensor([math.log(1.0), math.log(3.0)])
    assert gain(f_q, f_p) == (pytest.approx(2 - math.log(2)), pytest.approx((4**2 / 10) / 2), 1.0)
    assert gain(f_q, f_p, 0.0) == pytest.approx(NOTHING)
    assert gain(f_q + 1e4, f_p + 1e4).nats == pytest.approx(gain(f_q, f_p).nats, abs=1e-2)  # float32 in, no overflow


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shift=st.floats(-3, 3),
    spread_q=st.floats(0, 5),
    spread_p=st.floats(0, 5),
    floor=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 1000),
)
def test_tempering_never_harms_and_is_the_best_that_the_floor_allows(
    shift: float, spread_q: float, spread_p: float, floor: float, seed: int
) -> None:
    f_q, f_p = values(40, shift, spread_q, seed), values(50, 0.0, spread_p, seed + 5000)
    best = temper(f_q, f_p, ess_floor=floor)
    assert 0 <= best.tau <= 2
    assert best.nats >= -1e-12
    assert best.ess_fraction >= floor
    assert best == pytest.approx(gain(f_q, f_p, best.tau), abs=1e-12)
    grid = [gain(f_q, f_p, tau) for tau in torch.linspace(0, 2, 41).tolist()]
    assert best.nats >= max(g.nats for g in grid if g.ess_fraction >= floor) - 1e-9


def test_tempering_stops_at_the_floor() -> None:
    """f_p ~ N(0, 3²) and f_q far above: the gain grows with τ up to the floor, and the ESS fraction falls to it."""
    f_q, f_p = values(2_000, 9.0, 3.0, 6), values(20_000, 0.0, 3.0, 7)
    floors = [0.02, 0.1, 0.3]
    results = [temper(f_q, f_p, ess_floor=floor) for floor in floors]
    assert [r.ess_fraction for r in results] == pytest.approx(floors, rel=1e-3)
    assert results[0].tau > results[1].tau > results[2].tau > 0
    assert results[0].nats > results[1].nats > results[2].nats > 0
    # ESS fraction e^{−9τ²} for Gaussian f_p
    assert results[2].tau == pytest.approx(math.sqrt(-math.log(0.3)) / 3, rel=0.03)


def test_tempering_is_limited_above() -> None:
    f_q, f_p = values(100, 0.3, 0.01, 8), values(100, 0.0, 0.01, 9)
    assert temper(f_q, f_p).tau == pytest.approx(2.0)
    assert temper(f_q, f_p, largest=1.0).tau == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_f_that_is_useless_or_not_finite_is_switched_off(bad: float) -> None:
    f_q, f_p = values(200, 1.0, 1.0, 10), values(200, 0.0, 1.0, 11)
    assert temper(f_q, f_p).tau > 0.5
    assert temper(-f_q, -f_p) == NOTHING  # the wrong way round
    assert temper(f_p, f_q) == NOTHING
    spoiled = torch.cat([f_q[:-1], torch.tensor([bad])])
    assert temper(spoiled, f_p) == NOTHING
    assert temper(f_p, spoiled) == NOTHING


def test_an_untrained_f_has_no_gain() -> None:
    assert temper(torch.zeros(10), torch.zeros(20)) == NOTHING
