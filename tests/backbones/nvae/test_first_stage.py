"""NVAE's first stage: its spectral regularisation, the average of its batch norms, and that a cut run loses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ebm_prior.backbones.nvae.adapter import NVAE
from ebm_prior.backbones.nvae.spectral import largest_singular_values
from run_folders import check_an_interruption, longer
from tiny_nvae import tiny, trained

from ebm_prior.data.images import ImageSource, from_array
from ebm_prior.runs.pretrain import pretrain_into
from ebm_prior.storage.registry import build
from ebm_prior.training.pretrain import pretrain
from ebm_prior.training.pretrain_config import PretrainConfig

# As NVAE is trained, in few steps.
RECIPE: dict[str, Any] = {
    "iterations": 6,
    "batch_size": 8,
    "optimizer": "adamax",
    "epsilon": 1e-3,
    "learning_rate": 1e-2,
    "rate_warmup": 0.3,
    "weight_decay": 3e-4,
    "kl_warmup": 0.5,
    "kl_balance": True,
    "regularization": 1e-2,
    "flip": True,
    "channels_last": True,
    "ema": 0.5,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def colours() -> ImageSource:
    return from_array(np.random.default_rng(0).integers(0, 256, (48, 8, 8, 3)).astype(np.uint8))


@pytest.mark.parametrize("shape", [(5, 3, 18), (4, 30, 4), (1, 1, 1), (2, 1, 9), (3, 16, 16)])
def test_the_largest_singular_value_and_its_gradient(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    found, expected = largest_singular_values(matrices), torch.linalg.matrix_norm(matrices, 2)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-3)
    assert (found <= expected * (1 + 1e-12)).all()  # power iteration comes from below
    u, s, vt = torch.linalg.svd(matrices.detach())
    apart = s[:, 1] < 0.9 * s[:, 0] if s.shape[1] > 1 else torch.ones(len(s), dtype=torch.bool)
    gradient = torch.autograd.grad(found.sum(), matrices)[0]
    torch.testing.assert_close(gradient[apart], (u[:, :, :1] @ vt[:, :1])[apart], atol=1e-2, rtol=0)


def test_singular_values_where_a_fixed_start_would_be_blind() -> None:
    """u₁ ⟂ (1, …, 1); then a matrix of zeros, of rank one, and ones so large or small that their powers overflow."""
    edge = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    matrices = torch.stack([edge, torch.zeros(2, 2), torch.ones(2, 2), 1e10 * edge, 1e-10 * edge]).requires_grad_()
    found = largest_singular_values(matrices)
    torch.testing.assert_close(found, torch.tensor([2.0, 0.0, 2.0, 2e10, 2e-10]), rtol=1e-5, atol=0)
    assert torch.autograd.grad(found.sum(), matrices)[0].isfinite().all()


def test_regularization_sums_spectral_norms_and_batch_norm_scales() -> None:
    model = trained(tiny())
    exact = sum(torch.linalg.matrix_norm(kernel.flatten(1), 2) for kernel in model.kernels())
    scales = sum(layer.weight.abs().max() for layer in model.batch_norms())
    torch.testing.assert_close(model.regularization(), exact + scales, rtol=1e-3, atol=0)
    model.regularization().backward()
    assert all(layer.weight.grad is not None for layer in model.batch_norms())


def test_the_kept_batch_norms_are_averages_as_the_weights_are(colours: ImageSource) -> None:
    model, name = tiny(), "network.pre_process.0._ops.0.bn_act.running_mean"
    live: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []

    def note(shown: Mapping[str, Any]) -> None:
        live.append(model.get_buffer(name).clone())
        kept.append(shown["backbone"].get_buffer(name).clone())

    pretrain(model, colours, PretrainConfig(**RECIPE | {"checkpoint_every": 1, "ema": 0.9}), on_evaluate=note)
    assert torch.equal(kept[2], live[2])  # where the warm-up ends
    for t in range(3, 6):
        torch.testing.assert_close(kept[t], 0.9 * kept[t - 1] + 0.1 * live[t])
        assert not torch.equal(kept[t], live[t])


@pytest.mark.parametrize("after", [longer(1), longer(2), 5])
def test_an_interrupted_run_of_the_whole_recipe_goes_on(colours: ImageSource, tmp_path: Path, after: int) -> None:
    """Batch statistics, Adamax's state and the regulariser: nothing is kept outside the resume state."""

    def run(out: Path, **how: Any) -> bytes:
        backbone = build(NVAE, tiny().architecture, seed=0)
        pretrain_into(out, backbone, colours, colours.subset(range(16)), PretrainConfig(**RECIPE), **how)
        return (out / "backbone.safetensors").read_bytes()

    check_an_interruption(run, tmp_path, "backbone.safetensors", after)


def test_bits_per_dimension_are_for_the_discretised_mixture(colours: ImageSource, tmp_path: Path) -> None:
    for likelihood, means_something in (("logistic_mixture", True), ("gaussian", False)):
        backbone = tiny(likelihood=likelihood)
        config = PretrainConfig(**RECIPE | {"iterations": 1})
        result = pretrain_into(tmp_path / likelihood, backbone, colours, colours.subset(range(16)), config)
        assert (result["bits_per_dimension"] is not None) == means_something
