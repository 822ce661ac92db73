"""NVAE: architectures published and small, what cannot be built, and the contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ebm_prior.backbones.nvae.adapter import NVAE
from ebm_prior.backbones.nvae.official import translate
from tiny_nvae import tiny, trained

from ebm_prior.errors import ConfigurationError
from ebm_prior.runs.describe import parameters
from ebm_prior.testing.contract import check_backbone
from ebm_prior.training.fit_config import paper_preset

# The published configurations.


def args(dataset: str, channels: int, scales: int, groups: int, flows: int, **more: Any) -> dict[str, Any]:
    """The official arguments, as far as all published models agree."""
    return {
        "dataset": dataset,
        "arch_instance": "res_mbconv",
        "num_channels_enc": channels,
        "num_channels_dec": channels,
        "num_latent_scales": scales,
        "num_groups_per_scale": groups,
        "num_latent_per_group": 20,
        "num_nf": flows,
        "num_preprocess_blocks": 1,
        "num_postprocess_blocks": 1,
        "num_preprocess_cells": 2,
        "num_postprocess_cells": 2,
        "num_cell_per_cond_enc": 2,
        "num_cell_per_cond_dec": 2,
        "use_se": True,
        "res_dist": True,
        "num_x_bits": 8,
        **more,
    }


ADAPTIVE: dict[str, Any] = {"ada_groups": True}
MNIST = {**ADAPTIVE, **{f"num_{p}process_{w}": n for p in ("pre", "post") for w, n in (("blocks", 2), ("cells", 3))}}
HQ = {"ada_groups": True, "min_groups_per_scale": 4, "num_x_bits": 5}
GAUSSIAN = {"num_mixture_dec": 1}
# Arguments, groups per scale, sides of z from the top, parameters, state-dict entries with the aliases, aliases.
PUBLISHED = {
    "MNIST": (args("mnist", 32, 2, 10, 0, **MNIST), [10, 5], [4, 8], 33_363_134, 2016, 105),
    "CIFAR-10": (args("cifar10", 128, 1, 30, 1), [30], [16], 130_852_480, 3838, 180),
    "CIFAR-10 VAEBM": (args("cifar10", 128, 1, 30, 1, **GAUSSIAN), [30], [16], 130_744_004, 3838, 180),
    "CelebA-64": (args("celeba_64", 64, 3, 20, 1, **ADAPTIVE), [20, 10, 5], [8, 16, 32], 153_281_364, 4596, 216),
    "church VAEBM": (args("lsun_church_64", 48, 3, 5, 1, **GAUSSIAN), [5] * 3, [8, 16, 32], 65_005_372, 2076, 96),
    "ImageNet-32": (args("imagenet_32", 192, 1, 28, 1), [28], [16], 268_509_444, 3586, 168),
    "FFHQ": (args("ffhq", 30, 5, 16, 2, **HQ), [16, 8, 4, 4, 4], [8, 16, 32, 64, 128], 330_798_664, 5354, 228),
    "HQ VAEBM": (
        args("celeba_256", 32, 5, 4, 2, num_x_bits=5, **GAUSSIAN),
        [4] * 5,
        [8, 16, 32, 64, 128],
        365_372_032,
        3114,
        132,
    ),
    "CIFAR-10, 2 scales": (args("cifar10", 128, 2, 20, 1, **ADAPTIVE), [20, 10], [8, 16], 257_176_336, 3902, 183),
    "HQ quali": (
        args("celeba_256", 32, 5, 16, 2, **HQ),
        [16, 8, 4, 4, 4],
        [8, 16, 32, 64, 128],
        375_340_092,
        5354,
        228,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_have_the_published_size(name: str) -> None:
    arguments, groups_per_scale, sides, parameters, entries, aliases = PUBLISHED[name]
    with torch.device("meta"):
        model = NVAE(**translate(arguments))
    assert model.architecture["groups_per_scale"] == groups_per_scale
    assert [shape[1] for _, shape in model.groups] == [
        side for side, n in zip(sides, reversed(groups_per_scale), strict=True) for _ in range(n)
    ]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.network.state_dict()) == entries - aliases


# Of all heads together, in millions.
PAPER_HEADS = {
    "CIFAR-10": 9.95,
    "CIFAR-10 VAEBM": 9.95,
    "CelebA-64": 13.19,
    "church VAEBM": 4.97,
    "FFHQ": 18.71,
    "HQ VAEBM": 8.75,
    "CIFAR-10, 2 scales": 8.89,
    "HQ quali": 18.71,
}


@pytest.mark.parametrize("name", PAPER_HEADS)
def test_the_papers_heads_have_the_published_size(name: str) -> None:
    arguments, *_, backbone, _, _ = PUBLISHED[name]
    with torch.device("meta"):
        model = NVAE(**translate(arguments))
    counted = parameters(model, paper_preset().energy)
    assert counted["heads"] / 1e6 == pytest.approx(PAPER_HEADS[name], abs=0.005)
    assert counted["ratio"] == counted["heads"] / backbone


def test_groups_are_named_from_the_bottom_and_know_their_scale() -> None:
    model = tiny()
    assert [group.name for group in model.groups] == ["z3", "z2", "z1"]
    assert model.group_scales == (1, 0, 0)
    assert [group.shape for group in model.groups] == [(2, 2, 2), (2, 4, 4), (2, 4, 4)]


# The contract, by which they are also rebuilt from JSON: small networks, whose densities can be formed whole.


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "no flow": {"flows": 0},
    "two flows, two cells, 3 bits": {"flows": 2, "encoder_cells": 2, "decoder_cells": 2, "bits": 3},
    "no squeeze-excite": {"squeeze_excite": False},
    "no residual posterior": {"residual_posterior": False, "flows": 0},
    "single group": {"groups_per_scale": [1], "encoder_channels": 4},
    "three scales": {"groups_per_scale": [1, 1, 1], "image_shape": [3, 16, 16], "latent_channels": 1},
    "two blocks": {"blocks": 2, "groups_per_scale": [2], "image_shape": [3, 16, 16], "postprocess_cells": 2},
    "no blocks": {"blocks": 0, "image_shape": [3, 4, 4]},
    "no cells in the towers": {"encoder_cells": 0, "decoder_cells": 0},
    "Bernoulli with a border": {"likelihood": "bernoulli", "image_shape": [1, 6, 6], "padding": 1},
    "Gaussian as in VAEBM, 5 bits": {"likelihood": "gaussian", "log_std_floor": -2.0, "bits": 5},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_keeps_the_backbone_contract(name: str) -> None:
    torch.manual_seed(0)
    report = check_backbone(trained(tiny(**CONFIGURATIONS[name])))
    assert not report.skipped


def test_the_border_is_the_networks_alone() -> None:
    torch.manual_seed(0)
    model = trained(tiny(likelihood="bernoulli", image_shape=[1, 6, 6], padding=1))
    seen: list[torch.Tensor] = []
    model.network.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(2, 1, 6, 6)
    features = model.infer(images).features
    assert torch.equal(seen[0][:, :, 1:-1, 1:-1], 2 * images - 1)
    assert seen[0].sum() == (2 * images - 1).sum() - 2 * 28  # zeros in [0, 1] are −1 to the stem, 28 around 6 × 6
    assert model.network.image(features).shape == (2, 1, 8, 8)
    assert model.likelihood(features).mean.shape == (2, 1, 6, 6)


# What cannot be built.


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown option": ({"chanels": 3}, "expected options among"),
    "not square": ({"image_shape": [3, 8, 4]}, "square"),
    "no shape": ({"image_shape": []}, "image_shape: expected a list"),
    "side": ({"image_shape": [3, 6, 6]}, "halve evenly"),
    "many scales": ({"groups_per_scale": [1] * 40}, "halve evenly"),
    "no scales": ({"groups_per_scale": []}, "groups_per_scale: expected a list"),
    "zero groups": ({"groups_per_scale": [2, 0]}, "groups_per_scale: expected an integer from 1"),
    "text": ({"groups_per_scale": "12"}, "groups_per_scale: expected a list"),
    "fraction": ({"latent_channels": 2.0}, "latent_channels: expected an integer"),
    "boolean": ({"flows": True}, "flows: expected an integer"),
    "huge": ({"encoder_channels": 10**9}, "encoder_channels: expected an integer from 1 to"),
    "flag": ({"squeeze_excite": 1}, "squeeze_excite: expected true or false"),
    "likelihood": ({"likelihood": "beta"}, "expected one of"),
    "many cells": ({"encoder_cells": 2000}, "at most 4096 cells"),
    "colours": ({"image_shape": [2, 8, 8]}, "colour"),
    "floor": ({"log_std_floor": -2.0}, "log_std_floor: expected"),
    "floor that is no number": ({"log_std_floor": math.nan, "likelihood": "gaussian"}, "log_std_floor: expected"),
    "floor that is a flag": ({"log_std_floor": True, "likelihood": "gaussian"}, "log_std_floor: expected"),
    "bits": ({"bits": 9}, "bits: expected 1 to 8"),
    "binary bits": ({"bits": 5, "likelihood": "bernoulli"}, "bits: expected 1 to 8, and 8"),
    "single group of two widths": ({"groups_per_scale": [1]}, "equal width"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        tiny(**options)


def test_missing_options_are_named() -> None:
    with pytest.raises(ConfigurationError, match="groups_per_scale"):
        NVAE(image_shape=[3, 32, 32], likelihood="gaussian")
