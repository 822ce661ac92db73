"""Joint training: its products, resume, rollback, chains, graphs, and what is watched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from ebm_prior.backbones.shallow import ShallowGenerator
from own_images import Own
from played_graphs import Played
from torch import Tensor, nn
from toys import LinearGaussian

from ebm_prior.compute.cuda_graphs import Graphs
from ebm_prior.data.images import ImageSource, from_array
from ebm_prior.errors import ConfigurationError, DataError, DivergenceError
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import ANCESTRAL, EBMPrior
from ebm_prior.model.samplers import GraphedPotential, SamplerConfig
from ebm_prior.storage.weights import fingerprint
from ebm_prior.training import joint, joint_chains
from ebm_prior.training.joint import JointTraining, train_jointly, validate
from ebm_prior.training.joint_config import JointConfig, paper_joint
from ebm_prior.training.steps import batch_indices

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


@pytest.mark.parametrize("place", ["first", "late", "validation"])
def test_images_that_are_none_are_an_error_with_their_number(place: str, pictures: ImageSource) -> None:
    own = Own.of(pictures, 5 if place == "first" else 90)
    training, validation = (pictures, own) if place == "validation" else (own, pictures)
    with pytest.raises(DataError, match=r"my own: expected float images in \[0, 1\], found NaN .* in image (5|90) "):
        train_jointly(small_backbone(), training, replace(SMALL, iterations=20), validation=validation)


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


def test_a_state_has_the_names_that_earlier_versions_gave(pictures: ImageSource) -> None:
    """So that a run that one of these began can be resumed."""
    names = ["iteration", "rate", "rollbacks", "model", "average", "optimizer", "persistent"]
    assert list(JointTraining(small_backbone(), pictures, SMALL, pictures).state()) == names


@pytest.mark.parametrize("product", PRODUCTS)
def test_replayed_graphs_train_the_same(
    product: str, played: None, pictures: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, energy_from=0.5, **PRODUCTS[product])
    plain = train_jointly(small_backbone(), pictures, config)
    monkeypatch.setattr(joint, "runner", lambda device: Graphs().run)
    monkeypatch.setattr(joint_chains, "graphed", lambda potential, device: GraphedPotential(potential))
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


def test_rates_warm_up_fall_along_a_cosine_and_halve_after_a_fall(pictures: ImageSource) -> None:
    config = replace(SMALL, iterations=8, warmup=4, learning_rate=0.01, energy_learning_rate=0.001)
    training = JointTraining(small_backbone(), pictures, config, pictures)

    def rates() -> list[float]:
        training.step()
        return [group["lr"] for group in training.optimizer.param_groups]

    for t in range(6):
        if t == 5:
            training.restore(training.state() | {"rate": 0.5})
        share = (0.5 if t == 5 else 1) * min(1, (t + 1) / 4) * 0.5 * (1 + math.cos(math.pi * t / 8))
        assert rates() == pytest.approx([0.01 * share, 0.001 * share])


@pytest.mark.parametrize(("refresh", "goes_on"), [(0.0, True), (1.0, False)])
def test_persistent_chains_go_on_from_their_ends(refresh: float, goes_on: bool, pictures: ImageSource) -> None:
    still = replace(CHAIN, steps=1, step_size=1e-8)
    config = replace(SMALL, chains="persistent", refresh=refresh, prior_chain=still, learning_rate=1e-9)
    training = JointTraining(small_backbone(), pictures, config, pictures)
    ends = [[e.clone() for e in training.chains.persistent] for _ in range(2) if training.step()]
    near = all(torch.allclose(one, other, atol=0.01) for one, other in zip(*ends, strict=True))
    assert near == goes_on


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prior_chain": replace(CHAIN, steps=9, step_size=2.0)}, "chains left the typical set"),
        ({"energy_learning_rate": 1e6}, "energy's gap"),
    ],
)
def test_what_runs_away_is_stopped(changes: dict[str, Any], said: str, pictures: ImageSource) -> None:
    with pytest.raises(DivergenceError, match=said):
        train_jointly(small_backbone(), pictures, replace(SMALL, **changes))


def test_training_sees_observations(pictures: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a binary backbone, say, draws of pixels."""
    monkeypatch.setattr(ShallowGenerator, "observe", lambda self, images, *, generator=None: 1 - images)
    training = JointTraining(small_backbone(), pictures, SMALL, pictures)
    plain = pictures.batch(batch_indices(len(pictures), SMALL.batch_size, 0, SMALL.seed))
    assert torch.equal(training._batch(0)[0], 1 - plain)


