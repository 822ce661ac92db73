"""HVAE's layers: padding, shortcuts, auxiliary inputs, and the initialisation from a first batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ebm_prior.backbones.biva_family.layers import Dense, ResidualBlock, SameConv2d, SameConvTranspose2d

from ebm_prior.errors import ConfigurationError

# The first batch.


LAYERS = {
    "conv": (SameConv2d(3, 5, 3, 2), (16, 3, 9, 9)),
    "even kernel": (SameConv2d(3, 5, 4), (16, 3, 9, 9)),
    "transposed": (SameConvTranspose2d(3, 5, 2, 2), (16, 3, 9, 9)),  # nothing is cropped
    "dense": (Dense(12, 5), (64, 3, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_batch_in_train_mode_standardises_the_outputs(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    x = 3 + 2 * torch.randn(shape)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.eval()(x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    y = layer.train()(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(1), torch.ones(5), atol=1e-4, rtol=0)
    after = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(5 * x)
    assert all(torch.equal(value, after[key]) for key, value in layer.state_dict().items())


def test_one_image_is_too_few_to_initialise_from() -> None:
    with pytest.raises(ConfigurationError, match="at least 2 images"):
        Dense(4, 2).train()(torch.ones(1, 4))


# Shapes.


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_padding_and_cropping_follow_the_published_rule(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    conv = SameConv2d(3, 4, kernel, stride).double().eval()
    out = -(-7 // stride)
    total = max(0, (out - 1) * stride + kernel - 7)
    padded = F.pad(x, (total // 2, total - total // 2) * 2)
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.conv(), conv.conv.bias, stride))
    assert conv(x).shape == (2, 4, out, out)

    transposed = SameConvTranspose2d(3, 4, kernel, stride).double().eval()
    with torch.no_grad():
        transposed.conv.bias.normal_()
    full = F.conv_transpose2d(x, transposed.conv(), transposed.conv.bias, stride)
    surplus = kernel - stride
    before, after = surplus // 2, surplus - surplus // 2  # negative: zeros are added
    torch.testing.assert_close(transposed(x), F.pad(full, (-before, -after) * 2))
    assert transposed(x).shape == (2, 4, 7 * stride, 7 * stride)


def block(
    in_channels: int,
    filters: int,
    stride: int = 1,
    *,
    transposed: bool = False,
    residual: bool = True,
    aux_shape: tuple[int, int, int] | None = None,
    size: int = 6,
) -> ResidualBlock:
    options = {"activation": F.relu, "gated": False, "residual": residual, "transposed": transposed}
    return ResidualBlock((in_channels, size, size), filters, 3, stride, aux_shape=aux_shape, **options).double().eval()


@pytest.mark.parametrize(("in_channels", "filters"), [(2, 4), (4, 2), (3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_shortcut_pads_or_cuts_channels_and_pools(in_channels: int, filters: int, stride: int) -> None:
    x = torch.randn(2, in_channels, 6, 6, dtype=torch.float64)
    silent = block(in_channels, filters, stride)
    with torch.no_grad():
        silent.conv2.conv.weight_g.zero_()
    kept = min(in_channels, filters)
    expected = torch.zeros(2, filters, 6 // stride, 6 // stride, dtype=torch.float64)
    padded = F.pad(x[:, :kept], (0, 1, 0, 1))  # SAME padding of a 3×3 window with stride 2: one zero, at the end
    expected[:, :kept] = x[:, :kept] if stride == 1 else F.avg_pool2d(padded, 3, 2)
    torch.testing.assert_close(silent(x), expected)


def test_upsampling_and_first_blocks_have_no_shortcut() -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for silent in (block(3, 3, 2, transposed=True), block(3, 3, residual=False)):
        with torch.no_grad():
            silent.conv2.conv.weight_g.zero_()
        assert silent(x).abs().max() == 0


def test_an_auxiliary_input_of_the_blocks_own_shape_has_no_effect() -> None:
    assert block(3, 3, aux_shape=(3, 6, 6)).aux_op is None
    kinds = {(3, 12, 12): (SameConv2d, 3), (3, 3, 3): (SameConvTranspose2d, 3), (5, 6, 6): (SameConv2d, 1)}
    for aux_shape, (kind, kernel) in kinds.items():
        made = block(3, 3, aux_shape=aux_shape)
        assert type(made.aux_op) is kind
        assert made.aux_op.conv().shape[2:] == (kernel, kernel)
        x, aux = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((3, 6, 6), aux_shape))
        assert not torch.allclose(made(x, aux), made(x, -aux))
        with pytest.raises(ConfigurationError, match="expects an auxiliary input"):
            made(x)
