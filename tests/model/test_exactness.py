"""With a quadratic f on the linear-Gaussian toy everything has a closed form: the library must agree with it.

f(z) = c + ⟨b, z⟩ − ½⟨z, Qz⟩ tilts the Gaussian p_β(z) into a Gaussian p_α(z); aggregate posteriors are Gaussian, so the
log density ratio f* is quadratic too. Tolerances are `closed_form.Z_LIMIT` = 4.5 standard errors unless said otherwise.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from closed_form import (
    SIZES,
    Z_LIMIT,
    Normal,
    Problem,
    Quadratic,
    flat,
    gain_error,
    latent_map,
    latent_prior,
    posterior_draws,
    tilt,
)
from scipy.stats import chi2
from torch import Tensor
from toys import LinearGaussian

from ebm_prior.compute.randomness import derived_generator
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.training.objectives import gain, mle_loss, nce_loss, temper

D = sum(SIZES)


def groups(z: Tensor) -> list[Tensor]:
    """The groups of flat latents (B, D), in generation order."""
    return list(z.split(SIZES, dim=1))


@pytest.fixture(scope="module")
def backbone() -> LinearGaussian:
    return LinearGaussian(*SIZES).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def f() -> Quadratic:
    """A tilt that couples the groups; ESS fraction .4."""
    generator = derived_generator(20)
    root = torch.randn(D, D, generator=generator, dtype=torch.float64)
    b = 0.5 * torch.randn(D, generator=generator, dtype=torch.float64)
    return Quadratic(torch.tensor(0.3, dtype=torch.float64), b, 0.08 * root @ root.T).requires_grad_(False)


@pytest.fixture(scope="module")
def prior(backbone: LinearGaussian, f: Quadratic) -> EBMPrior:
    return EBMPrior(backbone, f)  # type: ignore[arg-type]


def eps_law(backbone: LinearGaussian, target: Normal) -> Normal:
    """The law of ε = M⁻¹(z − μ) for z ~ target."""
    mean, M = latent_map(backbone)
    inverse = torch.linalg.inv(M)
    return Normal(inverse @ (target.mean - mean), inverse @ target.covariance @ inverse.T)


# Densities.


@pytest.mark.parametrize("tau", [1.0, 0.4])
def test_densities(backbone: LinearGaussian, f: Quadratic, tau: float) -> None:
    """log_density − log Z and log_prior − log Z are the Gaussians' log densities, in ε and in z."""
    prior = EBMPrior(backbone, f, tau=tau)  # type: ignore[arg-type]
    target, log_z = tilt(latent_prior(backbone), f.scaled(tau))
    eps = backbone.standard_normal(50, generator=derived_generator(21))
    z = backbone.reparameterize(eps)
    torch.testing.assert_close(prior.log_prior(z) - log_z, target.distribution.log_prob(flat(z)))
    in_eps = eps_law(backbone, target).distribution.log_prob(flat(eps))
    torch.testing.assert_close(prior.log_density(eps) - log_z, in_eps)
    torch.testing.assert_close(
        prior.potential(eps) - 0.5 * flat(eps).square().sum(1) - 2.5 * math.log(2 * math.pi) - log_z, in_eps
    )


@pytest.mark.parametrize("tau", [1.0, 0.4, 0.0])
def test_log_normalizer(backbone: LinearGaussian, f: Quadratic, tau: float) -> None:
    """log Z within standard errors, √((1/ESS fraction − 1)/n); the ESS fraction is Z(τf)²/Z(2τf) within 10 %."""
    n, reference = 20_000, latent_prior(backbone)
    log_z, log_z2 = (tilt(reference, f.scaled(k * tau))[1].item() for k in (1, 2))
    estimate, ess_fraction = EBMPrior(backbone, f, tau=tau).log_normalizer(n=n, seed=22, chunk=4096)  # type: ignore[arg-type]
    true_fraction = math.exp(2 * log_z - log_z2)
    assert abs(estimate - log_z) <= Z_LIMIT * math.sqrt((1 / true_fraction - 1) / n) + 1e-12
    assert ess_fraction == pytest.approx(true_fraction, rel=0.1)
    assert (tau == 0) == (true_fraction > 0.99)


# Samplers. Chains are independent, so the draws are.

CONVERGED = {
    # The law of SIR is off by about (1/ESS fraction − 1)/proposals < 1 % of a standard deviation.
    "sir": (SamplerConfig(proposals=800, steps=0), 4_000),
    "pcn-langevin": (SamplerConfig(proposals=1, steps=60, step_size=0.5), 20_000),
    "hamiltonian": (SamplerConfig(proposals=1, steps=20, step_size=0.25, leapfrogs=3), 20_000),
    "pcn-langevin, warmed up": (SamplerConfig(proposals=1, steps=60, step_size=0.1, adapt_steps=30), 20_000),
    "sir then pcn-langevin": (SamplerConfig(proposals=8, steps=30, step_size=0.5), 20_000),
}