def test_a_penalty_holds_the_energy_and_nothing_else(pictures: ImageSource) -> None:
    def found(penalty: float) -> dict[int, Tensor]:
        training = JointTraining(small_backbone(), pictures, replace(SMALL, penalty=penalty), pictures)
        with torch.no_grad():
            for k, parameter in enumerate(training.network.energy.parameters()):  # else f is 0
                parameter.normal_(generator=torch.Generator().manual_seed(k))
        x, generator = training._batch(0)
        negative = training.chains.of_prior(len(x), training.energy, generator)
        return training._differentiate((x, [], negative), generator).gradients

    without, within = found(0.0), found(1.0)
    own = len(list(small_backbone().parameters()))
    assert all(torch.equal(without[index], within[index]) for index in without if index < own)
    assert any(not torch.equal(without[index], within[index]) for index in without if index >= own)


class Normed(ShallowGenerator):
    """A batch norm between z2 and z1."""

    def __init__(self) -> None:
        super().__init__((1, 8, 8), (4, 3), width=4, hidden=6)
        self.norm = nn.BatchNorm1d(3)
        self.prior[0] = nn.Sequential(self.norm, self.prior[0])


def test_batch_norms_learn_from_posterior_latents_alone(pictures: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    backbone = Normed()
    training = JointTraining(backbone, pictures, SMALL, pictures)
    drawn, met = list[Tensor](), list[Tensor]()
    draws = training.chains.of_prior

    def noted(n: int, energy: JointEnergy | None, generator: torch.Generator) -> list[Tensor]:
        negative = draws(n, energy, generator)
        drawn.append(negative[0])
        return negative

    monkeypatch.setattr(training.chains, "of_prior", noted)
    backbone.norm.register_forward_hook(
        lambda norm, given, _: met.append(given[0].detach().clone()) if norm.training else None
    )
    training.step()
    assert len(met) == len(drawn) == 1
    assert not torch.equal(met[0], drawn[0])


def test_a_picture_is_seen_before_its_state_is_kept(pictures: ImageSource) -> None:
    """Killed in between, it is drawn again by the run that goes on."""
    memory, pictured = Memory(crash_after=1), list[int]()
    with pytest.raises(Crash):
        train_jointly(
            small_backbone(), pictures, SMALL, run=memory, on_evaluate=lambda shown: pictured.append(shown["iteration"])
        )
    assert pictured == [2]


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
    ("changes", "sampler"),
    [
        ({}, CHAIN),
        ({"chains": "persistent"}, SamplerConfig()),
        ({"space": "z"}, SamplerConfig()),
        ({"prior": "gaussian"}, ANCESTRAL),
    ],
)
def test_samples_are_of_the_chains_that_f_learned_against(
    changes: dict[str, Any], sampler: SamplerConfig, pictures: ImageSource
) -> None:
    prior = train_jointly(small_backbone(), pictures, replace(SMALL, iterations=1, **changes))
    assert prior.sampler == sampler


def test_one_layer(pictures: ImageSource) -> None:
    prior = train_jointly(small_backbone((3,)), pictures, replace(SMALL, posterior="langevin"))
    assert prior.sample(4, seed=0).images.shape == (4, 1, 8, 8)


@pytest.mark.parametrize("clip", [200.0, 0.5])
def test_beside_chains_the_inference_network_learns_alone(clip: float, pictures: ImageSource) -> None:
    """It moves, by Eq. 19, and nothing that generates depends on it."""
    config = replace(SMALL, posterior="langevin", ema=0.0, gradient_clip=clip)
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


def test_the_generative_side_and_omega_are_clipped_each(pictures: ImageSource) -> None:
    config = replace(SMALL, posterior="langevin", gradient_clip=0.5)
    backbone = small_backbone()
    JointTraining(backbone, pictures, config, pictures).step()
    for parts in ((backbone.generator, backbone.prior), (backbone.encoder, backbone.posterior)):
        gradients = [p.grad for part in parts for p in part.parameters() if p.grad is not None]
        assert float(nn.utils.get_total_norm(gradients)) == pytest.approx(0.5, rel=1e-4)


class Poisoned:
    """Images, of which one batch is not finite at its first (or every) reading."""

    name, times = "poisoned", 1
    looks_itself = True  # so that nobody else does

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
