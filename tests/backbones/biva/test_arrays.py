"""BIVA, LVAE and VAE: every array of the official code."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from ebm_prior.backbones.biva.adapter import BIVA
from ebm_prior.backbones.biva.network import Network
from ebm_prior.backbones.biva.stages import Head
from tiny_biva import FIXTURES, REFERENCES, needs_fixtures
from torch import Tensor

from ebm_prior.model.backbone import Gaussian

INPUTS = ("x", "groups", "posterior_draw_order", "prior/eps/", "post/noise/", "grad/w/")


def computed_arrays(
    model: BIVA, arrays: Mapping[str, np.ndarray], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> dict[str, np.ndarray]:
    """Every array of a reference file, by its name there, from the public passes of the backbone."""
    names = list(arrays["groups"])
    assert [group.name for group in model.groups] == [name.replace(".", "_") for name in names]
    heads = [head for stage in reversed(model.network.bottom_up) for head in stage.heads]
    posteriors: dict[Head, Gaussian] = {}
    parameters: list[Tensor] = []
    out: dict[str, Tensor] = {}
    q, image = Head.q, Network.image
    monkeypatch.setattr(Head, "q", lambda head, h: posteriors.setdefault(head, q(head, h)))
    monkeypatch.setattr(Network, "image", lambda *a: parameters.append(image(*a)) or parameters[-1])

    def given(prefix: str) -> list[Tensor]:
        return [torch.from_numpy(arrays[prefix + name]).to(dtype) for name in names]

    def record(key: str) -> None:
        path = key.removeprefix("debug/")
        model.network.get_submodule(path).register_forward_hook(lambda _, __, y: out.update({key: y}))

    for key in arrays:
        if key.startswith("debug/"):
            record(key)
    x = torch.from_numpy(arrays["x"]).to(dtype)
    if model.architecture["likelihood"] == "logistic_mixture":
        x = (x + 1) / 2

    eps = [e.requires_grad_() for e in given("prior/eps/")]
    trace = model.transform(eps)
    out["prior/log_px"] = model.likelihood(trace.features).log_prob(x)
    out["prior/params"] = parameters[-1]
    out["grad/loss"] = sum((z * w).sum() for z, w in zip(trace.z, given("grad/w/"), strict=True))
    gradients = torch.autograd.grad(out["grad/loss"], eps)
    for i, name in enumerate(names):
        out[f"prior/mean/{name}"] = trace.priors[i].mean.expand_as(trace.z[i])
        out[f"prior/std/{name}"] = trace.priors[i].std.expand_as(trace.z[i])
        out |= {f"prior/z/{name}": trace.z[i], f"grad/deps/{name}": gradients[i]}

    posterior = model.infer(x, noise=given("post/noise/"))
    priors = model.trace(lambda i, _, __: posterior.z[i], len(x)).priors
    out["post/log_px"] = model.likelihood(posterior.features).log_prob(x)
    out["post/params"] = parameters[-1]
    out["post/elbo"] = out["post/log_px"] + (posterior.log_p - posterior.log_q).sum(1)
    for i, (name, head) in enumerate(zip(names, heads, strict=True)):
        out[f"post/q_mean/{name}"], out[f"post/q_std/{name}"] = posteriors[head]
        out[f"post/p_mean/{name}"] = priors[i].mean.expand_as(posterior.z[i])
        out[f"post/p_std/{name}"] = priors[i].std.expand_as(posterior.z[i])
        out |= {f"post/log_q/{name}": posterior.log_q[:, i], f"post/log_p/{name}": posterior.log_p[:, i]}
        out[f"post/z/{name}"] = posterior.z[i]
    return {key: tensor.detach().numpy() for key, tensor in out.items()}


@needs_fixtures
@pytest.mark.parametrize(("dtype", "prefix", "tolerance"), [(torch.float64, "f64/", 1e-9), (torch.float32, "", 2e-5)])
@pytest.mark.parametrize("name", REFERENCES)
def test_agrees_with_every_array_of_the_official_code(
    name: str, dtype: torch.dtype, prefix: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = dict(np.load(FIXTURES / name / "reference.npz"))
    model = BIVA.load_official(FIXTURES / name).to(dtype)
    computed = computed_arrays(model, arrays, dtype, monkeypatch)
    wanted = {
        key[len(prefix) :]: array
        for key, array in arrays.items()
        if key.startswith(prefix) and (prefix or not key.startswith(("f64/", *INPUTS)))
    }
    assert wanted.keys() <= computed.keys()
    for key, array in wanted.items():
        assert computed[key].shape == array.shape, key
        scale = np.abs(array).max() or 1.0
        assert np.abs(computed[key] - array).max() <= tolerance * scale, key
