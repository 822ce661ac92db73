"""NVAE's normalizing flows: masks, and the triangular Jacobian that keeps log q as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ebm_prior.backbones.nvae.flows import Flow, MaskedConv2d, Shift
from tiny_nvae import FIXTURES, needs_fixtures
from torch import Tensor

MASKS = {"conv1_3x3": "conv.convz.0", "conv2_depthwise5x5": "conv.convz.2", "mu_1x1": "mu.conv_0"}


def perturbed(flow: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return flow.double()


@needs_fixtures
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("latents", [2, 3, 20])
def test_masks_are_the_official_ones(latents: int, mirror: bool) -> None:
    arrays = np.load(FIXTURES / "extras" / "ar_masks.npz")
    shift = Shift(latents, mirror=mirror)
    for name, path in MASKS.items():
        expected = arrays[f"nz{latents}/{name}/{'mirror' if mirror else 'plain'}"]
        assert np.array_equal(shift.get_submodule(path).mask.numpy(), expected), name


@pytest.mark.parametrize("latents", [1, 2, 3])
@pytest.mark.parametrize("mirror", [False, True])
def test_a_shift_is_unit_triangular_in_its_order(latents: int, mirror: bool) -> None:
    shift = perturbed(Shift(latents, mirror=mirror))

    def in_order(ordered: Tensor) -> Tensor:  # (9·L,): raster position, then channel
        z = ordered.view(9, latents).flip(0) if mirror else ordered.view(9, latents)
        y = shift(z.T.reshape(1, latents, 3, 3)).view(latents, 9).T
        return (y.flip(0) if mirror else y).reshape(-1)

    z = torch.randn(9 * latents, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(in_order, z)
    assert torch.equal(jacobian.triu(1), torch.zeros_like(jacobian))
    assert torch.equal(jacobian.diagonal(), torch.ones_like(z))
    assert jacobian.diagonal(-latents).abs().max() > 0  # it does depend on the position before
    assert jacobian.diagonal(-1).abs().max() > 0  # and on the channel before


def test_a_flow_keeps_volume() -> None:
    flow = perturbed(Flow(2))
    z = torch.randn(18, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(z.view(1, 2, 3, 3)).reshape(-1), z)
    sign, log_det = torch.linalg.slogdet(jacobian)
    assert sign == 1
    assert log_det.abs() < 1e-12
    assert jacobian.triu(1).abs().max() > 0  # the two orders together are not triangular
    assert jacobian.tril(-1).abs().max() > 0


def test_the_norm_counts_what_the_mask_leaves() -> None:
    conv = Shift(2, mirror=False).get_submodule("conv.convz.0")
    assert isinstance(conv, MaskedConv2d)
    kernel = conv.kernel()
    assert torch.equal(kernel * conv.mask, kernel)
    norms = torch.linalg.vector_norm(kernel, dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(norms, conv.log_weight_norm.exp(), rtol=1e-3, atol=0)
    with torch.no_grad():
        conv.weight += 10 * (1 - conv.mask)
    assert torch.equal(conv.kernel(), kernel)
