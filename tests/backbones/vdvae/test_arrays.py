"""VDVAE: every array of the official code, and the published CIFAR-10 network at full size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from ebm_prior.backbones import likelihoods
from ebm_prior.backbones.vdvae.adapter import VDVAE
from ebm_prior.backbones.vdvae.network import Features, Network, TopDownBlock
from ebm_prior.backbones.vdvae.published import PUBLISHED
from tiny_vdvae import FIXTURES, REFERENCES, needs_fixtures, official
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ebm_prior.model.backbone import Gaussian, Posterior, Trace

Arrays = Mapping[str, np.ndarray]
GIVEN = ("x", "x_uint8", "groups", "posterior_draw_order", "z_shapes", "temperatures", "params_stride", "manual/given")
"""Arrays that are given to both sides, as are those that begin as follows."""
GIVEN_PREFIXES = ("prior/eps/", "post/noise/", "grad/w/", "sample/u_")


class Computed:
    """The arrays of a reference file, by their names there without "f64/", from the passes of the backbone."""

    def __init__(self, model: VDVAE, arrays: Arrays, dtype: torch.dtype) -> None:
        self.model, self.arrays, self.dtype = model, arrays, dtype
        self.names = [group.name for group in model.groups]
        self.x, self.noise = self.given("x"), self.groups("post/noise")
        self.out: dict[str, Tensor] = {
            "x_in": self.strided("f64/x_in", model.network.architecture.pixels.normalised(self.x))
        }
        bits = model.network.architecture.pixels.bits
        step = 2 ** (8 - bits)
        self.out["x_target"] = ((255 * self.x).round() / step).floor() * step / 127.5 - 1

    def given(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name]).to(self.dtype)

    def groups(self, prefix: str) -> list[Tensor]:
        return [self.given(f"{prefix}/{name}") for name in self.names]

    def strided(self, name: str, whole: Tensor) -> Tensor:
        stride = whole.shape[-1] // self.arrays[name].shape[-1]
        return whole[:, :, ::stride, ::stride]

    def add(self, prefix: str, tensors: Sequence[Tensor]) -> None:
        self.out |= {f"{prefix}/{name}": tensor for name, tensor in zip(self.names, tensors, strict=True)}

    def image_side(self, prefix: str, features: Features) -> Tensor:
        """What the features lead to; returns log p(x | z)."""
        self.out[f"{prefix}/params"] = self.strided(f"f64/{prefix}/params", self.model.running.decoder.image(features))
        log_px = self.out[f"{prefix}/log_px"] = self.model.likelihood(features).log_prob(self.x)
        return log_px

    def prior(self) -> None:
        """At temperature 1: z, its priors and densities, the image, gradients; then z at other temperatures."""
        eps = [e.requires_grad_() for e in self.groups("prior/eps")]
        trace = self.model.transform(eps)
        self.add("prior/z", trace.z)
        self.add("prior/mean", [p.mean.expand_as(z) for p, z in zip(trace.priors, trace.z, strict=True)])
        self.add("prior/std", [p.std.expand_as(z) for p, z in zip(trace.priors, trace.z, strict=True)])
        self.add("prior/log_p", list(trace.log_prior.T))
        self.image_side("prior", trace.features)
        loss = sum((w * z).sum() for w, z in zip(self.groups("grad/w"), trace.z, strict=True))
        assert isinstance(loss, Tensor)
        self.out["grad/loss"] = loss
        self.add("grad/deps", torch.autograd.grad(loss, eps))

        cool = self.model.transform(eps, temperature=0.7)
        tempered = [Gaussian(p.mean, 0.7 * p.std) for p in cool.priors]
        self.add("prior/T0.7/z", cool.z)
        self.add("prior/T0.7/std", [p.std.expand_as(z) for p, z in zip(tempered, cool.z, strict=True)])
        self.add("prior/T0.7/log_p", [p.log_prob(z) for p, z in zip(tempered, cool.z, strict=True)])
        self.out["prior/T0.7/log_px"] = self.model.likelihood(cool.features).log_prob(self.x)
        temperatures = self.arrays["temperatures"]
        self.add("prior/Tlist/z", self.drawn(lambda i, p: p.mean + float(temperatures[i]) * p.std * eps[i]).z)

    def drawn(self, draw: object) -> Trace:
        return self.model.trace(lambda i, prior, _: draw(i, prior), len(self.x))  # type: ignore[operator]

    def posterior(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """z, both Gaussians and their densities, what the official code reports, the image, and continued draws."""
        qs: list[Gaussian] = []
        posterior = Network.posterior
        monkeypatch.setattr(Network, "posterior", lambda *a: qs.append(posterior(*a)) or qs[-1])
        found = self.model.infer(self.x, noise=self.noise)
        priors = self.model.given(found.z).priors
        ps = [Gaussian(*(t.expand_as(z) for t in p)) for p, z in zip(priors, found.z, strict=True)]
        kl = [kl_divergence(Normal(*q), Normal(*p)).flatten(1).sum(1) for q, p in zip(qs, ps, strict=True)]
        for name, pairs in {"q": qs, "p": ps}.items():
            self.add(f"post/{name}_mean", [pair.mean for pair in pairs])
            self.add(f"post/{name}_std", [pair.std for pair in pairs])
        self.add("post/z", found.z)
        self.add("post/log_q", list(found.log_q.T))
        self.add("post/log_p", list(found.log_p.T))
        self.add("post/kl", kl)
        self.reported(found, torch.stack(kl).sum(0))
        eps, given = self.groups("prior/eps"), int(self.arrays["manual/given"])
        drawn = self.drawn(lambda i, p: found.z[i] if i < given else p.mean + 0.1 * p.std * eps[i])
        self.add("manual/z", drawn.z)

    def reported(self, found: Posterior, kl: Tensor) -> None:
        log_px, dimensions = self.image_side("post", found.features), self.x[0].numel()
        elbo_kl = log_px - kl
        self.out |= {"post/elbo": log_px + (found.log_p - found.log_q).sum(1), "post/elbo_kl": elbo_kl}
        self.out["post/bits_per_dim"] = -elbo_kl / dimensions / np.log(2)
        official = {"elbo": -elbo_kl, "distortion": -log_px, "rate": kl}
        self.out |= {f"post/official/{name}": value.mean() / dimensions for name, value in official.items()}
        self.out["post/mean_image"] = self.model.likelihood(found.features).mean

    def inside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The encoder's activations, and the streams after the blocks of the posterior pass."""
        streams: list[Tensor] = []
        forward = TopDownBlock.forward
        monkeypatch.setattr(TopDownBlock, "forward", lambda *a: streams.append(forward(*a)) or streams[-1])
        self.model.likelihood(self.model.infer(self.x, noise=self.noise).features)
        self.add("debug/block", streams)
        self.out |= {f"debug/acts/{side}": t for side, t in self.model.running.encoder(self.x).items()}

    def sample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One image of p(x | z), with the numbers that the official sampler was given."""
        recorded = iter(
            [
                (self.given(f"sample/u_{what}").permute(0, 3, 1, 2) - 1e-5) / (1 - 2e-5)
                for what in ("select", "logistic")
            ]
        )
        monkeypatch.setattr(likelihoods, "uniform", lambda shape, *_, **__: next(recorded).reshape(shape))
        image = self.model.decode([self.out[f"prior/z/{name}"] for name in self.names]).sample()
        self.out["sample/image"] = 2 * image - 1
        self.out["sample/uint8"] = (255 * image).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def difference(found: Tensor, expected: np.ndarray) -> float:
    """The largest one, relative to the largest entry."""
    assert found.shape == expected.shape
    return float(np.abs(found.detach().double().numpy() - expected).max() / (np.abs(expected).max() or 1.0))


def computed(model: VDVAE, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Computed, Arrays]:
    arrays = dict(np.load(FIXTURES / name / "reference.npz"))
    assert list(arrays["groups"]) == list(arrays["posterior_draw_order"]) == [group.name for group in model.groups]
    assert [group.shape for group in model.groups] == list(map(tuple, arrays["z_shapes"]))
    result = Computed(model, arrays, dtype)
    result.prior()
    for step in (result.posterior, result.inside, result.sample):
        with monkeypatch.context() as patch:
            step(patch)
    return result, arrays


@needs_fixtures
@pytest.mark.parametrize("name", REFERENCES)
def test_agrees_with_every_array_of_the_official_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64; arrays that are stored rounded agree to this."""
    model = official(name).double().requires_grad_(False)
    found, arrays = computed(model, name, torch.float64, monkeypatch)
    left = {key for key in arrays if key not in GIVEN and not key.startswith(GIVEN_PREFIXES)}
    wrong = {}
    for key in left:
        error = difference(found.out[key.removeprefix("f64/")], arrays[key])
        if not error <= (1e-9 if key.startswith("f64/") else 2e-5):
            wrong[key] = error
    assert wrong == {}