@pytest.mark.parametrize("name", CONVERGED)
def test_samplers_draw_the_tilted_gaussian(backbone: LinearGaussian, f: Quadratic, prior: EBMPrior, name: str) -> None:
    sampler, n = CONVERGED[name]
    target, _ = tilt(latent_prior(backbone), f)
    drawn = prior.sample(n, seed=23, sampler=sampler, chunk=4096)
    target.check(flat(drawn.z))
    eps_law(backbone, target).check(flat(drawn.eps))
    if sampler.steps:
        assert 0.2 < drawn.acceptance.mean() < 0.99


@pytest.mark.parametrize("s", [0.02, 0.2])
def test_langevin_draws_the_tilted_gaussian_with_its_known_bias(
    backbone: LinearGaussian, f: Quadratic, prior: EBMPrior, s: float
) -> None:
    """ε′ = ε + sΛ(m − ε) + √(2s)ξ has the stationary law N(m, (Λ(I − sΛ/2))⁻¹), which tends to the target with s.

    Λ ⪰ I, so after K steps the start is forgotten to (1 − s)ᴷ < 1e-2 · one standard error.
    """
    target = eps_law(backbone, tilt(latent_prior(backbone), f)[0])
    precision = torch.linalg.inv(target.covariance)
    assert s * torch.linalg.eigvalsh(precision).max() < 2
    eye = torch.eye(D, dtype=torch.float64)
    stationary = Normal(target.mean, torch.linalg.inv(precision @ (eye - 0.5 * s * precision)))
    steps = math.ceil(math.log(1e-4) / math.log(1 - s))
    sampler = SamplerConfig(proposals=1, kernel="langevin", steps=steps, step_size=s)
    stationary.check(flat(prior.sample(10_000, seed=24, sampler=sampler, chunk=10_000).eps))


# The trained optimum. Images come from latents that p_β does not have; q is their aggregate posterior.


@pytest.fixture(scope="module")
def problem(backbone: LinearGaussian) -> Problem:
    return Problem.of(backbone)


def test_the_log_ratio_is_normalised_and_its_tilt_is_the_aggregate_posterior(
    backbone: LinearGaussian, problem: Problem
) -> None:
    tilted, log_z = tilt(problem.p, problem.best)
    torch.testing.assert_close(tilted, problem.q)
    assert abs(float(log_z)) < 1e-9
    problem.q.check(flat(posterior_draws(backbone, problem, 50_000, 0)))
    assert problem.q.kl(problem.p) > 0.5  # there is something to learn


def quadratic_features(z: Tensor) -> Tensor:
    """φ(z) with f = ⟨θ, φ⟩: 1, z, and −½z_i z_j for i ≤ j (off the diagonal twice), (B, 1 + D + D(D+1)/2)."""
    i, j = torch.triu_indices(D, D)
    return torch.cat([torch.ones(len(z), 1, dtype=z.dtype), z, -0.5 * z[:, i] * z[:, j] * (1 + (i != j))], dim=1)


def quadratic_parameters(f: Quadratic) -> Tensor:
    i, j = torch.triu_indices(D, D)
    return torch.cat([f.c[None], f.b, f.Q[i, j]])


