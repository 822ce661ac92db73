"""NVAE: every array of the official code."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from ebm_prior.backbones.likelihoods import Bernoulli
from ebm_prior.backbones.nvae.adapter import NVAE
from ebm_prior.backbones.nvae.distributions import GaussianImage
from ebm_prior.backbones.nvae.network import Features, Network
from tiny_nvae import FIXTURES, REFERENCES, needs_fixtures
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ebm_prior.model.backbone import Gaussian
from ebm_prior.model.batch_norm import readjust_to

Arrays = Mapping[str, np.ndarray]


class Computed:
    """The arrays of a reference file, by their names there without the precision, from the passes of the backbone."""

    def __init__(self, model: NVAE, arrays: Arrays, dtype: torch.dtype) -> None:
        self.model, self.arrays, self.dtype = model, arrays, dtype
        border = model.architecture["padding"]
        self.inner = slice(border, border + model.image_shape[1])
        self.images = self.given("x")[:, :, self.inner, self.inner]  # the fixture's MNIST images have their border
        bits = model.architecture["bits"]
        self.x = self.images if bits == 8 else model.observe(self.images)
        self.out: dict[str, Tensor] = {"x_in": self.x}

    def given(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name]).to(self.dtype)

    def groups(self, name: str) -> list[Tensor]:
        return [self.given(name.format(i)) for i in range(len(self.model.groups))]

    def image_side(self, prefix: str, features: Features) -> Tensor:
        """What the features lead to; returns log p(x | z)."""
        raw = self.model.network.image(features)
        strides = [int(self.arrays[f"{name}_stride"]) for name in ("logits", "mean_image")]
        self.out[prefix + "logits"] = raw[:, :, :: strides[0], :: strides[0]]
        likelihood = self.model.likelihood(features)
        log_px = self.out[prefix + "log_px"] = likelihood.log_prob(self.x)
        mean = likelihood.mean
        if isinstance(likelihood, Bernoulli):  # the official mean keeps the border that the likelihood cuts off
            whole = Bernoulli(raw).mean
            torch.testing.assert_close(whole[:, :, self.inner, self.inner], mean)
            mean = whole
        self.out[prefix + "mean_image"] = mean
        self.out[prefix + "mean_image_strided"] = mean[:, :, :: strides[1], :: strides[1]]
        if isinstance(likelihood, GaussianImage):
            self.out[prefix + "log_px_vaebm"] = GaussianImage(raw, log_std_floor=-2).log_prob(self.x)
        return log_px

    def prior(self, temperature: float) -> None:
        prefix = f"prior/T{temperature}/"
        eps = [e.requires_grad_() for e in self.groups("prior/g{}/eps")]
        trace = self.model.transform(eps, temperature=temperature)
        tempered = [
            Gaussian(p.mean.expand_as(z), (temperature * p.std).expand_as(z))
            for p, z in zip(trace.priors, trace.z, strict=True)
        ]
        log_p = torch.stack([p.log_prob(z) for p, z in zip(tempered, trace.z, strict=True)], 1)
        self.out |= {prefix + "log_p_group": log_p, prefix + "log_p": log_p.sum(1)}
        functional = sum((z * w).sum() for z, w in zip(trace.z, self.groups("prior/g{}/w"), strict=True))
        gradients = {"wz": functional, "logp": log_p.sum()}
        for name, value in gradients.items():
            for i, gradient in enumerate(torch.autograd.grad(value, eps, retain_graph=True)):
                self.out[f"{prefix}g{i}/grad_eps_{name}"] = gradient
        for i, (p, z) in enumerate(zip(tempered, trace.z, strict=True)):
            self.out |= {f"{prefix}g{i}/mean": p.mean, f"{prefix}g{i}/std": p.std, f"{prefix}g{i}/z": z}
        self.image_side(prefix, trace.features)

    def posterior(self, monkeypatch: pytest.MonkeyPatch) -> None:
        met: list[tuple[Gaussian, Tensor]] = []
        posterior, flow = Network.posterior, Network.flow
        qs: list[Gaussian] = []
        monkeypatch.setattr(Network, "posterior", lambda *a: qs.append(posterior(*a)) or qs[-1])
        monkeypatch.setattr(Network, "flow", lambda *a: met.append((qs[-1], a[2])) or flow(*a))
        found = self.model.infer(self.x, noise=self.groups("post/g{}/noise"))
        priors = self.model.trace(lambda i, _, __: found.z[i], len(self.x)).priors
        analytic = []
        for i, ((q, before), p, z) in enumerate(zip(met, priors, found.z, strict=True)):
            p = Gaussian(*(t.expand_as(z) for t in p))
            self.out |= {f"post/g{i}/q_mean": q.mean, f"post/g{i}/q_std": q.std, f"post/g{i}/z": z}
            self.out |= {f"post/g{i}/p_mean": p.mean, f"post/g{i}/p_std": p.std, f"post/g{i}/z_before_flow": before}
            analytic.append(kl_divergence(Normal(*q), Normal(*p)).flatten(1).sum(1))
        sampled = found.log_q - found.log_p
        self.out["post/kl_group_analytic"] = torch.stack(analytic, 1)
        kl = self.out["post/kl_group"] = sampled if self.model.architecture["flows"] else torch.stack(analytic, 1)
        self.out |= {"post/log_q_group": found.log_q, "post/log_q": found.log_q.sum(1)}
        self.out |= {"post/log_p_group": found.log_p, "post/log_p": found.log_p.sum(1)}
        log_px = self.image_side("post/", found.features)
        self.out |= {"post/nelbo": kl.sum(1) - log_px, "post/log_iw": log_px - sampled.sum(1)}


def difference(found: Tensor, expected: np.ndarray) -> float:
    """The largest one, relative to the largest entry."""
    assert found.shape == expected.shape
    return float(np.abs(found.detach().numpy() - expected).max() / (np.abs(expected).max() or 1.0))


@needs_fixtures
@pytest.mark.parametrize(
    ("dtype", "prefix", "tolerance"), [(torch.float64, "f64/", 1e-9), (torch.float32, "f32/", 1e-5)]
)
@pytest.mark.parametrize("name", REFERENCES)
def test_agrees_with_every_array_of_the_official_code(
    name: str, dtype: torch.dtype, prefix: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = dict(np.load(FIXTURES / name / "reference.npz"))
    model = NVAE.load_official(FIXTURES / name / "checkpoint.pt").to(dtype).requires_grad_(False)
    assert model.architecture["groups_per_scale"] == list(arrays["groups_per_scale"])
    assert [group.shape for group in model.groups] == list(map(tuple, arrays["z_shapes"]))
    computed = Computed(model, arrays, dtype)
    for temperature in arrays["temperatures"]:
        computed.prior(float(temperature))
    computed.posterior(monkeypatch)
    wanted = {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}
    assert wanted.keys() <= computed.out.keys()
    wrong = {key: d for key, array in wanted.items() if not (d := difference(computed.out[key], array)) <= tolerance}
    assert not wrong


@needs_fixtures
def test_batch_norm_readjusts_as_in_the_official_code() -> None:
    arrays = dict(np.load(FIXTURES / "mnist" / "reference.npz"))
    model = NVAE.load_official(FIXTURES / "mnist" / "checkpoint.pt").double()
    computed = Computed(model, arrays, torch.float64)
    before = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    draws = [computed.groups(f"bn/iter{k}/g{{}}/eps") for k in range(int(arrays["bn/num_iter"]))]
    temperature = float(arrays["bn/temperature"])
    met = readjust_to(model, draws, temperature=temperature)
    assert {name.split(".")[1] for name in met} == {"dec_tower", "post_process"}
    assert not model.training

    after = {key[len("bn/after/") :]: array for key, array in arrays.items() if key.startswith("bn/after/")}
    logits = after.pop("logits_T0.7")
    for key, tensor in model.network.state_dict().items():
        if key in after:
            assert difference(tensor, after.pop(key)) <= 1e-9, key
        elif not key.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[key]), key
    assert not after
    computed.prior(temperature)
    assert difference(computed.out["prior/T0.7/logits"], logits) <= 1e-9
