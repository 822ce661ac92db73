"""BIVA from scratch: the first batch, dropout, learning, architectures by hand; and far from typical ε."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ebm_prior.backbones.biva.adapter import BIVA
from ebm_prior.backbones.biva_family.layers import DataInitialized, SameConvTranspose2d
from tiny_biva import FIXTURES, initialised, needs_fixtures, tiny
from workshop import Workshop

from ebm_prior.data.images import from_array
from ebm_prior.errors import DivergenceError
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.samplers import langevin_step, pcn_langevin_step, run_chain, start
from ebm_prior.training.pretrain import evaluate_elbo, pretrain
from ebm_prior.training.pretrain_config import PretrainConfig

KINDS = ["biva", "lvae", "vae"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_batch_sets_the_scale_of_every_layer(kind: str) -> None:
    torch.manual_seed(0)
    model = tiny(kind=kind, init_std=0.01).train()
    outputs: dict[str, torch.Tensor] = {}
    for name, layer in model.network.named_modules():
        if isinstance(layer, DataInitialized):
            layer.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
    x = model.observe(torch.rand(64, 1, 8, 8))
    model.likelihood(model.infer(x).features)
    layers = {name: layer for name, layer in model.network.named_modules() if isinstance(layer, DataInitialized)}
    unused = {"stages.2.q_proj.linear"} if kind == "vae" else set()  # nothing reads it, in the official network too
    assert layers.keys() - outputs.keys() == unused
    assert all(bool(layer.initialized) for layer in layers.values())
    for name, y in outputs.items():
        if not isinstance(layers[name], SameConvTranspose2d):  # whose statistics are those before the crop
            std = y.transpose(0, 1).flatten(1).std(1)
            torch.testing.assert_close(std, torch.full_like(std, 0.01), rtol=0.05, atol=0, msg=name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.likelihood(model.infer(1 - x).features)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_dropout_acts_in_train_mode_only() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 1, 8, 8).round()
    for rates in ({"q_dropout": 0.5}, {"p_dropout": 0.5}):
        model = initialised(tiny(**rates))
        eps, noise = model.standard_normal(4), model.standard_normal(4)
        passes = {"q_dropout": lambda m=model, n=noise: m.infer(x, noise=n).z[0]}
        passes["p_dropout"] = lambda m=model, e=eps: m.reparameterize(e)[-1]
        for rate, run in passes.items():
            model.eval()
            assert torch.equal(run(), run())
            model.train()
            assert torch.equal(run(), run()) == (rate not in rates)


RELEASED: dict[str, Any] = {
    "optimizer": "adamax",
    "learning_rate": 2e-3,
    "decay": False,
    "kl_warmup": 0.0,
    "free_nats": 2.0,
    "free_nats_per": "image",
    "ema": 0.9995,
    "gradient_clip": 1e9,
}
"""The settings of the released training (checkpoints/README.md); its batches have 48 images."""


def test_the_average_begins_after_the_first_batch_has_set_the_scales() -> None:
    """The released training starts it before, and needs ten thousand steps to forget the scales that no data set."""
    images = from_array(np.random.default_rng(0).integers(0, 2, (48, 8, 8), dtype=np.uint8) * 255)
    torch.manual_seed(0)
    model = tiny(q_dropout=0.5, p_dropout=0.5, init_std=0.01)
    untouched = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = pretrain(model, images, PretrainConfig(iterations=3, batch_size=48, **RELEASED))
    layers = [layer for layer in kept.network.modules() if isinstance(layer, DataInitialized)]
    assert all(bool(layer.initialized) for layer in layers)
    # Three steps of Adamax move a weight by at most 3 × 2e-3, so what the average is near of is what the data set.
    for name, p in model.named_parameters():
        assert float((p - kept.get_parameter(name)).detach().abs().max()) < 3.1 * 2e-3
        if name.endswith("weight_g"):
            assert not torch.isclose(p, untouched[name], atol=0.01).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_stage_trains_it(kind: str) -> None:
    random = np.random.default_rng(0)
    patches = random.integers(0, 2, (96, 2, 2), dtype=np.uint8) * 255
    images = from_array(np.repeat(np.repeat(patches, 4, 1), 4, 2))
    torch.manual_seed(0)
    model = tiny(kind=kind)
    config = PretrainConfig(iterations=60, batch_size=16, learning_rate=1e-2, ema=0.8)
    kept = pretrain(model, images, config)
    after = evaluate_elbo(kept, images)
    assert after.elbo > -35  # 64 fair coins have 44 nats
    assert all(math.isfinite(value) for value in after.kl)
    assert not kept.training


def test_an_architecture_is_written_by_hand(workshop: Workshop, tmp_path: Path) -> None:
    """The one in the docstring of BIVA, for smaller images."""
    start_, end = '{"image_shape"', '{"features": 8}}]}'
    text = str(BIVA.__doc__)
    described = json.loads(text[text.index(start_) : text.index(end) + len(end)])
    described["image_shape"] = [1, 8, 8]
    file, out = tmp_path / "architecture.json", tmp_path / "run"
    file.write_text(json.dumps(described))
    words: list[Any] = ["pretrain", "--backbone", "biva", "--architecture", file, "--data", workshop.images]
    workshop.run(*words, "--out", out, "--iterations", 2, "--batch-size", 8)
    assert workshop.run("info", "--ckpt", out / "backbone.safetensors").stdout
    del described["likelihood"]
    file.write_text(json.dumps(described))
    assert "missing 1 required positional argument: 'likelihood'" in workshop.error(*words, "--out", tmp_path / "other")


# Far from typical ε: std is exponential in the features, and nothing is clamped.


def finite(model: BIVA, scale: float, n: int = 64) -> bool:
    eps = model.standard_normal(n, generator=torch.Generator().manual_seed(0))
    return all(bool(z.isfinite().all()) for z in model.reparameterize([scale * e for e in eps]))


def test_a_bounded_log_variance_stays_finite() -> None:
    torch.manual_seed(0)
    model = initialised(tiny(log_variance="tanh")).requires_grad_(False)
    assert finite(model, 1e4)
    assert all(0.6 < float(p.std.min()) <= float(p.std.max()) < 1.65 for p in model.transform(model.sample(9)).priors)


@needs_fixtures
def test_samplers_refuse_or_report_where_a_trained_model_overflows() -> None:
    model = BIVA.load_official(FIXTURES / "fashion-trained").requires_grad_(False)
    assert finite(model, 3)
    assert not finite(model, 50)
    torch.manual_seed(0)
    energy = JointEnergy(model.groups, EnergyConfig(hidden=8, joint=0, conditional=False))
    for parameter in energy.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    def potential(eps: Any) -> torch.Tensor:
        value: torch.Tensor = energy(model.reparameterize(eps))
        return value

    eps = model.standard_normal(16)
    state, acceptance, _ = run_chain(
        pcn_langevin_step, start(potential, eps), potential, 20, step_size=torch.full((16,), 0.5)
    )
    assert all(bool(z.isfinite().all()) for z in model.reparameterize(state.eps))
    assert acceptance.mean() > 0.05
    far = [50 * e for e in eps]
    for kernel in (langevin_step, pcn_langevin_step):
        with pytest.raises(DivergenceError, match="chains left the finite numbers"):
            run_chain(kernel, start(potential, far), potential, 1, step_size=torch.full((16,), 1e-4))
