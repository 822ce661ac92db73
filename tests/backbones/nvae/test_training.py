"""NVAE from scratch: initial values, train mode, what its first stage regularises, and that it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ebm_prior.backbones.nvae.cells import BatchNorm, Conv2d, NormedConv2d
from ebm_prior.backbones.nvae.flows import MaskedConv2d
from tiny_nvae import tiny, trained
from torch import nn

from ebm_prior.data.images import from_array
from ebm_prior.training.pretrain import evaluate_elbo, pretrain
from ebm_prior.training.pretrain_config import PretrainConfig


def test_initial_values_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    model = tiny()
    for name, module in model.network.named_modules():
        if isinstance(module, NormedConv2d):
            weight = module.weight * module.mask if isinstance(module, MaskedConv2d) else module.weight
            norm = torch.linalg.vector_norm(weight, dim=(1, 2, 3)) + 1e-2
            expected = norm.log() - (math.log(10) if name.endswith("mu.conv_0") else 0)
            torch.testing.assert_close(module.log_weight_norm.flatten(), expected)
            assert module.log_weight_norm.requires_grad
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.momentum, module.eps) == (0.05, 1e-5)
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
    start = model.network.prior_ftr0
    assert 0 <= start.min() < start.max() < 1
    z = model.standard_normal(2)[0]
    moved = model.network.flow(0, z) - z
    assert 0 < moved.std() < 0.2 * z.std()  # flows begin near the identity


def test_batch_statistics_act_in_train_mode_only() -> None:
    torch.manual_seed(0)
    model = trained(tiny())
    eps = model.standard_normal(4)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    row = [e[:1] for e in eps]
    torch.testing.assert_close(model.reparameterize(eps)[-1][:1], model.reparameterize(row)[-1])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model.train()
    assert not torch.allclose(model.reparameterize(eps)[-1][:1], model.reparameterize(row)[-1], atol=1e-3)
    counts = {key: int(t) for key, t in model.state_dict().items() if key.endswith("num_batches_tracked")}
    grown = {key.split(".")[1] for key, count in counts.items() if count > int(before[key])}
    assert grown == {"dec_tower"}  # neither the encoder nor the image side


def test_kernels_are_the_weights_as_used() -> None:
    """The scale of a weight-normed weight does not count, its norm does, and so does an unnormed weight."""
    torch.manual_seed(0)
    model = tiny()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(isinstance(module, Conv2d) for module in convolutions)
    before = [kernel.detach().clone() for kernel in model.kernels()]
    assert [k.shape for k in before] == [module.weight.shape for module in convolutions]
    with torch.no_grad():
        for module in convolutions:
            module.weight *= 3
            if isinstance(module, NormedConv2d):
                module.log_weight_norm += math.log(2)
    for module, old, new in zip(convolutions, before, model.kernels(), strict=True):
        torch.testing.assert_close(new, old * (2 if isinstance(module, NormedConv2d) else 3), rtol=1e-3, atol=0)
    total = sum(torch.linalg.matrix_norm(kernel.flatten(1), 2) for kernel in model.kernels())
    total.backward()  # a regulariser can be trained
    assert all(module.weight.grad is not None for module in convolutions)


def test_batch_norms_are_all_there() -> None:
    model = tiny()
    found = list(model.batch_norms())
    assert len(found) == len({id(layer) for layer in found})
    assert len(found) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert all(isinstance(layer, BatchNorm) for layer in found)


@pytest.mark.parametrize("likelihood", ["logistic_mixture", "gaussian"])
def test_the_first_stage_trains_it(likelihood: str) -> None:
    random = np.random.default_rng(0)
    colours = random.integers(0, 2, (96, 1, 1, 3)) * 120 + 60
    pixels = np.clip(colours + random.normal(0, 8, (96, 8, 8, 3)), 0, 255).astype(np.uint8)
    images = from_array(pixels)
    torch.manual_seed(0)
    model = tiny(likelihood=likelihood)
    config = PretrainConfig(iterations=20, batch_size=32, learning_rate=1e-2, ema=0.8, checkpoint_every=20)
    before = evaluate_elbo(model.eval(), images)
    kept = pretrain(model, images, config)
    after = evaluate_elbo(kept, images)
    assert after.elbo > before.elbo + 50
    assert all(math.isfinite(value) for value in after.kl)
    assert not kept.training
