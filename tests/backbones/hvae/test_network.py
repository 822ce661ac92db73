"""HVAE: the official code's arrays, architectures, the contract, and training from scratch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ebm_prior.backbones.hvae.adapter import HVAE
from ebm_prior.backbones.hvae.network import GaussianHead
from ebm_prior.backbones.likelihoods import Bernoulli
from tiny_hvae import FIXTURES, REFERENCES, initialised, needs_fixtures, tiny
from torch import Tensor

from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Trace
from ebm_prior.testing.contract import check_backbone

# The official code's numbers.


INPUTS = ("x", "groups", "posterior_draw_order", "prior/eps/", "post/noise/", "grad/w/")


def official_scores(model: HVAE, x: Tensor, noise: Sequence[Tensor], k: int) -> tuple[Trace, Tensor, Tensor]:
    """L^{>k} as hvae-oodd computes it: below and at k, means of q on the way up and of p on the way down."""
    upper = len(model.groups) - k
    draw = model.encode(x, [xi if i < upper else torch.zeros_like(xi) for i, xi in enumerate(noise)])
    trace = model.trace(lambda i, p, context: draw(i, p, context) if i < upper else p.mean, len(x))
    log_px = model.likelihood(trace.features).log_prob(x)
    return trace, log_px, log_px + (trace.log_prior[:, :upper] - torch.stack(draw.log_q, 1)).sum(1)


def computed_arrays(
    model: HVAE, arrays: dict[str, np.ndarray], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> dict[str, np.ndarray]:
    """Every array of a reference file, by its name there, from the public passes of the backbone."""
    names = [group.name for group in model.groups]

    def given(prefix: str) -> list[Tensor]:
        return [torch.from_numpy(arrays[prefix + name]).to(dtype) for name in names]

    def parameters(distribution: Any) -> Tensor:
        if isinstance(distribution, Bernoulli):
            return distribution.logits
        assert distribution is not None
        return recorded["likelihood.parameter_net"]

    recorded, posteriors, out = {}, [], {}
    for path in [key[len("debug/") :] for key in arrays if key.startswith("debug/")] + ["likelihood.parameter_net"]:
        model.network.get_submodule(path).register_forward_hook(lambda _, __, y, path=path: recorded.update({path: y}))
    original = GaussianHead.posterior
    monkeypatch.setattr(GaussianHead, "posterior", lambda *a: posteriors.append(original(*a)) or posteriors[-1])

    x = torch.from_numpy(arrays["x"]).to(dtype)
    eps = [e.requires_grad_() for e in given("prior/eps/")]
    trace = model.transform(eps)
    distribution = model.likelihood(trace.features)
    out["prior/params"] = parameters(distribution)
    out["prior/log_px"] = distribution.log_prob(x)
    out["grad/loss"] = sum((z * w).sum() for z, w in zip(trace.z, given("grad/w/"), strict=True))
    gradients = torch.autograd.grad(out["grad/loss"], eps)
    for i, name in enumerate(names):
        out[f"prior/mean/{name}"] = trace.priors[i].mean.expand_as(trace.z[i])
        out[f"prior/std/{name}"] = trace.priors[i].std.expand_as(trace.z[i])
        out[f"prior/z/{name}"] = trace.z[i]
        out[f"grad/deps/{name}"] = gradients[i]

    noise = given("post/noise/")
    posterior = model.infer(x, noise=noise)
    priors = model.trace(lambda i, _, __: posterior.z[i], len(x)).priors
    distribution = model.likelihood(posterior.features)
    out["post/params"] = parameters(distribution)
    out["post/log_px"] = distribution.log_prob(x)
    out["post/elbo"] = out["post/log_px"] + (posterior.log_p - posterior.log_q).sum(1)
    out.update({f"debug/{path}": y for path, y in recorded.items() if path != "likelihood.parameter_net"})
    for i, (name, q) in enumerate(zip(names, posteriors[::-1], strict=True)):
        out |= {f"post/q_mean/{name}": q.mean, f"post/q_std/{name}": q.std, f"post/z/{name}": posterior.z[i]}
        out |= {f"post/log_q/{name}": posterior.log_q[:, i], f"post/log_p/{name}": posterior.log_p[:, i]}
        out[f"post/p_mean/{name}"] = priors[i].mean.expand_as(posterior.z[i])
        out[f"post/p_std/{name}"] = priors[i].std.expand_as(posterior.z[i])

    for k in range(len(names)):
        trace, out[f"lk/log_px/{k}"], out[f"lk/value/{k}"] = official_scores(model, x, noise, k)
        out |= {f"lk/z/{k}/{name}": z for name, z in zip(names, trace.z, strict=True)}
    return {name: tensor.detach().numpy() for name, tensor in out.items()}


@needs_fixtures
@pytest.mark.parametrize(("dtype", "prefix", "tolerance"), [(torch.float64, "f64/", 1e-9), (torch.float32, "", 2e-5)])
@pytest.mark.parametrize("name", REFERENCES)
def test_agrees_with_every_array_of_the_official_code(
    name: str, dtype: torch.dtype, prefix: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = dict(np.load(FIXTURES / name / "reference.npz"))
    model = HVAE.load_official(FIXTURES / name).to(dtype)
    assert [group.name for group in model.groups] == list(arrays["groups"])
    wanted = {
        key[len(prefix) :]: array
        for key, array in arrays.items()
        if key.startswith(prefix) and (prefix or not key.startswith(("f64/", *INPUTS)))
    }
    computed = computed_arrays(model, arrays, dtype, monkeypatch)
    assert wanted.keys() <= computed.keys()
    for key, array in wanted.items():
        assert computed[key].shape == array.shape, key
        scale = np.abs(array).max() or 1.0
        assert np.abs(computed[key] - array).max() <= tolerance * scale, key


# Architectures.


PUBLISHED = {
    "FashionMNIST": ([1, 28, 28], "bernoulli", 64, (2, 2, 1), ((8, 3), (16, None), (8, None)), 2_620_258, 207),
    "CIFAR10": ([3, 32, 32], "logistic_mixture", 256, (2, 2, 2), ((128, 3), (64, 3), (32, None)), 37_013_064, 199),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_have_the_published_size(name: str) -> None:
    image_shape, likelihood, filters, strides, latents, parameters, entries = PUBLISHED[name]
    stages = [
        {
            "blocks": [{"filters": filters, "kernel": kernel, "stride": s} for s in (1, 1, stride)],
            "latent": {"features": features, "kernel": latent_kernel},
        }
        for kernel, stride, (features, latent_kernel) in zip((5, 3, 3), strides, latents, strict=True)
    ]
    with torch.device("meta"):
        model = HVAE(image_shape, likelihood, stages)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.network.state_dict()) == entries


def test_shapes_that_cannot_meet_are_refused() -> None:
    stages = tiny().architecture["stages"]
    with pytest.raises(ConfigurationError, match="strides divide, found size 7"):
        tiny(image_shape=[1, 7, 7])
    with pytest.raises(ConfigurationError, match="square"):
        tiny(image_shape=[1, 8, 4])
    wide = [stages[0], {**stages[1], "blocks": [{"filters": 5, "kernel": 3}, {"filters": 4, "kernel": 3, "stride": 2}]}]
    with pytest.raises(ConfigurationError, match="as many filters"):
        tiny(stages=wide)
    queue = [{**stages[0], "blocks": [{"filters": 4, "kernel": 3}] * 2 + stages[0]["blocks"]}, stages[1]]
    with pytest.raises(ConfigurationError, match="turn in the queue"):
        tiny(stages=queue)
    with pytest.raises(ConfigurationError, match="skips: expected true or false, found 'no'"):
        tiny(skips="no")
    with pytest.raises(ConfigurationError, match="expected options among"):
        tiny(stages=[{"blocks": [{"filter": 4}], "latent": {"features": 1}}])


def test_without_skips_no_block_has_an_auxiliary_input() -> None:
    def auxiliary_layers(**options: Any) -> set[str]:
        early = [{"filters": 4, "kernel": 3, "stride": 2}, {"filters": 4, "kernel": 3}]
        stages = [{"blocks": early, "latent": {"features": 2, "kernel": 3}}] * 2
        model = initialised(tiny(stages=stages, **options))
        return {key.partition(".aux_op")[0] for key in model.network.state_dict() if "aux_op" in key}

    assert auxiliary_layers() == {"stages.1.q_deterministic.layers.1"}
    assert auxiliary_layers(skips=False) == set()


# The contract.


@pytest.mark.parametrize(
    "changes",
    [
        {"image_shape": [3, 8, 8], "likelihood": "logistic_mixture"},
        {"activation": "Swish", "q_dropout": 0.1, "p_dropout": 0.2, "skips": False},
    ],
    ids=["colours", "without skips"],
)
def test_keeps_the_backbone_contract(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    check_backbone(initialised(tiny(**changes)))


def test_gradients_of_the_reparameterization_reach_every_noise() -> None:
    torch.manual_seed(0)
    model = initialised(tiny(activation="Tanh")).double()  # smooth, so that finite differences apply
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    eps = [e.requires_grad_() for e in model.standard_normal(2)]
    assert torch.autograd.gradcheck(lambda *e: tuple(model.reparameterize(e)), eps)
    upper, lower = torch.autograd.grad(model.reparameterize(eps)[1].sum(), eps)
    assert upper.abs().min() > 0
    assert lower.abs().min() > 0


def test_zero_noise_gives_the_posterior_mean() -> None:
    torch.manual_seed(0)
    model = initialised(tiny()).double()
    x = model.observe(torch.rand(4, 1, 8, 8, dtype=torch.float64))
    noise = model.standard_normal(4)
    zero = [noise[0], torch.zeros_like(noise[1])]  # z1, the lower group: nothing that it depends on is drawn
    centre = model.infer(x, noise=zero).z[1]
    pair = [model.infer(x, noise=[noise[0], sign * noise[1]]).z[1] for sign in (1, -1)]
    torch.testing.assert_close((pair[0] + pair[1]) / 2, centre)
    assert not torch.allclose(pair[0], centre)


# Training from scratch.


def negative_elbo(model: HVAE, images: Tensor) -> Tensor:
    posterior = model.infer(images)
    return -(model.likelihood(posterior.features).log_prob(images) + (posterior.log_p - posterior.log_q).sum(1)).mean()


def test_a_new_network_sets_itself_up_on_its_first_batch_and_learns() -> None:
    torch.manual_seed(0)
    model = tiny().train()
    images = F.interpolate((torch.rand(64, 1, 2, 2) < 0.5).float(), scale_factor=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = negative_elbo(model, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(bool(flag) for key, flag in model.state_dict().items() if key.endswith("initialized"))
    assert losses[-1] < 60 < losses[0]  # 64 fair coins have 44 nats
    assert all(math.isfinite(loss) for loss in losses)


def test_dropout_acts_in_train_mode_only() -> None:
    torch.manual_seed(0)
    model = initialised(tiny(q_dropout=0.5, p_dropout=0.5))
    eps, noise = model.standard_normal(4), model.standard_normal(4)
    x = model.observe(torch.rand(4, 1, 8, 8))
    inference, generation = (lambda: model.infer(x, noise=noise).z[1]), (lambda: model.reparameterize(eps)[1])
    for draw in (inference, generation):
        model.eval()
        assert torch.equal(draw(), draw())
        model.train()
        assert not torch.equal(draw(), draw())
