"""NVAEs on data of any name: what the name does not say, the weights and the caller do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ebm_prior.backbones.likelihoods import LogisticMixture
from ebm_prior.backbones.nvae.adapter import NVAE
from ebm_prior.backbones.nvae.distributions import NvaeMixture
from tiny_nvae import tiny, tiny_args, weights, write

from ebm_prior.errors import AssumptionWarning, CheckpointError, ConfigurationError
from ebm_prior.storage.checkpoint import load_backbone

NETWORKS: dict[str, dict[str, Any]] = {
    "colours": {},
    "one component": {"components": 1},
    "gaussian": {"likelihood": "gaussian", "components": 10},
    "grey": {"image_shape": [1, 8, 8], "components": 4},
    "grey gaussian": {"image_shape": [1, 8, 8], "likelihood": "gaussian", "components": 10},
    "binary": {"image_shape": [1, 8, 8], "likelihood": "bernoulli", "components": 10},
    "four channels": {"image_shape": [4, 8, 8], "likelihood": "gaussian", "components": 10},
    "larger": {"image_shape": [3, 16, 16]},
}


@pytest.mark.parametrize("name", ["stacked_mnist", "cats", "my/own data", "celeba_hq", None, 7])
def test_any_name_is_taken_with_a_remark(tmp_path: Path, name: Any) -> None:
    model = tiny()
    with pytest.warns(
        AssumptionWarning, match=r"by the weights they are taken to have the shape \[3,8,8\].*--set image_"
    ):
        loaded = NVAE.load_official(write(tmp_path, args=tiny_args(dataset=name), state=weights(model)))
    assert loaded.architecture == model.architecture
    assert loaded.data_name == (name if isinstance(name, str) else None)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_weights_tell_the_images_and_their_likelihood(tmp_path: Path, network: str) -> None:
    model = tiny(**NETWORKS[network])
    with pytest.warns(AssumptionWarning, match=str(model.architecture["likelihood"])):
        loaded = NVAE.load_official(write(tmp_path, args=tiny_args(dataset="cats"), state=weights(model)))
    assert loaded.architecture == model.architecture


@pytest.mark.filterwarnings("error")
def test_what_the_caller_says_goes_first(tmp_path: Path) -> None:
    model = tiny(image_shape=[1, 6, 6], padding=1, likelihood="bernoulli", components=10)
    path = write(tmp_path, args=tiny_args(dataset="glyphs", num_mixture_dec=10), state=weights(model))
    options = {"image_shape": [1, 6, 6], "likelihood": "bernoulli"}
    loaded = load_backbone("nvae", path, options=options)
    assert loaded.architecture == model.architecture  # padding is what is left of the side
    path = write(tmp_path, args=tiny_args(dataset="imagenet_32"), state=weights(tiny()))  # a name that lies
    with pytest.raises(CheckpointError, match="mis-shaped: prior_ftr0"):
        load_backbone("nvae", path)
    assert load_backbone("nvae", path, options={"image_shape": [3, 8, 8]}).image_shape == (3, 8, 8)


@pytest.mark.filterwarnings("ignore::ebm_prior.errors.AssumptionWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_shape": [3, 64, 64]},
            r"expected images of side 8, .*found \[3, 64, 64\]: --set image_shape=\[3,8,8\]",
        ),
        ({"image_shape": [3, 7, 7]}, "expected images of side 8"),
        ({"image_shape": [3, 8, 8], "padding": 2}, "expected images of side 8.*and padding 2"),
        ({"image_shape": "[3,8,8]"}, "image_shape: expected a list"),
        ({"image_shape": [8, 8]}, r"image_shape: expected \(C, H, W\)"),
        ({"likelihood": "poisson"}, "likelihood: expected one of .*found 'poisson'"),
        ({"padding": -1}, "padding: expected an integer from 0"),
        ({"components": 0}, "components: expected an integer from 1"),
        ({"pading": 2}, "pading: NVAE reads official files with the options weights, image_shape"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write(tmp_path, args=tiny_args(dataset="cats"), state=weights(tiny()))
    with pytest.raises(ConfigurationError, match=message):
        load_backbone("nvae", path, options=options)


def test_what_neither_name_nor_weights_tell_is_asked_for(tmp_path: Path) -> None:
    state = {key: t for key, t in weights(tiny()).items() if not key.startswith("stem.")}
    with pytest.raises(
        CheckpointError, match=r"found 'cats' and no such weights: --set image_shape=\[3,64,64\] --set lik"
    ):
        NVAE.load_official(write(tmp_path, args=tiny_args(dataset="cats"), state=state))
    state = weights(tiny()) | {"image_conditional.1.weight": torch.ones(7, 4, 3, 3)}
    with pytest.raises(CheckpointError, match=r"likelihood: expected 3 numbers per pixel .*found 7"):
        NVAE.load_official(write(tmp_path, args=tiny_args(dataset="cats"), state=state))
    args = tiny_args()
    del args.num_nf
    with pytest.raises(CheckpointError, match=r"expected the option num_nf in args, .*e.g. args.num_nf = 1"):
        NVAE.load_official(write(tmp_path, args=args))


@pytest.mark.parametrize("bits", [8, 5, 1])
def test_the_mixture_of_one_colour_adds_up_to_one(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixture = LogisticMixture(torch.randn(1, 6, 2, 2, generator=generator).double(), bits=bits, colours=1)
    values = torch.linspace(0, 1, 2**bits, dtype=torch.float64)
    total = sum(mixture.log_prob_of_pixels(v.expand(1, 1, 2, 2)).exp() for v in values)
    torch.testing.assert_close(total, torch.ones(1, 2, 2, dtype=torch.float64), rtol=1e-4, atol=0)


def test_one_colour_is_the_first_of_three() -> None:
    """With means and scales such that green and blue are certain, the three-colour mixture scores red alone."""
    generator = torch.Generator().manual_seed(1)
    logits, mean, scale = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    grey = NvaeMixture(torch.cat([logits, mean, scale], 1), colours=1)
    far = torch.full_like(mean, 50.0)
    rest = torch.cat([far, torch.zeros_like(far), torch.zeros_like(far)], 1)
    red = torch.cat([mean, scale, torch.zeros_like(mean)], 1)
    three = NvaeMixture(torch.cat([logits, red, rest, rest], 1))
    images = torch.rand(2, 1, 4, 4, generator=generator)
    bright = torch.cat([images, torch.ones(2, 2, 4, 4)], 1)  # the top value, certain where the mean is far above it
    torch.testing.assert_close(grey.log_prob(images), three.log_prob(bright), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grey.mean, three.mean[:, :1])
    drawn = grey.sample(generator=generator)
    assert drawn.shape == (2, 1, 4, 4)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
    with pytest.raises(ConfigurationError, match="3 channels per mixture component of 1 colours"):
        LogisticMixture(torch.ones(1, 10, 2, 2), colours=1)


def test_a_grey_network_computes() -> None:
    model = tiny(image_shape=[1, 8, 8], components=3).eval()
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    posterior = model.infer(model.observe(images), generator=torch.Generator().manual_seed(1))
    assert model.discretised
    assert all(math.isfinite(value) for value in model.likelihood(posterior.features).log_prob(images).tolist())
