"""Joint training: every gradient against closed forms on a linear-Gaussian model, the chains' targets, the trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from closed_form import Normal, Quadratic, flat, latent_prior, tilt
from ebm_prior.backbones.shallow import ShallowGenerator
from played_graphs import Played
from torch import Tensor, nn
from toys import LinearGaussian

from ebm_prior import joint
from ebm_prior.backbone import Gaussian, PosteriorDraw
from ebm_prior.cuda_graphs import Graphs
from ebm_prior.data import ImageSource, from_array
from ebm_prior.energy import EnergyConfig
from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.joint import potential, terms, train_jointly, validate
from ebm_prior.joint_config import JointConfig, paper_joint
from ebm_prior.prior import EBMPrior
from ebm_prior.samplers import GraphedPotential, SamplerConfig, draw
from ebm_prior.weights import fingerprint

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


def test_bfloat16_is_a_rounding_of_the_same_target(pictures: ImageSource) -> None:
    backbone, x = small_backbone().eval(), pictures.batch(range(20))
    eps = [e.requires_grad_() for e in backbone.standard_normal(20, generator=torch.Generator().manual_seed(0))]

    def slope(bfloat16: bool) -> tuple[Tensor, Tensor]:
        value = potential(backbone, None, "eps", x, bfloat16=bfloat16)(eps)
        return value.detach(), torch.cat(torch.autograd.grad(value.sum(), eps), 1)

    (exact, gradient), (rounded, coarse) = slope(False), slope(True)
    assert exact.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=5e-3, atol=0.1)
    assert (coarse - gradient).norm() < 0.05 * gradient.norm()  # 8 bits of mantissa, and kinks crossed
    assert not torch.equal(coarse, gradient)


# The trainer.

CHAIN = SamplerConfig(proposals=1, kernel="langevin", steps=3, step_size=0.02)
SMALL = JointConfig(
    iterations=6,
    batch_size=8,
    evaluate_every=2,
    warmup=0,
    energy_from=0.0,
    energy=EnergyConfig(hidden=6, vector_layers=1, joint=0, standardize=False),
    prior_chain=CHAIN,
    posterior_chain=replace(CHAIN, step_size=0.001),
)
PRODUCTS: dict[str, dict[str, Any]] = {
    "VAE": {"posterior": "inference", "prior": "gaussian"},
    "ABP": {"posterior": "langevin", "prior": "gaussian"},
    "LEBM": {"posterior": "langevin", "prior": "ebm"},
    "inference": {"posterior": "inference", "prior": "ebm", "chains": "persistent", "refresh": 0.3},
    "fast": {"posterior": "langevin", "prior": "ebm", "bfloat16": True, "channels_last": True},
    "z": {"posterior": "langevin", "prior": "ebm", "space": "z", "penalty": 0.1},
}


def small_backbone(latents: Sequence[int] = (4, 3)) -> ShallowGenerator:
    torch.manual_seed(0)
    return ShallowGenerator((1, 8, 8), latents, width=4, hidden=6)


@pytest.fixture(scope="module")
def pictures() -> ImageSource:
    return from_array(torch.rand(40, 8, 8, generator=torch.Generator().manual_seed(0)).numpy())


class Crash(Exception):
    """A process that ends here."""


class Memory:
    """A Recorder in memory, which can crash after some states."""

    def __init__(self, crash_after: int | None = None) -> None:
        self.states: list[Any] = []
        self.lines: list[Any] = []
        self.crash_after = crash_after

    def log(self, metrics: Any) -> None:
        self.lines.append(dict(metrics))

    def save_state(self, state: Any) -> None:
        self.states.append(state)
        if len(self.states) == self.crash_after:
            raise Crash

    def load_state(self) -> Any:
        return self.states[-1] if self.states else None


def same(one: EBMPrior, other: EBMPrior) -> bool:
    return all(
        fingerprint(a) == fingerprint(b) for a, b in ((one.backbone, other.backbone), (one.energy, other.energy))
    )


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_killed_run_goes_on_to_the_same_bytes(product: str, pictures: ImageSource) -> None:
    config = replace(SMALL, **PRODUCTS[product])
    whole = train_jointly(small_backbone(), pictures, config)
    memory = Memory(crash_after=2)
    with pytest.raises(Crash):
        train_jointly(small_backbone(), pictures, config, run=memory)
    memory.crash_after = None
    assert same(train_jointly(small_backbone(), pictures, config, run=memory), whole)
    untrained = fingerprint(small_backbone())
    assert fingerprint(whole.backbone) != untrained
    z = whole.backbone.sample(5)
    assert bool((whole.f(z) == 0).all()) == (config.prior == "gaussian")


@pytest.mark.parametrize("product", PRODUCTS)
def test_replayed_graphs_train_the_same(
    product: str, played: None, pictures: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, energy_from=0.5, **PRODUCTS[product])
    plain = train_jointly(small_backbone(), pictures, config)
    monkeypatch.setattr(joint, "runner", lambda device: Graphs().run)
    monkeypatch.setattr(joint, "graphed", lambda potential, device: GraphedPotential(potential))
    replayed = train_jointly(small_backbone(), pictures, config)
    assert Played.recorded
    for one, other in zip(replayed.backbone.parameters(), plain.backbone.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(replayed.energy.parameters(), plain.energy.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("product", PRODUCTS)
def test_on_a_gpu_replayed_graphs_train_the_same(
    product: str, pictures: ImageSource, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    config = replace(SMALL, energy_from=0.5, **PRODUCTS[product])

    def trained() -> torch.Tensor:
        found = train_jointly(small_backbone().cuda(), pictures, config)
        return torch.cat([p.flatten() for model in (found.backbone, found.energy) for p in model.parameters()])

    replayed = trained()
    assert not [w for w in recwarn if "CUDA graphs" in str(w.message)]
    monkeypatch.setattr(Graphs, "run", lambda self, name, function, inputs, generator=None: function(inputs, generator))
    plain = trained()
    assert float((replayed - plain).norm() / plain.norm()) < 1e-3  # Adam makes a step of rounding where a gradient is 0


def test_f_stays_zero_until_the_energy_joins(pictures: ImageSource) -> None:
    """Until then it is the plain VAE, to the bit."""
    until = replace(SMALL, decay=False, energy_from=0.5)
    memory, plain = Memory(), Memory()
    train_jointly(small_backbone(), pictures, until, run=memory)
    train_jointly(small_backbone(), pictures, replace(until, prior="gaussian"), run=plain)
    for one, other in zip(memory.states[0]["model"].values(), plain.states[0]["model"].values(), strict=True):
        assert torch.equal(one, other)
    assert [abs(line["f_gap"]) > 0 for line in memory.lines] == [False, False, True]


@pytest.mark.parametrize(
    ("changes", "shorts"), [({}, True), ({"chains": "persistent"}, False), ({"space": "z"}, False)]
)
def test_samples_are_of_the_chains_that_f_learned_against(
    changes: dict[str, Any], shorts: bool, pictures: ImageSource
) -> None:
    prior = train_jointly(small_backbone(), pictures, replace(SMALL, iterations=1, **changes))
    assert prior.sampler == (CHAIN if shorts else SamplerConfig())


def test_one_layer(pictures: ImageSource) -> None:
    prior = train_jointly(small_backbone((3,)), pictures, replace(SMALL, posterior="langevin"))
    assert prior.sample(4, seed=0).images.shape == (4, 1, 8, 8)


def test_beside_chains_the_inference_network_learns_alone(pictures: ImageSource) -> None:
    """It moves, by Eq. 19, and nothing that generates depends on it."""
    config = replace(SMALL, posterior="langevin", ema=0.0)
    plain, other = small_backbone(), small_backbone()
    with torch.no_grad():
        for parameter in (*other.encoder.parameters(), *other.posterior.parameters()):
            parameter.mul_(1.5)
    before = fingerprint(plain.encoder)
    one, two = (train_jointly(b, pictures, config) for b in (plain, other))
    assert fingerprint(one.backbone.encoder) != before
    assert fingerprint(one.backbone.encoder) != fingerprint(two.backbone.encoder)
    for part in ("generator", "prior"):
        assert fingerprint(getattr(one.backbone, part)) == fingerprint(getattr(two.backbone, part))
    assert fingerprint(one.energy) == fingerprint(two.energy)


class Poisoned:
    """Images, of which one batch is not finite at its first (or every) reading."""

    name, times = "poisoned", 1

    def __init__(self, images: ImageSource, times: int) -> None:
        self.images, self.times, self.reads = images, times, 0

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Any) -> Tensor:
        self.reads += 1
        batch = self.images.batch(indices)
        if self.reads > 4 and self.times:
            self.times -= 1
            return batch * math.nan
        return batch


def test_a_fall_is_rolled_back_and_a_second_one_ends_the_run(pictures: ImageSource) -> None:
    memory = Memory()
    prior = train_jointly(small_backbone(), Poisoned(pictures, 1), SMALL, validation=pictures, run=memory)
    assert prior.record["rollbacks"] == 1
    assert [line["rate"] for line in memory.lines if "rolled_back" in line] == [0.5]
    with pytest.raises(DivergenceError, match="not finite") as caught:
        train_jointly(small_backbone(), Poisoned(pictures, 99), SMALL, validation=pictures)
    assert isinstance(caught.value.kept, EBMPrior)
    assert caught.value.kept.record["iterations"] % SMALL.evaluate_every == 0  # the last good state


@pytest.mark.long
def test_learning_reaches_the_maximum_likelihood(pictures: ImageSource) -> None:
    """Langevin + Gaussian prior on the linear model: the exact evidence comes within 0.1 nat of its maximum."""
    torch.manual_seed(0)
    truth = LinearGaussian(1, 2, seed=3)
    with torch.no_grad():
        truth.W.mul_(2)
        x = truth.decode(truth.sample(400)).sample().clamp(0, 1)
    best, backbone = (LinearGaussian(1, 2, seed=4) for _ in range(2))
    ascent = torch.optim.LBFGS(best.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        ascent.zero_grad()
        loss = -best.evidence(x).mean()
        loss.backward()
        return loss

    ascent.step(closure)
    chain = SamplerConfig(proposals=1, kernel="pcn-langevin", steps=15, step_size=0.2)
    config = JointConfig(
        posterior="langevin",
        prior="gaussian",
        iterations=300,
        batch_size=200,
        learning_rate=0.02,
        warmup=0,
        ema=0.9,
        evaluate_every=300,
        posterior_chain=chain,
    )
    before = float(backbone.evidence(x).mean().detach())
    trained = train_jointly(backbone, from_array(x[:, 0].numpy()), config).backbone
    assert isinstance(trained, LinearGaussian)
    maximum, reached = float(best.evidence(x).mean()), float(trained.evidence(x).mean())
    assert before < maximum - 1
    assert maximum - 0.1 < reached < maximum + 1e-3


def test_validation_is_the_elbo_with_log_z(pictures: ImageSource) -> None:
    """With a constant energy c, E_q[f] and log Z are both c: the plain ELBO."""
    prior = train_jointly(small_backbone(), pictures, replace(SMALL, prior="gaussian"))
    plain = validate(prior, pictures)
    prior.energy.add(3.0)
    shifted = validate(prior, pictures)
    assert plain["elbo"] == pytest.approx(plain["reconstruction"] - plain["kl"])
    assert shifted["elbo"] == pytest.approx(plain["elbo"], abs=1e-4)
    assert shifted["ess_fraction"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"iterations": 0}, "iterations"),
        ({"posterior": "both"}, "posterior"),
        ({"ema": 1.0}, "ema"),
        ({"refresh": 2.0}, "refresh"),
        ({"energy": EnergyConfig(standardize=True)}, "standardize"),
        ({"space": "z", "prior_chain": replace(CHAIN, proposals=4)}, "proposals"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        replace(SMALL, **changes)


def test_the_published_settings() -> None:
    config = paper_joint()
    assert config.prior_chain.step_size == pytest.approx(0.4**2 / 2)
    assert config.posterior_chain.step_size == pytest.approx(0.1**2 / 2)
    assert (config.space, config.batch_size, config.posterior, config.prior) == ("z", 100, "langevin", "ebm")