@needs_fixtures
@pytest.mark.parametrize("form", [pytest.param("as trained", marks=pytest.mark.long), "for inference"])
@pytest.mark.parametrize("name", REFERENCES)
def test_float32_agrees_to_its_rounding(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = official(name).requires_grad_(False)
    model = model if form == "as trained" else cast(VDVAE, model.for_inference())
    found, arrays = computed(model, name, torch.float32, monkeypatch)
    keys = {key for key in arrays if key.startswith("f64/")} - {
        "f64/sample/image",
        "f64/sample/uint8",
    }  # may round apart
    wrong = {key: d for key in keys if not (d := difference(found.out[key[4:]], arrays[key])) <= 2e-5}
    assert wrong == {}


# The published CIFAR-10 network: weights, latents and an image from formulas.


def drawn(number: int, half_width: float, shape: Sequence[int]) -> np.ndarray:
    """U(j, a) of the fixture's description."""
    return half_width * (2 * np.random.RandomState(number).random_sample(tuple(shape)) - 1)


def weight(number: int, key: str, shape: Sequence[int]) -> np.ndarray:
    if key == "decoder.gain":
        return 1 + drawn(number, 0.1, shape)
    if key.endswith(".bias"):
        return drawn(number, 0.1, shape)
    if key.startswith("decoder.bias_xs."):
        return drawn(number, 0.5, shape)
    k = 0.1 if ".c4." in key or ".z_proj." in key else 0.5 if ".out_conv." in key else 1.4
    return drawn(number, k * (3 / np.prod(shape[1:])) ** 0.5, shape)


def summaries(tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
    flat = [tensor.flatten() for tensor in tensors]
    return {
        "sum": np.array([float(t.sum()) for t in flat]),
        "sum_of_squares": np.array([float(t.square().sum()) for t in flat]),
        "first": np.array([float(t[0]) for t in flat]),
        "last": np.array([float(t[-1]) for t in flat]),
    }


def published_cifar10() -> VDVAE:
    """The network in float64, with the weights of the formulas."""
    with torch.device("meta"):
        model = VDVAE(data_set="cifar10", **PUBLISHED["cifar10"])
    shapes = {key: tuple(tensor.shape) for key, tensor in model.network.state_dict().items()}
    state = {key: torch.from_numpy(weight(j, key, shapes[key])) for j, key in enumerate(sorted(shapes))}
    model.network.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def latents(model: VDVAE, first: int) -> list[Tensor]:
    return [torch.from_numpy(drawn(first + g, 1.7, (1, *group.shape))) for g, group in enumerate(model.groups)]


def prior_pass(model: VDVAE) -> dict[str, Any]:
    trace = model.transform(latents(model, 10_000))
    parameters = model.network.decoder.image(trace.features)
    found: dict[str, Any] = {f"prior/z/{k}": v for k, v in summaries(trace.z).items()}
    found |= {f"prior/std/{k}": v for k, v in summaries([p.std for p in trace.priors]).items()}
    return found | {"prior/params/corner": parameters[0, :, 0, 0], "prior/params/sum": parameters.sum()}


def posterior_pass(model: VDVAE, x: Tensor) -> dict[str, Any]:
    activations, qs, priors = model.network.encoder(x), list[Gaussian](), list[Gaussian]()
    noise = latents(model, 20_000)

    def draw(index: int, prior: Gaussian, stream: Tensor) -> Tensor:
        q = model.network.posterior(index, activations, stream)
        qs.append(q)
        priors.append(prior)
        return q.mean + q.std * noise[index]

    inferred = model.trace(draw, 1)
    kl = [kl_divergence(Normal(*q), Normal(*p)).sum() for q, p in zip(qs, priors, strict=True)]
    found: dict[str, Any] = {f"post/z/{k}": v for k, v in summaries(inferred.z).items()}
    found |= {f"acts/{side}/sum_of_squares": t.square().sum() for side, t in activations.items()}
    log_px = model.likelihood(inferred.features).log_prob(x).squeeze()
    return found | {"post/kl": torch.stack(kl), "post/log_px": log_px}


@needs_fixtures
@pytest.mark.parametrize("path", ["prior", pytest.param("post", marks=pytest.mark.long)])
@torch.no_grad()
def test_the_published_cifar10_network_at_full_size(path: str) -> None:
    arrays = dict(np.load(FIXTURES / "published" / "cifar10-formula.npz"))
    x = torch.from_numpy(arrays.pop("x_uint8")).permute(0, 3, 1, 2).double() / 255
    model = published_cifar10()
    found = prior_pass(model) if path == "prior" else posterior_pass(model, x)
    assert found.keys() == {key for key in arrays if key.startswith("prior") == (path == "prior")}
    wrong = {k: d for k, v in found.items() if not (d := difference(torch.as_tensor(v), arrays[k])) <= 1e-9}
    assert wrong == {}