@pytest.mark.parametrize("noise_weight", [1.0, 30.0, 0.1])
def test_nce_finds_the_log_density_ratio(backbone: LinearGaussian, problem: Problem, noise_weight: float) -> None:
    """Over all quadratics the minimiser of nce_loss is f*, level included: log Z = 0, whatever M is.

    Wald test: θ̂ solves E_q[s(−g)φ] = M E_p[s(g)φ], with the logistic function s and g = f − log M. With H the
    derivative of the difference and J the variance of its summands, N⟨H(θ̂ − θ*), J⁻¹H(θ̂ − θ*)⟩ is χ² with 21
    degrees of freedom.
    """
    n = 40_000
    generator = derived_generator(26)
    phi_q = quadratic_features(flat(posterior_draws(backbone, problem, n, 1)))
    phi_p = quadratic_features(flat(backbone.sample(n, generator=generator)))
    theta = torch.zeros(phi_q.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=300, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nce_loss(phi_q @ theta, phi_p @ theta, noise_weight)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = quadratic_parameters(problem.best)
    g_q, g_p = (phi @ best - math.log(noise_weight) for phi in (phi_q, phi_p))
    weights = g_q.sigmoid() * (-g_q).sigmoid(), noise_weight * g_p.sigmoid() * (-g_p).sigmoid()
    hessian = sum((phi * w[:, None]).T @ phi / n for phi, w in zip((phi_q, phi_p), weights, strict=True))
    summands = (-g_q).sigmoid()[:, None] * phi_q, noise_weight * g_p.sigmoid()[:, None] * phi_p
    information = hessian @ torch.linalg.solve(sum(each.T.cov() for each in summands), hessian)
    error = theta.detach() - best
    wald = float(n * error @ information @ error)
    assert wald < chi2.isf(1e-4, len(best)), wald
    assert n * best @ information @ best > 100 * wald  # the test sees much smaller errors than that of f = 0


def test_mle_gradient_is_that_of_the_likelihood(backbone: LinearGaussian, f: Quadratic) -> None:
    """−∇mle_loss at draws of p_α is ∇(E_q[f] − log Z(f)) (Eqs. 10, 17), here from the closed form of log Z.

    Standard errors are those of the two means of ∇f: 1, z, −½zzᵀ. The negatives are independent exact chains.
    """
    n = 20_000
    q = Normal(torch.full((D,), 0.4, dtype=torch.float64), 0.8 * torch.eye(D, dtype=torch.float64))
    z_q = q.sample(n, derived_generator(27))
    sampler = SamplerConfig(proposals=1, steps=50, step_size=0.5)
    z_p = flat(EBMPrior(backbone, f).sample(n, seed=28, sampler=sampler, chunk=4096).z)  # type: ignore[arg-type]

    trained = copy.deepcopy(f).requires_grad_()
    parameters = list(trained.parameters())
    loss = mle_loss(trained(groups(z_q)), trained(groups(z_p)))
    estimates = torch.autograd.grad(loss, parameters)
    expected_f = trained.c + q.mean @ trained.b - 0.5 * (trained.Q * (q.covariance + torch.outer(q.mean, q.mean))).sum()
    exact = torch.autograd.grad(expected_f - tilt(latent_prior(backbone), trained)[1], parameters)

    assert abs(float(estimates[0])) < 1e-12  # the level of f does not matter
    slopes = [[z, -0.5 * z[:, :, None] * z[:, None, :]] for z in (z_q, z_p)]
    for estimate, gradient, s_q, s_p in zip(estimates[1:], exact[1:], *slopes, strict=True):
        error = ((s_q.var(0) + s_p.var(0)) / n).sqrt()
        assert ((estimate + gradient).abs() < Z_LIMIT * error).all()
        assert ((gradient / error).abs() > 10).double().mean() > 0.5  # most components are far from zero


def test_mle_rests_at_the_log_density_ratio(backbone: LinearGaussian, problem: Problem) -> None:
    """At f* the draws of p_α, by chains, are draws of q: every component of ∇mle_loss vanishes within its error."""
    n = 20_000
    sampler = SamplerConfig(proposals=1, steps=50, step_size=0.5)
    z_p = flat(EBMPrior(backbone, problem.best).sample(n, seed=29, sampler=sampler, chunk=4096).z)  # type: ignore[arg-type]
    phi_q = quadratic_features(flat(posterior_draws(backbone, problem, n, 2)))
    phi_p = quadratic_features(z_p)
    theta = quadratic_parameters(problem.best).requires_grad_()
    (gradient,) = torch.autograd.grad(mle_loss(phi_q @ theta, phi_p @ theta), theta)
    error = ((phi_q.var(0) + phi_p.var(0)) / n).sqrt()
    assert (gradient.abs() <= Z_LIMIT * error + 1e-12).all()


# The gain, and tempering.


@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("which", ["optimum", "another f"])
def test_gain_is_a_difference_of_divergences(
    backbone: LinearGaussian, problem: Problem, f: Quadratic, which: str, tau: float
) -> None:
    """E_q[log p_α − log p_β] = KL(q ‖ p_β) − KL(q ‖ p_α), at τf = f* the greatest, KL(q ‖ p_β)."""
    energy = problem.best if which == "optimum" else f
    z_q = posterior_draws(backbone, problem, 50_000, 3)
    z_p = backbone.sample(50_000, generator=derived_generator(30))
    f_q, f_p = energy(z_q), energy(z_p)
    p_alpha, _ = tilt(problem.p, energy.scaled(tau))
    expected = problem.q.kl(problem.p) - problem.q.kl(p_alpha)
    measured = gain(f_q, f_p, tau)
    assert abs(measured.nats - expected) < Z_LIMIT * gain_error(f_q, f_p, tau)
    assert gain_error(f_q, f_p, tau) < 0.02
    assert expected <= problem.q.kl(problem.p) + 1e-9
    assert measured.tau == tau
    shifted = gain(f_q + 3, f_p + 3, tau)  # the level of f does not matter
    assert shifted.nats == pytest.approx(measured.nats, abs=1e-9)
    assert shifted.ess_fraction == pytest.approx(measured.ess_fraction)


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.6])
def test_tempering_finds_the_right_scale(backbone: LinearGaussian, problem: Problem, scale: float) -> None:
    """For f = scale·f* the best τ is 1/scale.

    The slope of the gain, E_q[f] − E_{p,τ}[f], vanishes there and has the derivative −Var_q[f]; its standard error by
    the delta method is that of the mean of f over q and of the weighted mean over p_β.
    """
    n = 50_000
    f_q = scale * problem.best(posterior_draws(backbone, problem, n, 4))
    f_p = scale * problem.best(backbone.sample(n, generator=derived_generator(31)))
    best = temper(f_q, f_p, ess_floor=0.0)
    weights = torch.softmax(f_p / scale, 0)
    slope_error = math.sqrt(float(f_q.var() / n + (weights**2 * (f_p - weights @ f_p) ** 2).sum()))
    error = slope_error / float(f_q.var())
    assert error < 0.03
    assert abs(best.tau - 1 / scale) < Z_LIMIT * error
