"""The loss of joint training: every gradient against closed forms on a linear-Gaussian model, the chains' targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from closed_form import Normal, Quadratic, flat, latent_prior, tilt
from ebm_prior.backbones.shallow import ShallowGenerator
from torch import Tensor, nn
from toys import LinearGaussian

from ebm_prior.model.backbone import Gaussian, PosteriorDraw
from ebm_prior.model.drawing import draw
from ebm_prior.model.samplers import SamplerConfig
from ebm_prior.training.joint_loss import potential, terms

TOP, BOTTOM = 2, 3


class Linear(LinearGaussian):
    """The toy with an inference network of its own (Eq. 4): z1 = U x + u + s1 ξ1, z2 = V z1 + v + s2 ξ2."""

    def __init__(self) -> None:
        super().__init__(TOP, BOTTOM)
        generator = torch.Generator().manual_seed(5)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.U, self.u, self.log_s1 = random(BOTTOM, 4), random(BOTTOM), random(BOTTOM)
        self.V, self.v, self.log_s2 = random(TOP, BOTTOM), random(TOP), random(TOP)

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        q1 = Gaussian(images.flatten(1) @ self.U.T + self.u, self.log_s1.exp())
        z1 = q1.mean + q1.std * noise[1]
        q2 = Gaussian(z1 @ self.V.T + self.v, self.log_s2.exp())
        z2 = q2.mean + q2.std * noise[0]
        return PosteriorDraw.given([z2, z1], [q2.log_prob(z2), q1.log_prob(z1)])


@pytest.fixture
def model() -> tuple[Linear, Quadratic, Tensor]:
    generator = torch.Generator().manual_seed(1)
    root = 0.4 * torch.randn(TOP + BOTTOM, TOP + BOTTOM, generator=generator, dtype=torch.float64)
    level, slope = torch.tensor(0.3, dtype=torch.float64), torch.randn(5, generator=generator, dtype=torch.float64)
    images = torch.rand(6, 1, 2, 2, generator=generator, dtype=torch.float64)
    return Linear().double(), Quadratic(level, slope, root @ root.T), images


def sigma_points(law: Normal) -> Tensor:
    """2D points with the mean and covariance of the law: means of quadratic functions over them are exact."""
    root = torch.linalg.cholesky(law.covariance) * math.sqrt(len(law.mean))
    return torch.cat([law.mean + root.T, law.mean - root.T]).detach()


def split(z: Tensor) -> list[Tensor]:
    return [z[:, :TOP], z[:, TOP:]]


def gaussian_prior(backbone: Linear) -> Normal:
    """p_β(z) with its dependence on β: z2 ~ N(0, I), z1 ~ N(A z2 + b, s²)."""
    A, b, variance = backbone.A, backbone.b, (2 * backbone.log_s).exp()
    eye = torch.eye(TOP, dtype=A.dtype)
    covariance = torch.cat([torch.cat([eye, A.T], 1), torch.cat([A, A @ A.T + torch.diag(variance)], 1)])
    return Normal(torch.cat([b.new_zeros(TOP), b]), covariance)


def decoder(backbone: Linear) -> Tensor:
    """H with E[x | z] = ½ + H z."""
    return torch.cat([backbone.W.new_zeros(4, TOP), backbone.W], 1)


def posterior(law: Normal, backbone: Linear, image: Tensor) -> Normal:
    """p(z | x) for a Gaussian prior of z, by conditioning."""
    H, noise = decoder(backbone), backbone.sigma**2 * torch.eye(4, dtype=image.dtype)
    K = law.covariance @ H.T @ torch.linalg.inv(H @ law.covariance @ H.T + noise)
    covariance = law.covariance - K @ H @ law.covariance
    return Normal(law.mean + K @ (image.flatten() - 0.5 - H @ law.mean), 0.5 * (covariance + covariance.T))


def gradients(loss: Tensor, *modules: nn.Module) -> dict[str, Tensor]:
    named = {f"{type(m).__name__}.{name}": p for m in modules for name, p in m.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    # What is symmetric has a gradient up to its antisymmetric part.
    symmetric = [0.5 * (g + g.T) if name.endswith(".Q") else g for name, g in zip(named, found, strict=True)]
    return dict(zip(named, symmetric, strict=True))


@pytest.mark.parametrize("ebm", [True, False])
def test_maximum_likelihood_gradients(model: tuple[Linear, Quadratic, Tensor], ebm: bool) -> None:
    """Eqs. 9-11 with exact posterior and prior draws are the gradient of the exact log p_θ(x) (Eq. 8)."""
    backbone, f, images = model
    law = tilt(gaussian_prior(backbone), f)[0] if ebm else gaussian_prior(backbone)
    H, noise = decoder(backbone), backbone.sigma**2 * torch.eye(4, dtype=images.dtype)
    marginal = torch.distributions.MultivariateNormal(0.5 + H @ law.mean, H @ law.covariance @ H.T + noise)
    exact = gradients(-marginal.log_prob(images.flatten(1)).mean(), backbone, f)

    positive = torch.cat([sigma_points(posterior(law, backbone, image)) for image in images])
    repeated = images.repeat_interleave(2 * (TOP + BOTTOM), 0)
    negative = split(sigma_points(law)) if ebm else None
    found = gradients(terms(backbone, f if ebm else None, repeated, split(positive), negative).loss(), backbone, f)
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-7, msg=name)
    seen = {name for name, gradient in exact.items() if gradient.abs().max() > 1e-3}
    assert seen >= {f"Linear.{name}" for name in ("A", "b", "log_s", "W")} | (
        {"Quadratic.b", "Quadratic.Q"} if ebm else set()
    )


def elbo(backbone: Linear, f: Quadratic | None, images: Tensor) -> Tensor:
    """ELBO(θ, ω) with the energy, in closed form: means of quadratics under the Gaussian q(z | x), and log Z."""
    x = images.flatten(1)
    m1 = x @ backbone.U.T + backbone.u
    S1, S2, V = torch.diag((2 * backbone.log_s1).exp()), torch.diag((2 * backbone.log_s2).exp()), backbone.V
    mean = torch.cat([m1 @ V.T + backbone.v, m1], 1)
    S = torch.cat([torch.cat([V @ S1 @ V.T + S2, V @ S1], 1), torch.cat([S1 @ V.T, S1], 1)])
    H, law = decoder(backbone), gaussian_prior(backbone)
    residual = x - 0.5 - mean @ H.T
    log_px = -(residual.square().sum(1) + (H @ S @ H.T).trace()) / (2 * backbone.sigma**2)
    precision, centred = torch.linalg.inv(law.covariance), mean - law.mean
    log_p = -0.5 * ((centred @ precision * centred).sum(1) + (precision @ S).trace() + law.covariance.logdet())
    total = log_px + log_p + 0.5 * S.logdet()  # up to constants
    if f is not None:
        total = total + f(split(mean)) - 0.5 * (f.Q @ S).trace() - tilt(law, f)[1]
    return total.mean()


@pytest.mark.parametrize("ebm", [True, False])
def test_variational_gradients(model: tuple[Linear, Quadratic, Tensor], ebm: bool) -> None:
    """Eqs. 16-19 with exact prior draws are the gradient of the exact ELBO, for β0, α, β>0 and ω."""
    backbone, f, images = model
    exact = gradients(-elbo(backbone, f if ebm else None, images), backbone, f)
    xi = sigma_points(Normal(*(t.to(torch.float64) for t in (torch.zeros(5), torch.eye(5)))))
    noise, repeated = split(xi.repeat(len(images), 1)), images.repeat_interleave(len(xi), 0)
    negative = split(sigma_points(tilt(gaussian_prior(backbone), f)[0])) if ebm else None
    inferred = backbone.infer(repeated, noise=noise)
    found = gradients(terms(backbone, f if ebm else None, repeated, inferred, negative).loss(), backbone, f)
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-7, msg=name)
    assert all(exact[f"Linear.{name}"].abs().max() > 1e-3 for name in ("U", "u", "log_s1", "V", "v", "log_s2"))


@pytest.mark.parametrize("space", ["eps", "z"])
@pytest.mark.parametrize("of_image", [True, False])
def test_chains_reach_their_closed_form(model: tuple[Linear, Quadratic, Tensor], space: Any, of_image: bool) -> None:
    """Eqs. 13, 14 in ε (A.3) and in z: the same law, that of Gaussian conditioning."""
    backbone, f, images = model
    law, n = tilt(latent_prior(backbone), f)[0], 1500
    image = images[:1] * 0.1 + 0.45  # within a few sd of what the model draws
    law = posterior(law, backbone, image) if of_image else law
    generator = torch.Generator().manual_seed(0)

    def propose() -> list[Tensor]:
        eps = backbone.standard_normal(n, generator=generator)
        return eps if space == "eps" else backbone.reparameterize(eps)

    backbone.requires_grad_(False)
    g = potential(backbone, f, space, image.expand(n, -1, -1, -1) if of_image else None)
    config = SamplerConfig(proposals=1, kernel="pcn-langevin", steps=150, step_size=0.3, adapt_steps=50)
    ends = draw(g, propose, config, generator).eps
    z = ends if space == "z" else backbone.reparameterize(ends)
    Normal(law.mean.detach(), law.covariance.detach()).check(flat(z).detach())


def test_bfloat16_is_a_rounding_of_the_same_target() -> None:
    torch.manual_seed(0)
    backbone, x = ShallowGenerator((1, 8, 8), (4, 3), width=4, hidden=6).eval(), torch.rand(20, 1, 8, 8)
    eps = [e.requires_grad_() for e in backbone.standard_normal(20, generator=torch.Generator().manual_seed(0))]

    def slope(bfloat16: bool) -> tuple[Tensor, Tensor]:
        value = potential(backbone, None, "eps", x, bfloat16=bfloat16)(eps)
        return value.detach(), torch.cat(torch.autograd.grad(value.sum(), eps), 1)

    (exact, gradient), (rounded, coarse) = slope(False), slope(True)
    assert exact.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=5e-3, atol=0.1)
    assert (coarse - gradient).norm() < 0.05 * gradient.norm()  # 8 bits of mantissa, and kinks crossed
    assert not torch.equal(coarse, gradient)
