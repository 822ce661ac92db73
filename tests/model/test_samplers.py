"""Samplers in ε-space: known laws at f = 0, detailed balance, adaptation, and refusal of what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from closed_form import P_LIMIT, Z_LIMIT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from torch import Tensor

from ebm_prior.compute.randomness import Generator, derived_generator
from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.model.drawing import draw
from ebm_prior.model.samplers import (
    JITTER,
    TARGET_ACCEPTANCE,
    ChainInfo,
    ChainState,
    SamplerConfig,
    effective_sample_size,
    langevin_step,
    norm,
    pcn_langevin_step,
    resample,
    run_chain,
    start,
)

SHAPES = ((3,), (2, 2, 2))  # 11 dimensions, in a vector and a map


def zero(eps: Sequence[Tensor]) -> Tensor:
    """f = 0, by way of every ε so that a gradient exists."""
    return torch.stack([0 * e.flatten(1).sum(1) for e in eps]).sum(0)


def normal(n: int, generator: torch.Generator, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn((n, *shape), generator=generator, dtype=torch.float64) for shape in shapes]


def steps_of(n: int, value: float) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


def entries(eps: Sequence[Tensor]) -> Tensor:
    return torch.cat([e.flatten() for e in eps])


def check_law(sample: Tensor, mean: float, variance: float) -> None:
    """Independent entries are N(mean, variance): moments within Z_LIMIT standard errors, and Kolmogorov-Smirnov."""
    n = len(sample)
    assert abs(float(sample.mean()) - mean) < Z_LIMIT * math.sqrt(variance / n)
    assert abs(float(sample.var()) - variance) < Z_LIMIT * variance * math.sqrt(2 / n)
    assert kstest(sample.numpy(), "norm", (mean, math.sqrt(variance))).pvalue > P_LIMIT


# With f = 0 every sampler returns N(0, I); the unadjusted one with its known bias.


def ula_variance(s: float, steps: int, temperature: float = 1.0) -> float:
    """Var ε_K of ε′ = (1−s)ε + √(2s)τξ from Var ε_0 = 1; it tends to τ²/(1 − s/2)."""
    stationary = temperature**2 / (1 - s / 2)
    return stationary + (1 - s) ** (2 * steps) * (1 - stationary)


EXACT = {
    "ancestral": SamplerConfig(proposals=1, steps=0),
    "sir-2": SamplerConfig(proposals=2, steps=0),
    "sir-32": SamplerConfig(proposals=32, steps=0),
    "pcn-langevin .05": SamplerConfig(proposals=1, steps=5, step_size=0.05),
    "pcn-langevin .5": SamplerConfig(proposals=1, steps=5, step_size=0.5),
    "pcn-langevin 2": SamplerConfig(proposals=1, steps=5, step_size=2.0),
    "pcn-langevin adapting": SamplerConfig(proposals=1, steps=20, step_size=0.3, adapt_steps=10),
    "sir then pcn-langevin": SamplerConfig(proposals=4, steps=3, step_size=0.15),
    "hamiltonian": SamplerConfig(proposals=1, steps=3, step_size=0.15, leapfrogs=4),
}
UNADJUSTED = {
    "langevin .5": SamplerConfig(proposals=4, kernel="langevin", steps=20, step_size=0.5),
    "langevin 1.5": SamplerConfig(proposals=1, kernel="langevin", steps=30, step_size=1.5),
    "langevin .2 cold": SamplerConfig(proposals=1, kernel="langevin", steps=20, step_size=0.2, temperature=0.7),
}


@pytest.mark.parametrize("name", EXACT | UNADJUSTED)
def test_without_an_energy_every_sampler_returns_the_reference(name: str) -> None:
    config = (EXACT | UNADJUSTED)[name]
    generator = derived_generator(1)
    drawn = draw(zero, lambda: normal(2_000, generator), config, generator)
    variance = ula_variance(config.step_size, config.steps, config.temperature) if name in UNADJUSTED else 1.0
    check_law(entries(drawn.eps), 0.0, variance)
    assert (drawn.acceptance == 1).all()
    torch.testing.assert_close(drawn.ess_fraction, torch.ones_like(drawn.ess_fraction))
    torch.testing.assert_close(drawn.norm, norm(drawn.eps))


@pytest.mark.parametrize(("dimensions", "delta"), [(1, 2.0), (30, 0.05), (3_000, 0.5)])
@pytest.mark.parametrize("leapfrogs", [1, 3])
def test_pcn_langevin_accepts_every_step_without_an_energy_and_forgets_its_start(
    dimensions: int, delta: float, leapfrogs: int
) -> None:
    """From ε = 3 the law after K steps of one leapfrog is N(3aᴷ, 1 − a²ᴷ), a = (2−δ)/(2+δ).

    In any dimension and at any step size.
    """
    generator, chains, steps = derived_generator(2), 30_000 // dimensions, 4
    state = start(zero, [torch.full((chains, dimensions), 3.0)])
    kernel = partial(pcn_langevin_step, leapfrogs=leapfrogs)
    state, acceptance, _ = run_chain(
        kernel, state, zero, steps, step_size=torch.full((chains,), delta), generator=generator
    )
    assert (acceptance == 1).all()
    if leapfrogs > 1:
        return
    a = (2 - delta) / (2 + delta)
    check_law(state.eps[0].flatten().double(), 3 * a**steps, 1 - a ** (2 * steps))


@pytest.mark.parametrize("s", [0.05, 0.5, 1.5])
def test_langevin_has_its_known_bias(s: float) -> None:
    """Started in the stationary law of ε′ = (1−s)ε + √(2s)ξ, N(0, 1/(1 − s/2)), one step leaves it there."""
    generator, variance = derived_generator(3), 1 / (1 - s / 2)
    state = start(zero, [math.sqrt(variance) * e for e in normal(3_000, generator)])
    moved, info = langevin_step(state, zero, steps_of(3_000, s), generator)
    check_law(entries(moved.eps), 0.0, variance)
    assert (info.acceptance == 1).all()


# The kernels on any energy.


def make_potential(curvature: float, amplitude: float, frequency: float) -> Callable[[Sequence[Tensor]], Tensor]:
    """A smooth g that is neither quadratic nor a sum over groups."""

    def g(eps: Sequence[Tensor]) -> Tensor:
        squares = torch.stack([e.square().flatten(1).sum(1) for e in eps]).sum(0)
        waves = torch.stack([(frequency * e).sin().flatten(1).sum(1) for e in eps]).prod(0)
        return amplitude * waves - curvature * squares

    return g


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    curvature=st.floats(-0.3, 1.0),
    amplitude=st.floats(-2.0, 2.0),
    frequency=st.floats(0.1, 2.0),
    log_delta=st.floats(-6.0, 0.6),
    seed=st.integers(0, 10_000),
)
def test_pcn_langevin_is_in_detailed_balance(
    curvature: float, amplitude: float, frequency: float, log_delta: float, seed: int
) -> None:
    """Its acceptance is min(1, π(v)q(v→u) / π(u)q(u→v)), with log π = g − ½‖·‖² and q the Gaussian of the proposal.

    Float64, so the two ways to the same number differ by rounding only.
    """
    g, n = make_potential(curvature, amplitude, frequency), 16
    delta = math.exp(log_delta) * torch.linspace(0.5, 1.0, n, dtype=torch.float64)
    u = normal(n, derived_generator(4, seed))

    def rows(x: Tensor, e: Tensor) -> Tensor:
        return x.reshape(-1, *[1] * (e.dim() - 1))

    def proposal_mean(eps: Sequence[Tensor]) -> list[Tensor]:
        leaves = [e.clone().requires_grad_() for e in eps]
        gradients = torch.autograd.grad(g(leaves).sum(), leaves)
        return [
            (rows(2 - delta, e) * e + 2 * rows(delta, e) * d) / rows(2 + delta, e)
            for e, d in zip(eps, gradients, strict=True)
        ]

    std = (8 * delta).sqrt() / (2 + delta)
    noise = normal(n, derived_generator(5, seed))
    v = [m + rows(std, m) * xi for m, xi in zip(proposal_mean(u), noise, strict=True)]

    def log_pi(eps: Sequence[Tensor]) -> Tensor:
        return g(eps) - 0.5 * torch.stack([e.square().flatten(1).sum(1) for e in eps]).sum(0)

    def log_q(origin: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        pairs = zip(proposal_mean(origin), target, strict=True)
        squares = torch.stack([((t - m) / rows(std, m)).square().flatten(1).sum(1) for m, t in pairs])
        return -0.5 * squares.sum(0)

    expected = (log_pi(v) + log_q(v, u) - log_pi(u) - log_q(u, v)).clamp(max=0).exp()
    state = start(g, u)
    kept, info = pcn_langevin_step(state, g, delta, derived_generator(5, seed))
    torch.testing.assert_close(info.acceptance, expected, rtol=1e-7, atol=1e-9)

    # Each chain is at its proposal or where it was, in all groups together, with the value and gradient of that place.
    accepted = (kept.eps[0] != u[0]).flatten(1).any(1)
    for new, old, end in zip(kept.eps, u, v, strict=True):
        torch.testing.assert_close(new, torch.where(rows(accepted, new), end, old))
    again = start(g, kept.eps)
    torch.testing.assert_close(kept.value, again.value)
    torch.testing.assert_close(kept.gradient, again.gradient)


def test_a_trajectory_is_accepted_by_its_energy_and_leads_back() -> None:
    """Acceptance is min(1, e^(H − H′)), H = ½‖ε‖² + ½‖v‖² − g, of leapfrogs that from −v′ return to the start."""
    g, n, leapfrogs = make_potential(0.2, 0.8, 1.3), 16, 5
    delta = torch.linspace(0.02, 0.3, n, dtype=torch.float64)
    u, v = normal(n, derived_generator(4)), normal(n, derived_generator(5))
    twin = derived_generator(5)
    normal(n, twin)
    jitter = 1 + JITTER * (2 * torch.rand(n, generator=twin, dtype=torch.float64) - 1)
    angle = 2 * ((0.5 * delta).sqrt() * jitter).atan()

    def rows(x: Tensor, e: Tensor) -> Tensor:
        return x.reshape(-1, *[1] * (e.dim() - 1))

    def flow(eps: list[Tensor], velocity: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        for _ in range(leapfrogs):
            velocity = [
                a + rows((0.5 * angle).tan(), a) * d for a, d in zip(velocity, start(g, eps).gradient, strict=True)
            ]
            pairs = list(zip(eps, velocity, strict=True))
            eps = [rows(angle.cos(), e) * e + rows(angle.sin(), e) * a for e, a in pairs]
            velocity = [rows(angle.cos(), e) * a - rows(angle.sin(), e) * e for e, a in pairs]
            velocity = [
                a + rows((0.5 * angle).tan(), a) * d for a, d in zip(velocity, start(g, eps).gradient, strict=True)
            ]
        return eps, velocity

    def energy(eps: Sequence[Tensor], velocity: Sequence[Tensor]) -> Tensor:
        return 0.5 * torch.stack([e.square().flatten(1).sum(1) for e in [*eps, *velocity]]).sum(0) - g(eps)

    end, at_end = flow(u, v)
    back, _ = flow(end, [-a for a in at_end])
    torch.testing.assert_close(back, u)
    expected = (energy(u, v) - energy(end, at_end)).clamp(max=0).exp()
    assert expected.min() < 0.9
    kept, info = pcn_langevin_step(start(g, u), g, delta, derived_generator(5), leapfrogs=leapfrogs)
    torch.testing.assert_close(info.acceptance, expected, rtol=1e-7, atol=1e-9)
    accepted = (kept.eps[0] != u[0]).flatten(1).any(1)
    for new, old, there in zip(kept.eps, u, end, strict=True):
        torch.testing.assert_close(new, torch.where(rows(accepted, new), there, old))


@pytest.mark.parametrize("leapfrogs", [1, 3])
@pytest.mark.parametrize("delta", [0.05, 0.4])
def test_one_step_of_pcn_langevin_leaves_its_target_invariant(delta: float, leapfrogs: int) -> None:
    """Started in N(m, 1/λ), the target of g = ½ε²(1−λ) + λmε, one step leaves it there, rejections and all."""
    generator, n, mean, precision = derived_generator(6), 40_000, 0.8, 3.0

    def g(eps: Sequence[Tensor]) -> Tensor:
        return (0.5 * (1 - precision) * eps[0] ** 2 + precision * mean * eps[0]).sum(1)

    first = mean + torch.randn(n, 2, generator=generator, dtype=torch.float64) / math.sqrt(precision)
    kernel = partial(pcn_langevin_step, leapfrogs=leapfrogs)
    state, acceptance, _ = run_chain(kernel, start(g, [first]), g, 1, step_size=steps_of(n, delta), generator=generator)
    assert acceptance.mean() < 0.999  # the test is about rejections too
    check_law(state.eps[0].flatten(), mean, 1 / precision)


def test_langevin_without_noise_climbs_the_log_density() -> None:
    """At temperature 0, Eq. 12 is ε + s∇log p(ε), with ∇log p from autograd on g − ½‖ε‖²."""
    g, s = make_potential(0.2, 0.5, 1.0), 0.1
    eps = normal(5, derived_generator(7))
    leaves = [e.clone().requires_grad_() for e in eps]
    log_p = g(leaves) - 0.5 * torch.stack([e.square().flatten(1).sum(1) for e in leaves]).sum(0)
    slopes = torch.autograd.grad(log_p.sum(), leaves)
    moved, _ = langevin_step(start(g, eps), g, steps_of(5, s), torch.Generator(), temperature=0.0)
    torch.testing.assert_close(moved.eps, [e + s * d for e, d in zip(eps, slopes, strict=True)])


def test_a_langevin_chain_differentiates_once_per_step() -> None:
    """At its start and after all steps but the last; it ends where one with all gradients ends."""
    config, eps = (
        SamplerConfig(proposals=1, kernel="langevin", steps=4, step_size=0.05),
        normal(6, derived_generator(9)),
    )
    g, gradients = make_potential(0.2, 0.5, 1.0), 0

    def counted(at: Any) -> torch.Tensor:
        nonlocal gradients
        gradients += torch.is_grad_enabled()
        return g(at)

    ends = draw(counted, lambda: eps, config, derived_generator(10)).eps
    assert gradients == config.steps
    state, _, _ = run_chain(
        langevin_step, start(g, eps), g, 4, step_size=steps_of(6, 0.05), generator=derived_generator(10)
    )
    assert all(map(torch.equal, ends, state.eps))


@pytest.mark.parametrize("kernel", [langevin_step, pcn_langevin_step])
def test_each_chain_has_its_own_step_size(kernel: Any) -> None:
    g, eps = make_potential(0.2, 0.5, 1.0), normal(6, derived_generator(8))
    state, sizes = start(g, eps), torch.linspace(0.01, 0.5, 6, dtype=torch.float64)
    together, info = kernel(state, g, sizes, derived_generator(9))
    for chain in range(6):
        alone, alone_info = kernel(state, g, steps_of(6, float(sizes[chain])), derived_generator(9))
        torch.testing.assert_close([e[chain] for e in together.eps], [e[chain] for e in alone.eps])
        torch.testing.assert_close(info.acceptance[chain], alone_info.acceptance[chain])


# Resampling.


def test_resampling_chooses_with_probability_proportional_to_exp_g() -> None:
    """Among fixed proposals 0 … 4 with weights w, proposal k is chosen with probability w_k/Σw (χ² over 20,000)."""
    weights, n = torch.tensor([1.0, 0.25, 4.0, 0.0, 2.0], dtype=torch.float64), 20_000
    numbers = iter(range(5))

    def propose() -> list[Tensor]:
        return [torch.full((n, 1), float(next(numbers)), dtype=torch.float64)]

    chosen, ess = resample(lambda eps: weights[eps[0][:, 0].long()].log(), propose, 5, derived_generator(10))
    counts = torch.bincount(chosen[0].flatten().long(), minlength=5)
    assert counts[3] == 0
    present = weights > 0
    expected = weights[present] / weights.sum() * n
    assert chisquare(counts[present].numpy(), expected.numpy()).pvalue > P_LIMIT
    torch.testing.assert_close(ess, steps_of(n, float(weights.sum() ** 2 / (weights**2).sum())))


def test_resampling_keeps_the_groups_of_one_proposal_together() -> None:
    generator = derived_generator(11)

    def propose() -> list[Tensor]:
        label = torch.randn(500, generator=generator)
        return [label[:, None].expand(500, 3), label[:, None, None, None].expand(500, 2, 2, 2)]

    chosen, _ = resample(lambda eps: 3 * eps[0][:, 0], propose, 16, generator)
    label = chosen[0][:, 0]
    assert (chosen[0] == label[:, None]).all()
    assert (chosen[1] == label[:, None, None, None]).all()
    assert label.mean() > 1  # by far above the proposals' mean, 0 ± .05


def test_effective_sample_size() -> None:
    log_weights = torch.tensor([[0.0, 0.0, 0.0, 0.0], [700.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1e4, -1e4]]).double()
    expected = torch.tensor([4.0, 1.0, 2.0]).double()
    torch.testing.assert_close(effective_sample_size(log_weights), expected)
    torch.testing.assert_close(effective_sample_size(log_weights + 900), expected)


def test_norm_is_one_in_high_dimension() -> None:
    value = norm([torch.randn(50, 3_000, generator=derived_generator(12)), torch.ones(50, 10, 10, 10)])
    assert (value - 1).abs().max() < Z_LIMIT / math.sqrt(2 * 3_000)
    torch.testing.assert_close(norm([torch.full((2, 4), 3.0), torch.zeros(2, 12)]), torch.full((2,), 1.5))


# Step sizes.


def steep(eps: Sequence[Tensor]) -> Tensor:
    """At δ = 2 nearly no proposal is accepted, at δ = .01 nearly all."""
    return -4 * eps[0].square().sum(1) + 5 * eps[0].sin().sum(1)


class Recording:
    """pCN-Langevin that remembers the step sizes it was given."""

    def __init__(self) -> None:
        self.sizes: list[Tensor] = []

    def __call__(self, state: ChainState, g: Any, step_size: Tensor, generator: Generator) -> Any:
        self.sizes.append(step_size.clone())
        return pcn_langevin_step(state, g, step_size, generator)


@pytest.mark.parametrize("initial", [0.01, 2.0])
def test_warm_up_finds_the_optimal_acceptance_and_then_keeps_the_step_size(initial: float) -> None:
    """64 chains × 200 steps after warm-up: the standard error between chains is below .01."""
    n, warm_up, kernel, generator = 64, 300, Recording(), derived_generator(13)
    acceptances: list[Tensor] = []
    _, mean_acceptance, final = run_chain(
        kernel,
        start(steep, [torch.randn(n, 40, generator=generator, dtype=torch.float64)]),
        steep,
        warm_up + 200,
        step_size=steps_of(n, initial),
        adapt_steps=warm_up,
        generator=generator,
        callback=lambda step, state, info: acceptances.append(info.acceptance),
    )
    first = acceptances[0].mean()
    assert first > 0.8 if initial < 1 else first < 0.1  # far from the target at the start
    assert abs(float(torch.stack(acceptances[warm_up:]).mean()) - TARGET_ACCEPTANCE) < 0.02
    torch.testing.assert_close(mean_acceptance, torch.stack(acceptances).mean(0))
    assert (kernel.sizes[0] == initial).all()
    assert (kernel.sizes[warm_up - 1] != kernel.sizes[warm_up]).any()
    assert all(torch.equal(size, final) for size in kernel.sizes[warm_up:])
    assert len(final.unique()) > 1  # each chain adapts for itself


def test_without_warm_up_the_step_size_stays() -> None:
    generator, config = derived_generator(14), SamplerConfig(proposals=1, steps=20, step_size=0.3)
    drawn = draw(steep, lambda: [torch.randn(8, 40, generator=generator)], config, generator)
    assert (drawn.step_size == torch.tensor(0.3)).all()
    assert drawn.acceptance.mean() < 0.9


def test_the_callback_sees_every_step() -> None:
    seen: list[int] = []

    def callback(step: int, state: ChainState, info: ChainInfo) -> None:
        torch.testing.assert_close(info.norm, norm(state.eps))
        torch.testing.assert_close(state.value, steep(state.eps))
        seen.append(step)

    generator, config = derived_generator(15), SamplerConfig(proposals=1, steps=7, step_size=0.05)
    draw(steep, lambda: [torch.randn(8, 4, generator=generator)], config, generator, callback)
    assert seen == list(range(7))


# What is not finite.


@pytest.mark.parametrize(
    ("where", "bad"),
    [
        *(("value", bad) for bad in (math.nan, math.inf, -math.inf)),
        ("gradient", math.nan),
        ("value and gradient", math.inf),
    ],
)
def test_pcn_langevin_refuses_proposals_where_g_is_not_finite(bad: float, where: str) -> None:
    """g = 0 inside |ε| ≤ 1 and not finite outside: every chain stays inside, and moves."""

    def g(eps: Sequence[Tensor]) -> Tensor:
        outside, e = (eps[0].abs() > 1).any(1), 1 * eps[0]
        if "gradient" in where:
            e.register_hook(lambda slope: slope.masked_fill(outside[:, None], bad))
        value = 0 * e.sum(1)
        return value.masked_fill(outside, bad) if "value" in where else value

    generator = derived_generator(16)
    first = torch.zeros(500, 2)
    state, acceptance, _ = run_chain(
        pcn_langevin_step, start(g, [first]), g, 20, step_size=torch.full((500,), 0.5), generator=generator
    )
    assert (state.eps[0].abs() <= 1).all()
    assert (state.eps[0] != 0).all()
    assert torch.isfinite(state.value).all()
    assert 0.1 < acceptance.mean() < 0.9


def test_langevin_that_explodes_is_an_error() -> None:
    def repelled(eps: Sequence[Tensor]) -> Tensor:
        return 40 * eps[0].square().sum(1)

    generator = derived_generator(17)
    config = SamplerConfig(proposals=1, kernel="langevin", steps=60, step_size=0.5)
    with pytest.raises(DivergenceError, match=r"10 of 10 chains left the finite numbers within 60 steps.*pcn-langevin"):
        draw(repelled, lambda: [torch.randn(10, 3, generator=generator)], config, generator)


@pytest.mark.parametrize("kernel", [langevin_step, pcn_langevin_step])
def test_a_chain_that_ends_where_g_is_not_finite_is_an_error(kernel: Any) -> None:
    """A backbone can overflow at finite ε: here in the second chain, from the start."""

    def overflowing(eps: Sequence[Tensor]) -> Tensor:
        return (0 * eps[0].exp()).sum(1)

    first = [torch.tensor([[0.0], [100.0]])]
    with pytest.raises(DivergenceError, match="1 of 2 chains left the finite numbers within 1 steps"):
        run_chain(kernel, start(overflowing, first), overflowing, 1, step_size=torch.full((2,), 1e-3))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"proposals": 0}, "proposals must be from 1 to"),
        ({"steps": -1}, "steps"),
        ({"steps": 5, "adapt_steps": 1_000_001}, "adapt_steps must be from 0 to"),
        ({"kernel": "hmc"}, "langevin or pcn-langevin, found 'hmc'"),
        ({"leapfrogs": 0}, "leapfrogs must be from 1 to"),
        ({"leapfrogs": 2, "kernel": "langevin"}, "must be 1 unless the kernel is pcn-langevin"),
        ({"step_size": 0.0}, "step_size must be in"),
        ({"step_size": 2.1}, "step_size must be in"),
        ({"step_size": math.nan}, "step_size must be in"),
        ({"temperature": 0.7}, "temperature"),
        ({"temperature": math.nan, "kernel": "langevin"}, "temperature must be finite and not negative"),
        ({"temperature": -1.0, "kernel": "langevin"}, "temperature must be finite and not negative"),
        ({"kernel": "langevin", "steps": 5, "adapt_steps": 2}, "it cannot adapt"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SamplerConfig(**settings_)
