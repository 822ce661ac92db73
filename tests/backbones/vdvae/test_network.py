"""VDVAE: the published architectures, what can and cannot be built, first weights, and the contract."""

from __future__ import annotations

import gzip
import json
import math
from typing import Any

import pytest
import torch
from ebm_prior.backbones.likelihoods import LogisticMixture
from ebm_prior.backbones.vdvae.adapter import VDVAE
from ebm_prior.backbones.vdvae.options import Place, parse_blocks, parse_widths
from ebm_prior.backbones.vdvae.pixels import CoarseMixture
from ebm_prior.backbones.vdvae.published import PUBLISHED
from tiny_vdvae import FIXTURES, REFERENCES, TINY, needs_fixtures, official, published, tiny, trained

from ebm_prior.errors import ConfigurationError
from ebm_prior.storage.weights import count_parameters
from ebm_prior.testing import check_backbone

# The published configurations.

PARAMETERS = {
    "cifar10": 39_145_700,
    "imagenet32": 119_280_868,
    "imagenet64": 125_005_860,
    "ffhq256": 114_874_852,
    "ffhq1024": 109_366_904,
}
LATENT_DIMENSIONS = {
    "cifar10": 412_432,
    "imagenet32": 765_216,
    "imagenet64": 1_451_040,
    "ffhq256": 4_470_816,
    "ffhq1024": 27_588_640,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_published_size(name: str) -> None:
    model = published(name)
    assert count_parameters(model) == PARAMETERS[name]
    assert sum(math.prod(group.shape) for group in model.groups) == LATENT_DIMENSIONS[name]
    assert [group.name for group in model.groups] == [f"z{i}" for i in range(len(model.groups), 0, -1)]


@needs_fixtures
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_official_keys_and_shapes(name: str) -> None:
    with gzip.open(FIXTURES / "published" / "shapes.json.gz") as file:
        recorded = json.load(file)[name]
    settings = dict(recorded["hparams"])
    assert settings.pop("dataset").replace("_", "") == name
    assert settings == PUBLISHED[name]
    found = {key: list(tensor.shape) for key, tensor in published(name).network.state_dict().items()}
    assert found == recorded["shapes"]


# The contract, in float64 with small networks.


@pytest.mark.long
@needs_fixtures
@pytest.mark.parametrize("name", REFERENCES)
def test_the_official_networks_keep_the_contract(name: str) -> None:
    assert not check_backbone(official(name), batch_size=2).skipped


# Words.


def test_block_strings_mean_what_the_official_ones_do() -> None:
    assert parse_blocks("x", "32x2,32d2,16, 4m1") == [Place(32), Place(32), Place(32, 2), Place(16), Place(4, 1)]
    assert parse_blocks("x", "32m2") == parse_blocks("x", "32d2")
    assert parse_widths("16:10,8:16") == {16: 10, 8: 16}
    assert parse_widths("") == {}
    words = {"enc_blocks": "8,8m2,4m4,1", "dec_blocks": "1,4d1,8d4"}
    assert tiny(**words).network.architecture.encoder == tiny().network.architecture.encoder
    assert tiny(**words).network.architecture.decoder == tiny().network.architecture.decoder


def test_custom_widths_narrow_and_widen_as_the_words_say() -> None:
    state = {key: tuple(tensor.shape) for key, tensor in tiny().network.state_dict().items()}
    assert state["encoder.enc_blocks.1.c4.weight"] == (4, 2, 1, 1)  # pools to side 4, but runs at side 8
    assert state["encoder.enc_blocks.2.c4.weight"] == (6, 3, 1, 1)
    assert state["decoder.dec_blocks.1.enc.c1.weight"] == (3, 12, 1, 1)
    assert [state[f"decoder.bias_xs.{j}"] for j in range(2)] == [(1, 6, 1, 1), (1, 6, 4, 4)]
    assert "decoder.bias_xs.2" not in state


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown option": ({"chanels": 3}, "expected options among .*custom_width_str"),
    "no text": ({"dec_blocks": ["1x1"]}, "dec_blocks: expected text"),
    "a word": ({"enc_blocks": "8x1,8p2"}, 'enc_blocks: expected words like 32x11.*found "8p2"'),
    "no word": ({"enc_blocks": ""}, "enc_blocks: expected words"),
    "digits of another script": ({"dec_blocks": "١x1"}, "dec_blocks: expected words"),
    "no blocks of a side": ({"enc_blocks": "8x0"}, "enc_blocks, 8x0: expected an integer from 1"),
    "endless": ({"dec_blocks": "1x4096,8m1"}, "dec_blocks, blocks: expected an integer from 1 to 4096"),
    "width": ({"width": 0}, "Architecture.width: expected an integer from 1"),
    "huge width": ({"width": 10**9}, "Architecture.width: expected an integer from 1 to 4096"),
    "fraction": ({"zdim": 2.0}, "Architecture.zdim: expected an integer"),
    "widths": ({"custom_width_str": "4=6"}, 'custom_width_str: expected words like 16:256.*"4=6"'),
    "no width": ({"custom_width_str": "4:0"}, "custom_width_str, 4:0: expected an integer from 1"),
    "bottleneck": ({"bottleneck_multiple": 0}, "bottleneck_multiple: expected a positive number, found 0"),
    "no number": ({"bottleneck_multiple": math.nan}, "bottleneck_multiple: expected a positive number"),
    "too narrow": (
        {"bottleneck_multiple": 0.2},
        "at least one channel inside the blocks of side 8, found none with 0.2 of 4",
    ),
    "data set": ({"data_set": "mine"}, "data_set: expected one of cifar10.*shift, scale and bits must be given"),
    "bits": ({"bits": 9}, "bits: expected an integer from 1 to 8"),
    "shift": ({"shift": "0"}, "shift: expected a number"),
    "width of the image": ({"custom_width_str": "8:6,4:6,1:6"}, "expected the width 4 at the image's side 8, found 6"),
    "last block": (
        {"dec_blocks": "1x1,8m1,4m1", "custom_width_str": ""},
        "the last block at the largest side, 8, found it at 4",
    ),
    "no map": ({"dec_blocks": "4x1,8m4", "no_bias_above": 2}, "no_bias_above: expected at least the smallest side, 4"),
    "not yet there": (
        {"dec_blocks": "1x1,8m4,4m1,8m4", "no_bias_above": 1},
        r"dec_blocks, 8m4: .*one of \[1\], found 4",
    ),
    "not there at all": ({"dec_blocks": "1x1,8m2"}, r"dec_blocks, 8m2: .*one of \[1\], found 2"),
    "widening mixin": (
        {"custom_width_str": "4:3,1:6"},
        "dec_blocks, 8m4: expected at least 4 channels at side 4, found 3",
    ),
    "narrowing encoder": ({"custom_width_str": "4:6,1:4"}, "dec_blocks, 4m1: expected at least 6 channels"),
    "side in the encoder": ({"enc_blocks": "8x1,4d4,1x1"}, "enc_blocks: expected the side 8 next, found 4"),
    "pooling": ({"enc_blocks": "8d3,1x1"}, "enc_blocks, 8d3: expected a factor that divides 8, found 3"),
    "missed side": (
        {"enc_blocks": "8d8,1x1"},
        r"enc_blocks: expected to reach all sides of dec_blocks, found none at \[4\]",
    ),
    "narrowing below the decoder": (
        {"enc_blocks": "8d2,4d2,2d2,1", "custom_width_str": "4:6,2:5,1:6"},
        "enc_blocks, 4d2: expected at least the 6 channels of side 4 at side 2, found 5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        tiny(**options)


@pytest.mark.parametrize("name", ["enc_blocks", "dec_blocks", "data_set"])
def test_missing_options_are_named(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        VDVAE(**{key: value for key, value in TINY.items() if key != name})


# First weights.


def test_a_new_network_starts_from_standard_normal_priors() -> None:
    torch.manual_seed(0)
    model = tiny(width=64, custom_width_str="").eval()
    eps = model.standard_normal(2, generator=torch.Generator().manual_seed(0))
    assert all(map(torch.equal, model.reparameterize(eps), eps))
    state = dict(model.network.named_parameters())
    assert not any(p.any() for key, p in state.items() if key.endswith(".bias") or "bias_xs" in key)
    assert (state["decoder.gain"] == 1).all()
    for name, factor in (
        ("encoder.enc_blocks.0.c4", 4**-0.5),
        ("decoder.dec_blocks.0.resnet.c4", 3**-0.5),
        ("decoder.dec_blocks.0.z_proj", 3**-0.5),
        ("decoder.dec_blocks.0.enc.c4", 1),
        ("encoder.enc_blocks.0.c1", 1),
    ):
        weight = state[f"{name}.weight"]
        bound = factor * math.prod(weight.shape[1:]) ** -0.5  # torch's default is uniform up to 1/√fan_in
        assert 0.8 * bound < weight.abs().max() <= bound, name


# Pixels.


@pytest.mark.parametrize(
    ("name", "mean", "deviation", "bits"),
    [
        ("cifar10", 120.63838, 64.16736, 8),
        ("imagenet32", 116.2373, 69.37404, 8),
        ("imagenet64", 115.92961967, 69.37404, 8),
        ("ffhq256", 112.8666757481, 69.84780273, 5),
        ("ffhq1024", 255 * 0.4387, 255 * 0.2743, 8),
    ],
)
def test_each_data_set_has_its_published_constants(name: str, mean: float, deviation: float, bits: int) -> None:
    pixels = tiny(data_set=name).network.architecture.pixels
    seen = pixels.normalised(torch.tensor([mean, mean + deviation], dtype=torch.float64) / 255)
    torch.testing.assert_close(seen, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert pixels.bits == bits


def mixture(bits: int) -> LogisticMixture:
    parameters = torch.randn(1, 20, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return CoarseMixture(parameters, bits=bits)


@pytest.mark.parametrize("bits", [1, 5, 7])
def test_images_are_scored_by_their_leading_bits(bits: int) -> None:
    v = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    coarse = (v >> (8 - bits)) << (8 - bits)
    for dtype, off in ((torch.float32, 0), (torch.float64, 0), (torch.float64, -0.4), (torch.float64, 0.4)):
        image, reduced = (v.to(dtype) + off) / 255, coarse.double() / 255
        assert torch.allclose(
            mixture(bits).log_prob_of_pixels(image), mixture(bits).log_prob_of_pixels(reduced), atol=1e-4
        )
    plain = LogisticMixture(torch.randn(1, 20, 16, 16).double(), bits=bits)
    assert not torch.allclose(plain.log_prob_of_pixels(v / 255.0), plain.log_prob_of_pixels(coarse / 255.0))


def test_the_encoder_sees_all_bits_and_the_likelihood_five() -> None:
    model = trained(tiny(data_set="ffhq256")).double()
    x = torch.full((1, 3, 8, 8), 128 / 255, dtype=torch.float64)
    other = torch.full_like(x, 129 / 255)
    assert torch.equal(model.observe(x), x)
    noise = model.standard_normal(1, generator=torch.Generator().manual_seed(0))
    z, changed = (model.infer(image, noise=noise).z for image in (x, other))
    assert not torch.equal(z[-1], changed[-1])
    assert model.decode(z).log_prob(x) == model.decode(z).log_prob(other)
    eight = trained(tiny()).double()
    assert eight.decode(z).log_prob(x) != eight.decode(z).log_prob(other)
